"""Progress of long work on stderr: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.text import Text

INTERVAL = 10.0
"""Seconds between two lines if stderr is not a terminal."""

FIRST = 5.0
"""Seconds before the first line, so that a quick error is printed without progress."""

T = TypeVar("T")


class Progress(AbstractContextManager["Progress"]):
    """Shows how much of `total` is done, the rate, and the remaining time.

    `unit`: what is counted, in the plural.  `total` and `done` may be fractions; they are shown rounded down.
    `details`: called at each refresh; its text is added to the line.  `rate`: whether to show a rate; pass False if
    seconds are counted.  A thread prints the lines, so they appear even if nothing was finished since the last one: the
    first after `FIRST` seconds, then one every `INTERVAL` seconds, and one at the end unless an exception was raised.
    Work that ends before the first line shows nothing, or with `always` only the last line.
    """

    def __init__(
        self,
        unit: str,
        total: float,
        *,
        done: float = 0,
        details: Callable[[], str] = lambda: "",
        rate: bool = True,
        always: bool = False,
        console: Console | None = None,
    ):
        """Shows nothing before the `with` block is entered."""
        self.unit, self.total, self.done, self.details, self.rate = unit, total, done, details, rate
        self.always = always
        self.console = console or Console(stderr=True)
        self._first = done  # earlier work does not count for the rate
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self.console.quiet:
            return self
        if self.console.is_terminal:
            self._bar = Bar(BarColumn(30), _Line(self), console=self.console, redirect_stdout=False)
            self._bar.start()
            self._bar.add_task("", total=self.total)
            self.update(self.done)
            return self
        self._thread = threading.Thread(target=self._print_lines, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            if kind is None and self.always:
                self.print(str(self))

    def update(self, done: float, total: float | None = None) -> None:
        """Sets how much is done, and the total if it has changed."""
        self.done, self.total = done, self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, total=self.total)

    def advance(self, _: object = None) -> None:
        """Counts one more; ignores its argument, so that it can be used as a callback."""
        self.update(self.done + 1)

    def print(self, line: str) -> None:
        """Prints a line, on a terminal above the bar."""
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def __str__(self) -> str:
        """The line: done, details, rate and remaining time."""
        took = time.monotonic() - self._began
        rate = (self.done - self._first) / took if took > 0 else 0.0
        parts = [f"{int(self.done):,} of {int(self.total):,} {self.unit}", *filter(None, [self.details()])]
        if self.rate and rate > 0:
            parts.append(f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each")
        if self.done < self.total:
            known = not self.rate or rate > 0
            seconds = (self.total - self.done) / (rate if self.rate else 1.0) if known else 0.0
            parts.append(f"{timedelta(seconds=round(seconds))} left" if known else "time left unknown")
        return ", ".join(parts)

    def _print_lines(self) -> None:
        wait = FIRST
        while not self._ended.wait(wait):
            self.always = True
            self.print(str(self))
            wait = INTERVAL


class _Line(ProgressColumn):
    """The text beside the bar, computed at each refresh."""

    max_refresh = 0.5

    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(str(self._progress))


def track(items: Sequence[T], unit: str, *, name: Callable[[T], str] = lambda _: "") -> Iterator[T]:
    """Yields the items with a progress display; `name` returns the details for an item in progress."""
    current = [""]
    with Progress(unit, len(items), details=lambda: current[0]) as progress:
        for number, item in enumerate(items):
            current[0] = name(item)
            yield item
            progress.update(number + 1)
        current[0] = ""
