"""Runs the steps of one call: model locks, optimised layers, CUDA graph, torch.compile and launch-ahead.

Guarantees that other callers cannot observe a step: only the call's own copies of the models are changed, and settings
of the thread are restored after each step.  Does not know requests or when rows finish.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.state import Row, State, sampler_of
from redrafter.decoding.step import Decoder, Emission, PromptPart, packed_parts
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

READ_WIDTH = 256
"""Prompt tokens per row of the kernels for tree attention."""

MAX_STEPS = 128
"""Limit on the captured steps that are kept."""

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
    logprobs: list[list[list[float]]] | None
    """`Emission.logprobs` on the host."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched and whose report has not been read."""

    owners: Owners
    emitted: Emission
    report: Tensor
    logprobs: Tensor | None
    begin: float
    copied: torch.cuda.Event | None = None
    """When the report has arrived at the host."""

    @classmethod
    def launched(cls, owners: Owners, emitted: Emission, begin: float) -> PendingStep:
        """Starts to copy the report from a GPU to the host."""
        device = emitted.report.device
        if device.type != "cuda":
            return cls(owners, emitted, emitted.report, emitted.logprobs, begin)
        report, logprobs = _to_host(emitted.report), None if emitted.logprobs is None else _to_host(emitted.logprobs)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        return cls(owners, emitted, report, logprobs, begin, copied)

    def result(self) -> StepResult:
        """Waits for the report."""
        if self.copied is not None:
            self.copied.synchronize()
        logprobs = None if self.logprobs is None else self.logprobs.tolist()
        return StepResult(self.owners, self.emitted, self.report.tolist(), logprobs)


class Runner:
    """Steps and prompts of one state."""

    def __init__(
        self,
        decoders: Mapping[int, Decoder],
        *,
        batch: int,
        slots: int,
        fast: bool = True,
        compile: bool = False,
        cache: SlotCache | None = None,
    ):
        """`decoders` of one target by the smallest number of rows that each is meant for, beginning with 1.

        Texts have `slots` positions.  `fast`, `compile`: see `Backend.choose`.  `cache`: that of another runner with
        the same target, rows and slots.
        """
        first = decoders[1]
        self.target = first.target
        self.backend = Backend.choose(first, fast=fast, compile=compile)
        self._fast = fast
        models = {id(model): model for decoder in decoders.values() for model in models_of(decoder)}
        self._models = tuple(models.values())
        # Other calls wait even though each runs its own copy: modules may keep state, as offloading hooks do.
        self._lock = ModelLock(*map(original, self._models))
        with self._lock, kernels_enabled(fast):
            self.decoders = {rows: self.backend.prepare(decoder) for rows, decoder in decoders.items()}
            # two steps may exceed the budget of a row; padding of prompts is written into the last positions
            spare = 2 * self.length + 1 + max(READ_WIDTH, self.size) if cache is None else cache.slots - slots
            proposers = [one.proposer for one in self.decoders.values()]
            self.state = State.empty(self.target, proposers, batch=batch, slots=slots + spare, cache=cache)
        self._views: dict[int, State] = {}
        self._layers = self.target.decoder_layers if self.backend.compile is None else []
        self._addresses = _current_addresses(self._models)
        self._steps: dict[Hashable, Captured[Emission]] = {}
        self._inputs: dict[Hashable, Tensor] = {}
        self._refused = self.backend.graph
        self._seconds = math.inf  # duration of the last step that was waited for

    @property
    def size(self) -> int:
        """The largest number of nodes of a tree."""
        return max(decoder.size for decoder in self.decoders.values())

    @property
    def length(self) -> int:
        """The largest number of drafted tokens of a step and row."""
        return max(decoder.length for decoder in self.decoders.values())

    @property
    def reads_while_decoding(self) -> bool:
        """Whether one forward pass both decodes rows and reads prompts."""
        return self._refused is None and self.target.tree_kernels

    def decoder_for(self, rows: int) -> Decoder:
        """The decoder for a number of rows decoded together."""
        return self.decoders[max(least for least in self.decoders if least <= max(1, rows))]

    def rounded(self, rows: int) -> int:
        """The number of rows that a step computes for `rows` rows: one that is captured or compiled for others too."""
        if self._refused is not None and not self._layers:
            return rows
        whole = 1 << (rows - 1).bit_length()
        between = whole // 4 * 3
        return min(between if rows <= between and whole >= 16 else whole, self.state.batch)

    def view(self, rows: int) -> State:
        """The first rows of the state."""
        if rows not in self._views:
            self._views[rows] = self.state.first(rows)
            if self._layers:
                mark_length_dynamic(self._views[rows].cache)
        return self._views[rows]

    def captured(self, function: Callable[[], Any], *, known: bool = False) -> Captured[Any]:
        """A function of the state, as one CUDA graph if the backend uses graphs.

        `known`: another function of the same operators has been captured before.
        """
        models, addresses = self._models, self._addresses
        return Captured(
            function,
            self.backend.device,
            refused=self._refused,
            valid=lambda: _current_addresses(models) == addresses,
            known=known,
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

    def enter(self, rows: Mapping[int, Row]) -> None:
        """Rows enter slots.  See `State.enter`."""
        with torch.inference_mode():
            settings = self.state.rows.settings
            if settings is not None and settings.bias is None and any(row.sampling.bias for row in rows.values()):
                self.state = self.state.with_bias(self.target.vocab_size)
                self._views.clear()
                self._steps.clear()
            self.state.enter(rows)

    def read(self, parts: Sequence[PromptPart]) -> None:
        """Reads parts of prompts, in one forward pass if possible: all begin at position 0, or belong to one row.

        Rows whose prompts are complete are alive afterwards.
        """
        from_start = all(part.start == 0 for part in parts)
        longest = max(part.stop - part.start for part in parts)
        width = longest if from_start or not self.target.tree_kernels else min(longest, READ_WIDTH)
        decoder = self.decoders[1]
        with self.running(compile=False):  # prompts of every length would be compiled anew
            packed = packed_parts(parts, self.state, width=width)
            self.state.set_visible(max(part.stop for part in parts))
            decoder.read(self.state, packed.to(self.backend.device), from_start=from_start)

    def launch(
        self, rows: Mapping[int, Row], owners: Owners, committed: int, parts: Sequence[PromptPart] = ()
    ) -> PendingStep:
        """Starts a step of the rows in these slots, which also reads `parts` of other rows' prompts.

        `committed` is the largest number of cache slots that a row uses.
        """
        begin = time.perf_counter()
        sampler = sampler_of(rows)
        count = self.rounded(1 + max(rows))
        decoder = self.decoder_for(count)
        with self.running():
            state = self.view(count)
            reading = self._packed(decoder, parts) if parts else None
            if sampler.synchronizes:
                step: Callable[[], Emission] = lambda: decoder.step(state, sampler, reading)  # noqa: E731
                refused = True
            else:
                captured = self._step(count, decoder, sampler, reading)
                step, refused = captured, captured.refused is not None
            # what a captured step sees cannot grow with the text
            visible = committed + decoder.size if refused else state.cache.slots
            state.set_visible(visible)
            return PendingStep.launched(owners, step(), begin)

    def result(self, pending: PendingStep, *, waited: bool) -> StepResult:
        """Waits for a step.  `waited`: no other step ran at the same time, so that its duration is known."""
        result = pending.result()
        if waited:
            self._seconds = time.perf_counter() - pending.begin
        return result

    @property
    def launches_ahead(self) -> bool:
        """Whether the next step should be launched before the results of the last one are read."""
        return self._seconds < LAUNCH_AHEAD_SECONDS and any(step.replaying for step in self._steps.values())

    def end(self, slots: Sequence[int]) -> None:
        """Frees slots."""
        with torch.inference_mode():
            self.state.end(slots)

    def move(self, source: int, target: int, used: int) -> None:
        """Moves a row to a free slot.  See `State.move`."""
        with torch.inference_mode():
            self.state.move(source, target, used)

    def _packed(self, decoder: Decoder, parts: Sequence[PromptPart]) -> tuple[State, Tensor]:
        """The complete state, and parts of prompts in one of the sizes that are captured."""
        entries = sum(-(-(part.stop - part.start) // decoder.size) for part in parts)
        rounded = max(4, 1 << (entries - 1).bit_length())
        packed = packed_parts(parts, self.state, width=decoder.size, entries=rounded)
        key = ("packed", decoder.size, rounded)
        if key not in self._inputs:
            self._inputs[key] = packed.to(self.backend.device)
        else:
            self._inputs[key].copy_(packed.pin_memory(), non_blocking=True)
        return self.state, self._inputs[key]

    def _step(
        self, count: int, decoder: Decoder, sampler: Sampler, reading: tuple[State, Tensor] | None
    ) -> Captured[Emission]:
        """The step for a number of rows, a sampler and a number of prompt tokens, captured or to be captured."""
        entries = 0 if reading is None else len(reading[1])
        key = (count, id(decoder), sampler.features, sampler.shared, entries)
        if key not in self._steps:
            if len(self._steps) >= MAX_STEPS:
                del self._steps[next(iter(self._steps))]
            known = any(step.replaying for step in self._steps.values())
            state = self.view(
                count
            )  # a function that referred to the runner would form a cycle, which keeps its memory
            self._steps[key] = self.captured(lambda: decoder.step(state, sampler, reading), known=known)
        return self._steps[key]

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`; includes what the steps so far have shown."""
        words = self.backend.describe()
        refused = [step.refused for step in self._steps.values() if step.refused is not None]
        if self.backend.graph is None and refused:
            words["a step"] = f"call by call ({refused[0]})"
        return words

    def milliseconds(self, function: Callable[[], object], repeats: int) -> float:
        """The median duration of a function of the state: CUDA graph replays between events, otherwise wall time."""
        with self.running():
            return milliseconds(function, self.backend.device, repeats)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which has not arrived yet."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


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
