"""A long-lived engine: requests enter at any time and are decoded together (continuous batching).

Guarantees that a request's text is that of the same request decoded alone (up to rounding, as everywhere), that each
request ends exactly once, and that a request which fails ends alone.  One thread runs the loop; all public methods may
be called from any thread.  Does not know text protocols such as HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from redrafter.core.shapes import DraftShape
from redrafter.decoding.settings import ONE_TEXT
from redrafter.engine.inputs import end_tokens
from redrafter.engine.request import Task, method_for, tasks
from redrafter.engine.results import Event
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.engine.sizes import decoders_for, describe_decoder, longest_text, tokens_beside_steps
from redrafter.engine.statistics import Counts, EngineStatistics
from redrafter.engine.submission import Submission
from redrafter.errors import RedrafterError, first_line
from redrafter.kernels import kernels_enabled
from redrafter.proposers import Drafter
from redrafter.targets.target import Target
from redrafter.utils.memory import within_memory


class EngineFull(RedrafterError):
    """Too many requests wait already; try again later."""


class EngineClosed(RedrafterError):
    """The engine accepts no more requests."""


class Engine:
    """Decodes requests of one model together.  Use it as a context manager, or call `close`."""

    def __init__(
        self,
        model: nn.Module,
        drafter: Drafter | str | Path | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        slots: int = 32,
        max_length: int | None = None,
        max_waiting: int = 256,
        shape: DraftShape | None = None,
        lookup: bool | None = None,
        read_tokens: int | None = None,
        fast: bool = True,
        compile: bool = False,
    ):
        """`model` and `drafter` as for `generate`.

        - `tokenizer` adds text to events, and is required for `stop_strings`;
        - `slots`: the maximum number of requests that are decoded together;
        - `max_length`: the maximum number of prompt and new tokens of a request.  Default: the model's context, or what
          fits into 80 % of the memory that is left;
        - `max_waiting`: the maximum number of requests that wait for a slot;
        - `shape`: how to draft.  By default the drafter's tuned shape for the current number of requests, which may
          switch drafting off;
        - `lookup`: as for `generate`;
        - `read_tokens`: prompt tokens that are read between two steps of other requests, which bounds their delay.
          Default: 64 to 512, fewer for larger models;
        - `fast`, `compile`: as for `generate`.

        Raises RedrafterError.
        """
        limits = {"slots": slots, "max_waiting": max_waiting, "max_length": max_length, "read_tokens": read_tokens}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise RedrafterError(f"{name} must be at least 1, not {value}.")
        method = method_for(model, drafter)
        with kernels_enabled(fast):
            self._target = Target(model, () if method is None else method.layers)
            decoders = decoders_for(self._target, method, shape, slots, lookup)
        self.slots = slots
        self.vocab_size = self._target.vocab_size
        self.context_length = self._target.context_length
        self.end_tokens = end_tokens(self._target.model.generation_config or GenerationConfig())
        """The tokens that end a request, unless its settings name others."""
        self.max_length = max_length or longest_text(self._target, slots)
        if self.context_length is not None:
            self.max_length = min(self.max_length, self.context_length + 1)
        self.max_waiting = max_waiting
        self._tokenizer = tokenizer
        self._remedy = f"lower slots (now {slots}) or max_length (now {self.max_length:,})"
        with within_memory(self._target.device, self._remedy):
            self._runner = Runner(decoders, batch=slots, slots=self.max_length, fast=fast, compile=compile)
        read_tokens = read_tokens or tokens_beside_steps(self._target)
        self._scheduler = Scheduler(self._runner, read_tokens=read_tokens, prefixes=True)
        self._numbers = count()
        self._submissions: dict[Task, Submission] = {}
        self._added: deque[Submission] = deque()
        self._cancelled: deque[Submission] = deque()
        self._wake, self._idle, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._accepting, self._closing = True, False
        self._counts = Counts([0] * self._runner.length)
        self._failed = ""  # why the loop died
        self._thread = threading.Thread(target=self._run, name="redrafter engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive() and not self._closing

    def submit(self, prompt: Sequence[int], **settings: Any) -> Submission:
        """Queues a request and returns at once.  `prompt` is a list of token ids.

        `settings` are those of `generate` that concern one row: all fields of a `GenerationConfig`, `seed`,
        `logits_processor`, `stopping_criteria`, `prefix_allowed_tokens_fn`, `presence_penalty`, `frequency_penalty`,
        `logit_bias`, `logprobs`, and `drafter=False` to decode without drafts.  The number of new tokens is limited by
        `max_length`.

        Raises RedrafterError for bad settings, EngineFull and EngineClosed.
        """
        self._check_open()
        words = ONE_TEXT | {"tokenizer": self._tokenizer} | settings
        _, (task, *others) = tasks(self._target, [list(prompt)], **words)
        if others:
            raise RedrafterError("A request writes one text: submit it again instead of setting num_return_sequences.")
        row = task.row
        if len(row.prompt) >= self.max_length:
            raise RedrafterError(
                f"The prompt has {len(row.prompt):,} tokens, and a request at most {self.max_length:,} with at least "
                "one new token."
            )
        budget = min(row.budget, self.max_length - len(row.prompt))
        task.row = replace(row, number=next(self._numbers), budget=budget)
        submission = Submission(task, self._cancel, self._tokenizer, self._runner.length)
        with self._lock:
            self._check_open()
            waiting = len(self._scheduler.waiting) + len(self._added)
            if waiting >= self.max_waiting and waiting >= self.slots - self._scheduler.running:
                raise EngineFull(f"{waiting} requests wait already, the limit is {self.max_waiting}: try again later.")
            self._idle.clear()
            self._added.append(submission)
        self._wake.set()
        return submission

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        scheduler, prefixes = self._scheduler, self._scheduler.slots.prefixes
        return self._counts.snapshot(
            running=scheduler.running,
            waiting=len(scheduler.waiting) + len(self._added),
            slots=self.slots,
            steps=scheduler.steps,
            cache_usage=min(1.0, scheduler.used_positions / (self.slots * self.max_length)),
            prefix_queries=0 if prefixes is None else prefixes.queries,
            prefix_hits=0 if prefixes is None else prefixes.hits,
        )

    def describe(self) -> dict[str, str]:
        """What is loaded and how it runs, in words."""
        shapes = [(rows, describe_decoder(decoder)) for rows, decoder in sorted(self._runner.decoders.items())]
        return {
            "model": self._target.name or type(self._target.model).__name__,
            "device": f"{self._target.device}, {str(self._target.dtype).removeprefix('torch.')}",
            "drafts": "; ".join(f"from {rows} requests: {shape}" if rows > 1 else shape for rows, shape in shapes),
            "slots": f"{self.slots} requests of up to {self.max_length:,} tokens",
            "keys and values": f"{self._runner.bytes / 2**30:.2f} GiB",
            **self._runner.describe(),
        }

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts no more requests and waits until all have ended, at most `timeout` seconds.  Returns whether they
        have."""
        with self._lock:
            self._accepting = False
        self._wake.set()
        return self._idle.wait(timeout)

    def close(self) -> None:
        """Ends all requests as "cancelled", and the loop.  Idempotent."""
        with self._lock:
            self._accepting, self._closing = False, True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._failed:
            raise EngineClosed(f"The engine has stopped: {self._failed}")
        if not self._accepting:
            raise EngineClosed("The engine is shutting down and accepts no more requests.")

    def _cancel(self, submission: Submission) -> None:
        self._cancelled.append(submission)
        self._wake.set()

    def _run(self) -> None:
        """The loop."""
        try:
            while not self._closing:
                self._receive()
                if self._scheduler.idle:
                    self._rest()
                    continue
                self._deliver(self._step())
            self._receive()
        except BaseException as error:  # a defect of the loop itself: no request may wait forever
            traceback.print_exc()
            self._failed = first_line(error) if isinstance(error, Exception) else type(error).__name__
            self._accepting = False
        self._cancel_all()
        self._idle.set()

    def _rest(self) -> None:
        """Waits for requests."""
        with self._lock:
            if not self._added:
                self._idle.set()
        self._wake.wait()
        self._wake.clear()

    def _receive(self) -> None:
        """Takes new requests and cancellations."""
        while self._added:
            submission = self._added[0]
            self._submissions[submission.task] = submission
            self._scheduler.add(submission.task)
            self._counts.prompt_tokens += len(submission.prompt)
            self._added.popleft()  # after it has joined the queue, so that it is counted all the time
        while self._cancelled:
            task = self._cancelled.popleft().task
            if self._scheduler.cancel(task):
                self._deliver([(task, _cancelled(task))])

    def _step(self) -> list[tuple[Task, Event | Exception]]:
        try:
            with within_memory(self._target.device, self._remedy):
                return self._scheduler.step()
        except Exception as error:  # of the model, a proposer or the device: the requests that run now cannot continue
            return [(task, error) for task in self._scheduler.abandon()]

    def _deliver(self, outcomes: Iterable[tuple[Task, Event | Exception]]) -> None:
        """Hands results to their consumers, with one call into each asyncio loop."""
        woken: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = defaultdict(list)
        for task, outcome in outcomes:
            ended = self._counts.add(outcome)
            submission = self._submissions.pop(task) if ended else self._submissions[task]
            to_wake = submission.deliver(outcome)
            if to_wake is not None:
                woken[to_wake[0]].append(to_wake[1])
        for loop, events in woken.items():
            with suppress(RuntimeError):  # the loop was closed, and nobody waits in it
                loop.call_soon_threadsafe(_set_all, events)

    def _cancel_all(self) -> None:
        """Ends every request that is left."""
        self._submissions |= {one.task: one for one in self._added}
        self._added.clear()
        failed = EngineClosed(f"The engine has stopped: {self._failed}") if self._failed else None
        self._deliver([(task, failed or _cancelled(task)) for task in [*self._submissions]])


def _cancelled(task: Task) -> Event:
    return Event(task.row.number, [], 0, 0, "cancelled")


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()
