"""Ctrl-C and SIGTERM: commands save their work, then exit with the conventional status.

Signals are process-wide, and so is the state here.  Only commands that save install the handlers, in the main thread;
otherwise Python's default behaviour applies.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from redrafter.errors import RedrafterError


class Interrupted(KeyboardInterrupt):
    """A signal arrived.  `forced`: it is the second one, which does not wait for a consistent state."""

    def __init__(self, number: int, *, forced: bool = False):
        super().__init__()
        self.number, self.forced = number, forced


class StoppedRun(RedrafterError):
    """A signal stopped a run; `status` is the exit status: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, error: KeyboardInterrupt):
        super().__init__(message)
        self.status = 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


class _State:
    deferrals = 0
    pending: int | None = None


def _handle(number: int, frame: FrameType | None) -> None:
    if not _State.deferrals:
        raise Interrupted(number)
    if _State.pending is not None:
        raise Interrupted(number, forced=True)
    _State.pending = number


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in this block.  Has no effect outside the main thread."""
    _State.deferrals, _State.pending = 0, None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pending() -> int | None:
    """The signal that waits for the end of a deferred block, if any."""
    return _State.pending


def stop(number: int) -> NoReturn:
    """Raises Interrupted for a signal that waited; call it only if the state is consistent."""
    _State.pending = None
    raise Interrupted(number)


def check() -> None:
    """Calls `stop` if a signal waits."""
    if _State.pending is not None:
        stop(_State.pending)


@contextmanager
def deferred() -> Iterator[None]:
    """Delays Interrupted to the end of this block or to `check`; a second signal raises it immediately."""
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1
    if not _State.deferrals:
        check()


@contextmanager
def at_once() -> Iterator[None]:
    """Inside a deferred block: signals raise Interrupted immediately, as the state is consistent throughout."""
    before, _State.deferrals = _State.deferrals, 0
    try:
        check()
        yield
    finally:
        _State.deferrals = before
