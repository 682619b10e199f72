"""Ctrl-C and SIGTERM: work is saved, then the process exits with the conventional status.

Signals are process-wide, so this state is too.  Handlers are installed by the commands that save, in the main thread
only; without them Python's own behaviour remains.
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
    """A signal arrived.  `forced` if it is the second one, which does not wait for a consistent state."""

    def __init__(self, number: int, *, forced: bool = False):
        super().__init__()
        self.number, self.forced = number, forced


class StoppedRun(RedrafterError):
    """A run that a signal stopped; `status` is the exit status: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, sentence: str, error: KeyboardInterrupt):
        super().__init__(sentence)
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
    """SIGINT and SIGTERM raise Interrupted in this block, which runs in the main thread."""
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
    """The signal that waits for the end of a deferred block."""
    return _State.pending


def stop(number: int) -> NoReturn:
    """Raises Interrupted for a signal, which then no longer waits: the state is consistent here."""
    _State.pending = None
    raise Interrupted(number)


def check() -> None:
    """Does so if a signal waits."""
    if _State.pending is not None:
        stop(_State.pending)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal raises Interrupted at the end of this block or in `check`; a second one raises it at once."""
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1
    if not _State.deferrals:
        check()


@contextmanager
def at_once() -> Iterator[None]:
    """Inside a deferred block: signals raise Interrupted at once, since the state is consistent throughout."""
    before, _State.deferrals = _State.deferrals, 0
    try:
        check()
        yield
    finally:
        _State.deferrals = before
