"""Runs the steps of one call: model locks, optimised layers, CUDA graph, torch.compile and launch-ahead.

Guarantees that other callers cannot observe a step: only the call's own copies of the models are changed, and settings
of the thread are restored after each step.  Does not know requests or when rows finish.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.decoding.step import Decoder, Emission, Row, State
from redrafter.engine.backend import Backend, models_of
from redrafter.engine.compiled import compiled, mark_length_dynamic
from redrafter.engine.cuda_graph import Captured
from redrafter.errors import RedrafterError
from redrafter.kernels import kernels_enabled
from redrafter.targets.isolation import original
from redrafter.targets.locks import ModelLock

LAUNCH_AHEAD_SECONDS = 2e-3
"""Duration of a step below which the next one is launched before its results are read.

Launching ahead hides about 0.1 ms of host overhead per step; the last step of a row is wasted.
"""

Owners = Sequence[tuple[int, Any]]
"""Indices of rows in an emission, each with what the caller knows the row by."""

WARM_UP = 5
"""Calls before the first one that is timed."""


@dataclass(frozen=True)
class StepResult:
    """A step whose report has been read."""

    owners: Owners
    """What the caller passed for the step."""
    emitted: Emission
    reports: list[list[int]]
    """`Emission.report` on the host."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched and whose report has not been read."""

    owners: Owners
    emitted: Emission
    report: Tensor
    copied: torch.cuda.Event | None = None
    """When the report has arrived at the host."""

    @classmethod
    def launched(cls, owners: Owners, emitted: Emission) -> PendingStep:
        """Starts to copy the report from a GPU to the host."""
        if emitted.report.device.type != "cuda":
            return cls(owners, emitted, emitted.report)
        report = torch.empty_like(emitted.report, device="cpu", pin_memory=True)
        report.copy_(emitted.report, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(emitted.report.device))
        return cls(owners, emitted, report, copied)

    def result(self) -> StepResult:
        """Waits for the report."""
        if self.copied is not None:
            self.copied.synchronize()
        return StepResult(self.owners, self.emitted, self.report.tolist())


class Runner:
    """Steps of one state."""

    def __init__(self, decoder: Decoder, state: State, *, fast: bool = True, compile: bool = False, ahead: bool = True):
        """`fast`, `compile`: see `Backend.choose`.

        `ahead` allows launching a step before the previous one was read, which overwrites the emission of the latter.
        """
        self.backend = Backend.choose(decoder, fast=fast, compile=compile)
        self._models = models_of(decoder)
        # Other calls wait even though each runs its own copy: modules may keep state, as offloading hooks do.
        self._lock = ModelLock(*map(original, self._models))
        with self._lock, kernels_enabled(fast):
            self.decoder = self.backend.prepare(decoder)
        self.state, self._fast, self._ahead = state, fast, ahead
        self._layers = decoder.target.decoder_layers if self.backend.compile is None else []
        if self._layers:
            mark_length_dynamic(self.state.cache)
        self._addresses = _current_addresses(self._models)
        prepared = self.decoder  # a function that referred to the runner would form a cycle, which keeps its memory
        self._step = self.captured(lambda: prepared.step(state))
        self._pending: deque[PendingStep] = deque()
        self._seconds = math.inf  # duration of the last step that was waited for

    def captured(self, function: Callable[[], Any]) -> Captured[Any]:
        """A function of the state, as one CUDA graph if the backend uses graphs."""
        models, addresses = self._models, self._addresses
        return Captured(
            function,
            self.backend.device,
            refused=self.backend.graph,
            valid=lambda: _current_addresses(models) == addresses,
        )

    @contextmanager
    def running(self, *, compile: bool = True) -> Iterator[None]:
        """The context of every use of the models: exclusive, in inference mode, with the backend's optimisations."""
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(torch.inference_mode())
            stack.enter_context(kernels_enabled(self._fast))
            if compile and self._layers:
                stack.enter_context(compiled(self._layers))
            yield

    def admit(self, slots: list[int], rows: list[Row], owners: Owners) -> StepResult:
        """Rows enter free slots.  Pending steps keep their owners."""
        with self.running(compile=False):  # prompts of every length would be compiled anew
            emitted = self.decoder.admit(self.state, slots, rows)
        return PendingStep(owners, emitted, emitted.report).result()

    def step(self, owners: Owners, committed: int, more: Callable[[int], bool]) -> StepResult:
        """The result of the oldest step that was not returned yet.

        Launches it if necessary, and possibly the next one.  `committed` is the largest number of cache slots that a
        row uses.  `more(tokens)` returns whether some row continues after that many more tokens.
        """
        begin = time.perf_counter()
        length, size = self.decoder.length, self.decoder.size
        limit = 2 if self._launches_ahead else 1
        with self.running():
            while len(self._pending) < limit:
                unread = len(self._pending) * (length + 1)  # tokens, at most
                if self._pending and not more(unread):
                    break
                # what a captured step sees cannot grow with the text
                visible = self.state.cache.slots if self._step.refused is None else committed + unread + size
                self.state.set_visible(visible)
                self._pending.append(PendingStep.launched(owners, self._step()))
        result = self._pending.popleft().result()
        if limit == 1:
            self._seconds = time.perf_counter() - begin
        return result

    def end(self, slot: int) -> None:
        """Frees a slot."""
        with torch.inference_mode():
            self.state.end(slot)

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`; includes what the steps so far have shown."""
        words = self.backend.describe()
        if self.backend.graph is None and self._step.refused is not None:
            words["a step"] = f"call by call ({self._step.refused})"
        return words

    def milliseconds(self, function: Callable[[], object], repeats: int) -> float:
        """The median duration of a function of the state: CUDA graph replays between events, otherwise wall time."""
        with self.running():
            return milliseconds(function, self.backend.device, repeats)

    @property
    def _launches_ahead(self) -> bool:
        return self._ahead and self._seconds < LAUNCH_AHEAD_SECONDS and self._step.replaying


def _current_addresses(models: Sequence[nn.Module]) -> list[int]:
    """One address per model, which changes if the model is moved or converted."""
    return [next(chain(model.parameters(), model.buffers())).data_ptr() for model in models]


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median duration of a function: CUDA graph replays between events, otherwise wall time.

    Raises RedrafterError if a function on a GPU cannot be captured.
    """
    timed = _replays if device.type == "cuda" else _calls
    with torch.inference_mode():
        return statistics.median(timed(function, device, repeats))


def _replays(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    with torch.cuda.device(device):
        captured = Captured(function, device)
        for _ in range(WARM_UP):
            captured()
        if captured.refused is not None:
            raise RedrafterError(f"The function cannot be timed as a CUDA graph: {captured.refused}.")
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            before.record()
            captured()
            after.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def _calls(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(WARM_UP + repeats):
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[WARM_UP:]
