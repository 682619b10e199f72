"""Runs the steps of one state: model locks, optimised layers, CUDA graph, torch.compile and launch-ahead.

Guarantees that other callers cannot observe a step: only the copies of the models that it runs are changed, and
settings of the thread are restored after each step.  Does not know requests or when rows finish.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.state import Row, State, sampler_of
from redrafter.decoding.step import Decoder, Emission, PromptPart, packed_parts, tokens_of
from redrafter.engine.backend import Backend, models_of
from redrafter.engine.clock import milliseconds
from redrafter.engine.compiled import compiled, mark_length_dynamic
from redrafter.engine.cuda_graph import Captured
from redrafter.engine.pending import Owners, PendingStep, StepResult
from redrafter.kernels import kernels_enabled
from redrafter.targets.isolation import original
from redrafter.targets.locks import ModelLock

LAUNCH_AHEAD_SHARE = 0.03
"""Share of a step from which the host's work between two steps is hidden by launching the next one before it.

The last step of a row is then wasted.
"""

READ_WIDTH = 256
"""Prompt tokens per row of the kernels for tree attention."""

MAX_CAPTURED_READ, CAPTURED_WIDTH = 1024, 32
"""Prompt tokens of a forward pass that is captured, and those of one of its rows."""

MAX_STEPS = 128
"""Limit on the captured steps that are kept."""


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
        single = batch == 1 and all(decoder.proposer is None for decoder in decoders.values())
        self.backend = Backend.choose(first, fast=fast, compile=compile, single=single)
        self._fast = fast
        models = {id(model): model for decoder in decoders.values() for model in models_of(decoder)}
        self._models = tuple(models.values())
        # Other calls wait even though each runs its own copy: modules may keep state, as offloading hooks do.
        self._lock = ModelLock(*map(original, self._models))
        with self._lock, kernels_enabled(fast):
            self.decoders = {rows: self.backend.prepare(decoder) for rows, decoder in decoders.items()}
            # two steps and a tree may exceed the budget of a row; padding of prompts is written behind them
            spare = 2 * self.length + 1 + self.size + max(READ_WIDTH, self.size)
            spare = spare if cache is None else cache.slots - slots
            proposers = [one.proposer for one in self.decoders.values()]
            self.state = State.empty(self.target, proposers, batch=batch, slots=slots + spare, cache=cache)
        self.slots = slots
        """Positions of a text."""
        self._views: dict[int, State] = {}
        self._layers = self.target.decoder_layers if self.backend.compile is None else []
        if self._layers:
            mark_length_dynamic(self.state.cache)
        self._addresses = _current_addresses(self._models)
        self._steps: dict[Hashable, Captured[Any]] = {}
        self._inputs: dict[Hashable, Tensor] = {}
        self._refused = self.backend.graph
        self._seconds = math.inf  # duration of the last step that was waited for, and of the host's work after it
        self._between, self._read_at = 0.0, math.nan

    @property
    def size(self) -> int:
        """The largest number of nodes of a tree."""
        return max(decoder.size for decoder in self.decoders.values())

    @property
    def length(self) -> int:
        """The largest number of drafted tokens of a step and row."""
        return max(decoder.length for decoder in self.decoders.values())

    @property
    def captures(self) -> bool:
        """Whether steps are captured, unless it turns out that they cannot be."""
        return self._refused is None

    @property
    def replays(self) -> bool:
        """Whether some step was captured."""
        return any(step.replaying for step in self._steps.values())

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        caches = (self.state.cache, self.state.memory)
        return sum(cache.row_bytes * cache.batch for cache in caches if cache is not None)

    @property
    def lag(self) -> int:
        """Tokens at the end of a text that a proposer's memory may lack."""
        return 0 if self.state.memory is None else self.length + 1

    def fits(self, batch: int, slots: int) -> bool:
        """Whether it has room for that many rows and positions."""
        return self.state.batch >= batch and self.slots >= slots

    def clear(self) -> None:
        """Frees all slots."""
        self.state.end(dict.fromkeys(range(self.state.batch), 1))

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
        if self.state.bias is None and any(row.sampling.bias for row in rows.values()):
            self.state = self.state.with_bias(self.target.vocab_size)
            self._views.clear()
            self._steps.clear()
        self.state.enter(rows)

    def read(self, parts: Sequence[PromptPart]) -> None:
        """Reads parts of prompts, in one forward pass if possible: all begin at position 0, or belong to one row.

        Rows whose prompts are complete are alive afterwards.
        """
        decoder = self.decoders[1]
        with self.running(compile=False):  # prompts of every length would be compiled anew
            if self.reads_while_decoding and tokens_of(parts) <= MAX_CAPTURED_READ:
                state, packed = self._packed(parts, CAPTURED_WIDTH)
                key = ("read", len(packed))
                if key not in self._steps:
                    self._steps[key] = self.captured(lambda: decoder.read(state, packed), known=self.replays)
                self._steps[key]()
                return
            from_start = all(part.start == 0 for part in parts)
            longest = max(part.stop - part.start for part in parts)
            width = longest if from_start or not self.target.tree_kernels else min(longest, READ_WIDTH)
            self.state.set_visible(max(part.stop for part in parts))
            whole = packed_parts(parts, self.state, width=width)
            decoder.read(self.state, whole.to(self.backend.device), from_start=from_start)

    def launch(
        self, rows: Mapping[int, Row], owners: Owners, committed: int, parts: Sequence[PromptPart] = ()
    ) -> PendingStep:
        """Starts a step of the rows in these slots, which also reads `parts` of other rows' prompts.

        `committed` is the largest number of cache slots that a row uses.
        """
        begin = time.perf_counter()
        if begin > self._read_at:
            self._between = begin - self._read_at
        sampler = sampler_of(rows)
        count = self.rounded(1 + max(rows))
        decoder = self.decoder_for(count)
        with self.running():
            state = self.view(count)
            reading = self._packed(parts, decoder.size) if parts else None
            if sampler.synchronizes:
                step: Callable[[], Emission] = lambda: decoder.step(state, sampler, reading)  # noqa: E731
                refused = True
            else:
                captured = self._step(count, decoder, sampler, reading)
                step, refused = captured, captured.refused is not None
            # what a captured step sees cannot grow with the text
            visible = committed + decoder.size if refused else state.cache.slots
            state.set_visible(visible)
            emitted = step()
            if not sampler.synchronizes and sampler.shared is None:
                self._refused = captured.refused  # what one step has shown is true of all
            return PendingStep.launched(owners, emitted, begin)

    def result(self, pending: PendingStep, *, waited: bool) -> StepResult:
        """Waits for a step.  `waited`: no other step ran at the same time, so that its duration is known."""
        result = pending.result()
        if waited:
            self._read_at = time.perf_counter()
            self._seconds = self._read_at - pending.begin
        return result

    @property
    def launches_ahead(self) -> bool:
        """Whether the next step should be launched before the results of the last one are read."""
        return self.replays and self._between > LAUNCH_AHEAD_SHARE * self._seconds

    def _packed(self, parts: Sequence[PromptPart], width: int) -> tuple[State, Tensor]:
        """The complete state, and parts of prompts in one of the sizes that are captured."""
        entries = sum(-(-(part.stop - part.start) // width) for part in parts)
        rounded = max(1 if width >= CAPTURED_WIDTH else 4, 1 << (entries - 1).bit_length())
        packed = packed_parts(parts, self.state, width=width, entries=rounded)
        key = (width, rounded)
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
            state = self.view(count)
            # a function that referred to the runner would form a cycle, which keeps its memory
            self._steps[key] = self.captured(lambda: decoder.step(state, sampler, reading), known=self.replays)
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


def _current_addresses(models: Sequence[nn.Module]) -> list[int]:
    """One address per model, which changes if the model is moved or converted."""
    return [next(chain(model.parameters(), model.buffers())).data_ptr() for model in models]
