"""Where the time of a step goes: the engine's own functions, timed one by one and whole.

Promises medians of what decoding runs (`step`, `Target.forward`, `Proposer.propose`, the sampler, `walk`,
`SlotCache.keep`), on rows that really stand at their context; on CUDA each replayed as a graph, so of the device alone.
Does not know files, prompts or which shape is best.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape, counted
from redrafter.core.tree import DraftTree, chain
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.step import Emission, State, empty, prefill, step
from redrafter.decoding.verify import walk
from redrafter.engine.compiled import compiled, of_any_length
from redrafter.engine.cuda_graph import Captured
from redrafter.engine.onednn_linear import optimize_linears
from redrafter.engine.request import Request
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer
from redrafter.targets.target import Target
from redrafter.utils.memory import within_memory

WARM_UP = 5
"""Calls before the first that is timed."""


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call: on CUDA of a replay, between events; elsewhere as it is called, by the clock.

    Raises RedrafterError for what cannot be replayed.
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
            raise RedrafterError(f"Nothing can be timed as a CUDA graph: {captured.refused}.")
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


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, by one pass over a large array: what no step can exceed.

    Not a plain copy, which a graph leaves to the slower copy engine.
    """
    size = 2**28  # far beyond any cache
    if device.type == "cuda":
        size = min(2**30, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    copy = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: torch.neg(source, out=copy), device, repeats) * 1e3


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {counted(torch.get_num_threads(), 'thread')}"
    return device.type


@dataclass(frozen=True)
class Bench:
    """Rows of one context, ready for a step; every measurement begins at the same place again."""

    target: Target
    drafter: Method | None
    """None for autoregressive steps alone."""
    sampler: Sampler
    state: State
    context: int
    """Tokens of each row in the cache."""
    repeats: int
    layers: Sequence[nn.Module]
    """Those of the target that are compiled."""

    @classmethod
    def of(
        cls,
        asked: Request,
        drafter: Method | None,
        shapes: Iterable[DraftShape] = (),
        *,
        nodes: int = 1,
        repeats: int,
        compile: bool = False,
    ) -> Bench:
        """Runs the prompts of a call, which are of one length.

        There is room for drafts in the call's own shape and in others, `shapes`, and for trees of so many `nodes`.
        """
        target, rows = asked.target, asked.rows
        drafts = [asked.proposer]
        if drafter is not None:
            if asked.proposer is None:
                drafts = [drafter.proposer(target, *drafter.drafting(0))]
            drafts += [drafter.proposer(target, one.beam_width, one.beam_length, one.node_budget) for one in shapes]
        made = [one for one in drafts if one is not None]
        reach = max([nodes, *(max(one.size, one.length + 1) for one in made)])
        sampler = Sampler(asked.sampler.do_sample, asked.sampler.processors[:1])
        context = len(rows[0].prompt)
        slots = context + 2 * reach  # a step writes the path's tokens where its nodes end
        proposer = max(made, key=lambda one: one.positions, default=None)  # the others see the last of its positions
        with within_memory(target.device, _remedy(len(rows))), torch.inference_mode():
            state = empty(target, proposer, batch=len(rows), slots=slots)
            prefill(target, proposer, sampler, rows, state)
            state.place.alive.zero_()  # so that no step leads on from where they stand
        optimize_linears(target.module, captured=target.device.type == "cuda")
        layers = target.decoder_layers if compile and target.packs else []
        if layers:
            of_any_length(state.cache)
        return cls(target, drafter, sampler, state, context, repeats, layers)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.state.context)

    @property
    def weight_bytes(self) -> int:
        """Of all weights that a step reads; of an embedding that is not also the output head it reads a few rows."""
        looked_up = self.target.embed.weight
        read = [one for one in self.target.model.parameters() if one is not looked_up]
        if looked_up is getattr(self.target.head, "weight", None):
            read.append(looked_up)
        return sum(one.nbytes for one in read)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of the context."""
        return sum(pool.nbytes // pool.shape[3] for pool in self.state.cache.pools) * self.context

    def proposer(self, shape: DraftShape) -> Proposer:
        """What drafts in this shape, as fast as decoding has it.  Raises RedrafterError where the method cannot."""
        told = (shape.beam_width, shape.beam_length, shape.node_budget)
        found = None if self.drafter is None else self.drafter.proposer(self.target, *told)
        if found is None:
            raise RedrafterError("A length of 0 drafts nothing that could be timed.")
        optimize_linears(*found.modules, captured=self.target.device.type == "cuda")
        return found.quickened()

    def _ready(self, shape: DraftShape) -> tuple[Proposer, State]:
        """What drafts in this shape, and the rows with a memory and positions as many as it has in decoding."""
        proposer = self.proposer(shape)
        memory = proposer.memory(batch=self.batch, slots=self.state.cache.slots)
        if memory is not None and self.state.memory is not None:
            memory.insert_rows([*range(self.batch)], self.state.memory)
        context = self.state.context[:, -proposer.positions :].clone()
        return proposer, replace(self.state, memory=memory, context=context)

    def step_ms(self, shape: DraftShape | None = None) -> float:
        """A whole step; without a shape the autoregressive one."""
        proposer, state = (None, self.state) if shape is None else self._ready(shape)
        context = state.context.clone()

        def again() -> Emission:
            state.context.copy_(context)  # where the rows stand does not change, for they are not alive
            return step(self.target, proposer, self.sampler, state)

        return self._timed(again, state, 1 if proposer is None else proposer.size)

    def verify_ms(self, nodes: int) -> float:
        """The target's run over a chain of random tokens; what the tree looks like is the same work."""
        state = self.state
        tokens = torch.randint(self.target.vocab_size, (self.batch, nodes), device=self.target.device)
        tree = chain(tokens)
        return self._timed(lambda: self.target.forward(tree, state.place.length, state.cache), state, nodes)

    def draft_ms(self, shape: DraftShape) -> float:
        """From the target's states to the tree."""
        draw, (proposer, state) = self._draw(shape), self._ready(shape)
        return self._timed(
            lambda: proposer.propose(state.memory, state.place, state.context, draw), state, proposer.size
        )

    def rest_ms(self, shape: DraftShape) -> float:
        """Noise and choices, the walk, and what is kept of the cache."""
        place, cache = self.state.place, self.state.cache
        tree = self.tree(shape)
        size = (self.batch, tree.size, self.target.vocab_size)
        logits = torch.randn(size, device=self.target.device).to(self.target.dtype)

        def rest() -> None:
            choice = self.sampler.choose(self._draw(shape), tree, logits, place)
            path, _ = walk(tree, choice.tokens, length=shape.beam_length)
            cache.keep(path, place.length)

        return self._timed(rest, self.state, tree.size)

    def tree(self, shape: DraftShape) -> DraftTree:
        """A draft as the target would be given it."""
        proposer, state = self._ready(shape)
        state.set_visible(self.context + proposer.size)
        with torch.inference_mode():
            tree = proposer.propose(state.memory, state.place, state.context, self._draw(shape))
        return tree.trimmed() if self.target.device.type == "cpu" else tree  # as `step` does

    def _draw(self, shape: DraftShape) -> SamplingNoise:
        return self.sampler.draw(self.state.place, depths=shape.beam_length + 1, vocabulary=self.target.vocab_size)

    def _timed(self, function: Callable[[], object], state: State, nodes: int) -> float:
        state.set_visible(self.context + nodes)
        with within_memory(self.target.device, _remedy(self.batch)), compiled(self.layers):
            return milliseconds(function, self.target.device, self.repeats)


def _remedy(batch: int) -> str:
    return f"measure fewer rows (now {batch}), a shorter context or smaller drafts"


@dataclass(frozen=True)
class Piece:
    """A part of the step, the number that it was measured for, and its median time."""

    name: str
    size: int | None
    milliseconds: float


def pieces(bench: Bench, shape: DraftShape, *, nodes: Sequence[int], widths: Sequence[int]) -> Iterator[Piece]:
    """The autoregressive step first, then its parts and last the whole drafted step, each as it is measured."""
    yield Piece("autoregressive step", None, bench.step_ms())
    for count in nodes:
        yield Piece("verify, nodes", count, bench.verify_ms(count))
    for width in widths:
        yield Piece("draft, beams", width, bench.draft_ms(shape.model_copy(update={"beam_width": width})))
    yield Piece("rest", None, bench.rest_ms(shape))
    yield Piece("drafted step", None, bench.step_ms(shape))
