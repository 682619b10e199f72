"""Where the time of a step goes: the engine's own functions, timed one by one and together.

Guarantees medians of the code that decoding runs, on rows that are filled to their context.  On CUDA each function is
replayed as a graph, so device time alone is measured.  Does not know files, prompts or which shape is best.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape, counted
from redrafter.core.tree import DraftTree, chain
from redrafter.decoding.step import Decoder, Emission
from redrafter.decoding.verify import walk
from redrafter.engine.clock import milliseconds
from redrafter.engine.request import Request, Task
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer
from redrafter.targets.target import Target
from redrafter.utils.memory import within_memory


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read and written, of one pass over a large array: the upper limit for a step.

    Not a plain copy, for which a graph uses the slower copy engine.
    """
    size = 2**28  # larger than any cache
    if device.type == "cuda":
        size = min(2**30, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    copy = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: torch.neg(source, out=copy), device, repeats) * 1e3


def device_name(device: torch.device) -> str:
    """The hardware, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {counted(torch.get_num_threads(), 'thread')}"
    return device.type


class StepProfiler:
    """Times steps and their parts for rows of one context.  Every measurement starts from the same state."""

    def __init__(
        self, request: Request, drafter: Method | None = None, *, nodes: int = 1, repeats: int, compile: bool = False
    ):
        """Uses the prompts of a request, which must have equal lengths.

        `drafter` is None if only autoregressive steps are timed.  `nodes` is the largest tree that will be timed.
        """
        self.target: Target = request.target
        self.drafter, self.repeats, self._compile = drafter, repeats, compile
        self._rows, self._sampler = request.rows, request.sampler
        self.batch, self.context = len(request.rows), len(request.rows[0].prompt)
        self._nodes = nodes
        self._runners: dict[DraftShape | None, Runner] = {}

    def runner(self, shape: DraftShape | None) -> Runner:
        """A runner for a shape (None: autoregressive) with the prompts in its cache.

        Raises RedrafterError if the drafter does not support the shape or memory does not suffice.
        """
        if shape not in self._runners:
            proposer = None
            if shape is not None:
                proposer = None if self.drafter is None else self.drafter.proposer(self.target, shape)
                if proposer is None:
                    raise RedrafterError("A length of 0 drafts nothing that could be timed.")
                # other shapes release their memory
                self._runners = {key: runner for key, runner in self._runners.items() if key is None}
            self._runners[shape] = self._filled(Decoder(self.target, proposer))
        return self._runners[shape]

    def _filled(self, decoder: Decoder) -> Runner:
        """A runner that has read the prompts.  All runners share one cache of the target if it is large enough."""
        nodes = max(self._nodes, decoder.size, decoder.length + 1)
        slots = self.context + 2 * nodes  # a step writes the tokens of its path behind its nodes
        shared = self._runners[None].state.cache if None in self._runners else None
        if shared is not None and shared.slots < slots:
            shared = None
        with within_memory(self.target.device, self._remedy):
            runner = Runner({1: decoder}, batch=self.batch, slots=slots, compile=self._compile, cache=shared)
            scheduler = Scheduler(runner)
            for row in self._rows:
                scheduler.add(Task(row, frozenset(), []))
            scheduler.read_prompts()
        with torch.inference_mode():
            runner.state.rows.alive.zero_()  # steps leave the rows where they are
        return runner

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads.  Of an embedding that is not the output head, it reads few rows."""
        embedding = self.target.embed.weight
        read = [weight for weight in self.target.model.parameters() if weight is not embedding]
        if embedding is getattr(self.target.head, "weight", None):
            read.append(embedding)
        return sum(weight.nbytes for weight in read)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the context."""
        return sum(pool.nbytes // pool.shape[3] for pool in self.runner(None).state.cache.pools) * self.context

    def proposer(self, shape: DraftShape) -> Proposer:
        """The proposer of a shape, as decoding uses it."""
        proposer = self.runner(shape).decoders[1].proposer
        assert proposer is not None
        return proposer

    def step_ms(self, shape: DraftShape | None = None) -> float:
        """A complete step; without a shape, an autoregressive one."""
        runner = self.runner(shape)
        state = runner.state
        context = state.context.clone()

        def step() -> Emission:
            state.context.copy_(context)  # the rows' positions do not change, because they are not alive
            return runner.decoders[1].step(state, self._sampler)

        duration = self._timed(step, runner, runner.decoders[1].size)
        with torch.inference_mode():
            state.context.copy_(context)  # the next measurement starts from the same state
        return duration

    def verify_ms(self, nodes: int) -> float:
        """The target's forward pass over a chain of random tokens.  The form of the tree does not matter."""
        runner = self.runner(None)
        state = runner.state
        tokens = torch.randint(self.target.vocab_size, (self.batch, nodes), device=self.target.device)
        tree = chain(tokens)
        return self._timed(lambda: self.target.forward(tree, state.rows.length, state.cache), runner, nodes)

    def draft_ms(self, shape: DraftShape) -> float:
        """From the target's states to the tree."""
        runner, noise = self.runner(shape), self._noise(shape)
        proposer, state = self.proposer(shape), runner.state
        return self._timed(
            lambda: proposer.propose(state.memory, state.rows, state.context, noise), runner, proposer.size
        )

    def rest_ms(self, shape: DraftShape) -> float:
        """Sampling noise, the target's tokens, the walk, and the moves in the cache."""
        runner, tree = self.runner(shape), self.tree(shape)
        rows, cache = runner.state.rows, runner.state.cache
        size = (self.batch, tree.size, self.target.vocab_size)
        logits = torch.randn(size, device=self.target.device).to(self.target.dtype)

        def rest() -> None:
            choice = self._sampler.choose(self._noise(shape), tree, logits, rows)
            path, _ = walk(tree, choice.tokens, length=shape.depth)
            cache.keep(path, rows.length)

        return self._timed(rest, runner, tree.size)

    def tree(self, shape: DraftShape) -> DraftTree:
        """A draft as the target receives it."""
        runner = self.runner(shape)
        runner.state.set_visible(self.context + runner.decoders[1].size)
        with runner.running():
            return runner.decoders[1].draft(runner.state, self._noise(shape))

    def _noise(self, shape: DraftShape) -> SamplingNoise:
        rows, depths = self.runner(shape).state.rows, shape.depth + 1
        return self._sampler.noise(rows, depths=depths, vocabulary=self.target.vocab_size)

    def _timed(self, function: Callable[[], object], runner: Runner, nodes: int) -> float:
        runner.state.set_visible(self.context + nodes)
        with within_memory(self.target.device, self._remedy):
            return runner.milliseconds(function, self.repeats)

    @property
    def _remedy(self) -> str:
        return f"measure fewer rows (now {self.batch}), a shorter context or smaller drafts"


@dataclass(frozen=True)
class Measurement:
    """A part of the step, the size that it was measured for, and its median duration."""

    name: str
    size: int | None
    milliseconds: float


def measurements(
    profiler: StepProfiler, shape: DraftShape, *, nodes: Sequence[int], widths: Sequence[int]
) -> Iterator[Measurement]:
    """The autoregressive step, the parts of a drafted step and last the complete drafted step, each when measured."""
    yield Measurement("autoregressive step", None, profiler.step_ms())
    for count in nodes:
        yield Measurement("verify, nodes", count, profiler.verify_ms(count))
    for width in widths:
        yield Measurement("draft, beams", width, profiler.draft_ms(shape.model_copy(update={"beam_width": width})))
    yield Measurement("rest", None, profiler.rest_ms(shape))
    yield Measurement("drafted step", None, profiler.step_ms(shape))
