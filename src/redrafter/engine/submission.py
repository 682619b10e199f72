"""A request of an `Engine` as its caller sees it: an iterator of events, in a thread or in an asyncio loop.

Text is made here, by the consumer, so that the engine's thread does not wait for tokenizers.  Does not know how rows
are decoded.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from redrafter.engine.request import Task
from redrafter.engine.results import Event, Finished, Stats
from redrafter.engine.text import Detokenizer
from redrafter.errors import RedrafterError, first_line


@dataclass(frozen=True)
class _Waiting:
    """An asyncio consumer."""

    loop: asyncio.AbstractEventLoop
    ready: asyncio.Event


class Submission:
    """Events of one request; one consumer may iterate over them.

    Iteration ends after the event with a finish reason, and raises RedrafterError if the request failed.
    """

    def __init__(
        self,
        task: Task,
        cancel: Callable[[Submission], None],
        tokenizer: PreTrainedTokenizerBase | None,
        positions: int,
    ):
        """`positions`: the largest number of drafted tokens per path."""
        self.task = task
        self.prompt = task.row.prompt
        self.stats = Stats(accepted_by_position=[0] * positions)
        """Counts of the events that were consumed."""
        self._cancel = cancel
        self._pieces = None if tokenizer is None else Detokenizer(tokenizer)
        self._begin = time.perf_counter()
        self._queue: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._waiting: _Waiting | None = None
        self._ended = False

    @property
    def queued_seconds(self) -> float | None:
        """How long the request waited for a slot; None if it has none yet."""
        return None if self.task.admitted is None else self.task.admitted - self._begin

    def cancel(self) -> None:
        """Ends the request; the next event has the finish reason "cancelled".  No effect if it has ended.

        May be called from any thread.
        """
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        """Waits for each event."""
        while not self._ended:
            yield self._received(self._queue.get())

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Waits for each event in the running asyncio loop."""
        self._waiting = _Waiting(asyncio.get_running_loop(), asyncio.Event())
        while not self._ended:
            self._waiting.ready.clear()
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                await self._waiting.ready.wait()
                continue
            yield self._received(item)

    def result(self, timeout: float | None = None) -> Finished:
        """The finished row.  Consumes all events.  Raises TimeoutError after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        events: list[Event] = []
        while not self._ended:
            try:
                item = self._queue.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"The request did not finish within {timeout} seconds.") from None
            events.append(self._received(item))
        return Finished.of(events, self.stats)

    def deliver(self, item: Event | Exception) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """Hands an event or an error to the consumer.  Returns the loop to wake and what to set in it, if any."""
        self._queue.put(item)
        return None if self._waiting is None else (self._waiting.loop, self._waiting.ready)

    def _received(self, item: Event | Exception) -> Event:
        if isinstance(item, Exception):
            self._ended = True
            if isinstance(item, RedrafterError):
                raise item
            raise RedrafterError(f"The request failed: {type(item).__name__}: {first_line(item)}") from item
        self._ended = item.finish_reason is not None
        if item.tokens:
            self.stats.count(item)
        self.stats.seconds = time.perf_counter() - self._begin
        if self._pieces is not None:
            item.text = "".join(map(self._pieces.push, item.tokens)) + (self._pieces.rest() if self._ended else "")
        return item
