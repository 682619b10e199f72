"""Measures the units of a benchmark on one model.

Guarantees that calls before the first timed one build what is built on first use, so that no time includes it.  Does
not know the order of the units nor how their records are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from redrafter.bench.methods import TRANSFORMERS, BenchMethod
from redrafter.bench.tasks import ALL, Tasks
from redrafter.bench.timing import (
    TimedCall,
    TimedRun,
    time_call,
    time_stream,
    time_transformers,
    time_transformers_call,
    untimed_steps,
)
from redrafter.bench.units import Record, Unit
from redrafter.decoding.settings import ONE_TEXT
from redrafter.engine.generate import stream
from redrafter.engine.request import request
from redrafter.errors import RedrafterError
from redrafter.evaluation.checking import find_divergence
from redrafter.evaluation.profiling import StepProfiler

MAX_REQUESTS = 8
"""Default limit on the prompts of complete calls."""

WARM_UP_TOKENS = 16
"""New tokens of calls that are not timed."""

MAX_GROUPS = 4
"""Limit on the calls of a `together` unit."""

REPEATS = 20
"""Measurements of each part of a step."""


@dataclass(frozen=True)
class RunOptions:
    """Options that apply to all units of a run."""

    max_new_tokens: int
    seed: int = 0
    compile: bool = False
    requests: int = MAX_REQUESTS
    """Limit on the prompts of complete calls."""

    def sampling(self, temperature: float) -> dict[str, Any]:
        """Settings of `generate` at a temperature; 0 is greedy decoding.

        They also disable stop strings and multiple sequences, which the model's generation_config may enable.
        """
        settings: dict[str, Any] = {"do_sample": False}
        if temperature:
            settings = {"do_sample": True, "temperature": temperature, "seed": self.seed}
        return settings | {"stop_strings": ()} | ONE_TEXT


def context_length(model: PreTrainedModel) -> int | None:
    """The model's maximum number of positions, if its config has one."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def call_prompts(tasks: Tasks, new_tokens: int, model: PreTrainedModel) -> list[list[int]]:
    """Prompts of complete calls: those that leave room for `new_tokens`, alternating between the categories."""
    limit = context_length(model)
    return [prompt for prompt in tasks.mixed if limit is None or len(prompt) + new_tokens <= limit]


@dataclass
class Runner:
    """Measures units; `methods` by label."""

    model: PreTrainedModel
    methods: Mapping[str, BenchMethod]
    tasks: Tasks
    options: RunOptions
    texts: dict[tuple[str, str, float, int], list[list[int]]] = field(default_factory=dict)
    """Texts of the first round, by method, category, temperature and batch."""
    _warm: set[tuple[Any, ...]] = field(default_factory=set)
    """Keys of the warm-up calls that were made."""

    def measure(self, unit: Unit) -> Record:
        """The figures of a unit.  Raises RedrafterError if it cannot be measured."""
        if unit.kind == "parts":
            return self._measure_parts(unit)
        if unit.kind == "texts":
            return self._compare_texts(unit)
        if unit.kind == "calls":
            return self._measure_calls(unit)
        prompts = self._groups(unit.batch) if unit.kind == "together" else self._prompts(unit.category)
        self._warm_up(unit, prompts)
        run, memory = self._run_with_memory(unit, prompts)
        record = run.record() | ({"peak_memory_bytes": memory} if memory else {})
        if not unit.round and unit.kind == "decode":
            record["texts"] = [run.texts[row] for row in range(len(prompts))]
        return record

    def remember(self, unit: Unit, record: Record) -> None:
        """Keeps the texts of a record, which the units `texts` and `parts` need."""
        if "texts" in record:
            self.texts[unit.method, unit.category, unit.temperature, unit.batch] = record["texts"]

    def _is_new(self, *key: Any) -> bool:
        new = key not in self._warm
        self._warm.add(key)
        return new

    def _measure_calls(self, unit: Unit) -> Record:
        """Times complete calls, after a short call of each prompt and, on CUDA, one of full length."""
        prompts = call_prompts(self.tasks, unit.new_tokens, self.model)[: self.options.requests]
        sampling, method = self.options.sampling(unit.temperature), self.methods[unit.method]

        def call(prompt: list[int], new_tokens: int) -> TimedCall:
            if method.label == TRANSFORMERS:
                return time_transformers_call(self.model, prompt, new_tokens, **sampling)
            settings = method.settings(1) | sampling | {"compile": self.options.compile}
            return time_call(self.model, method.method, prompt, new_tokens, **settings)

        if self._is_new("calls", unit.method, unit.temperature, unit.new_tokens):
            if self.model.device.type == "cuda":
                call(max(prompts, key=len), unit.new_tokens)
            for prompt in prompts:
                call(prompt, min(WARM_UP_TOKENS, unit.new_tokens))
        calls = [call(prompt, unit.new_tokens) for prompt in prompts]
        return {
            "seconds": [call.seconds for call in calls],
            "first_token_seconds": [call.first for call in calls],
            "starting_seconds": [call.startup for call in calls],
            "decoding_seconds": [call.decoding for call in calls],
            "decoding_tokens": [call.tokens for call in calls],
        }

    def _warm_up(self, unit: Unit, prompts: list[list[int]]) -> None:
        """Generates some tokens for the longest prompts, and reads each prompt once.

        Libraries choose, load or compile kernels by the length of a prompt, which would count as the time of its first
        token.
        """
        if self._is_new(unit.kind, unit.method, unit.temperature, unit.batch):
            longest = sorted(prompts, key=len)[-unit.batch :]
            new_tokens = self.options.max_new_tokens
            if unit.method != TRANSFORMERS:  # which compiles its steps for the cache length of the call
                new_tokens = min(WARM_UP_TOKENS, new_tokens)
            self._run(unit, longest, new_tokens)
        if self._is_new("prompts", unit.method, unit.batch, unit.kind, unit.category):
            self._run(unit, prompts, 1)

    def _groups(self, batch: int) -> list[list[int]]:
        """Prompts of complete batches."""
        count = max(1, min(MAX_GROUPS, len(self.tasks.mixed) // batch))
        return self.tasks.repeated(count * batch)

    def _prompts(self, category: str) -> list[list[int]]:
        return self.tasks.mixed if category == ALL else self.tasks.prompts[category]

    def _run(self, unit: Unit, prompts: list[list[int]], new_tokens: int) -> TimedRun:
        sampling, fixed_batch = self.options.sampling(unit.temperature), unit.kind == "together"
        if unit.method == TRANSFORMERS:
            return time_transformers(
                self.model,
                prompts,
                max_new_tokens=new_tokens,
                batch=unit.batch,
                ends=request(self.model, None, prompts, **sampling).tasks[0].ends,
                fixed_batch=fixed_batch,
                skip=untimed_steps(self.model.device),
                **sampling,
            )
        if not fixed_batch:
            return self._run_stream(unit, prompts, new_tokens)
        groups = [prompts[begin : begin + unit.batch] for begin in range(0, len(prompts), unit.batch)]
        return TimedRun.concatenated([self._run_stream(unit, group, new_tokens, eos_token_id=()) for group in groups])

    def _run_stream(self, unit: Unit, prompts: list[list[int]], new_tokens: int, **settings: Any) -> TimedRun:
        method = self.methods[unit.method]
        shape = method.shape(unit.batch)
        settings |= method.settings(unit.batch) | self.options.sampling(unit.temperature)
        settings |= {"batch_size": unit.batch, "max_new_tokens": new_tokens, "compile": self.options.compile}
        return time_stream(
            stream(self.model, method.method, prompts, **settings),
            positions=shape.depth if shape else 0,
            skip=untimed_steps(self.model.device),
            fixed_batch=unit.kind == "together",
        )

    def _run_with_memory(self, unit: Unit, prompts: list[list[int]]) -> tuple[TimedRun, int | None]:
        """A run and, on CUDA, its peak memory including the weights of the model and of this method only."""
        device, method = self.model.device, self.methods[unit.method]
        if device.type != "cuda":
            return self._run(unit, prompts, self.options.max_new_tokens), None
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run = self._run(unit, prompts, self.options.max_new_tokens)
        settings = method.settings(unit.batch) | self.options.sampling(0.0)
        target = request(self.model, method.method, prompts[:1], **settings).target
        weights = sum(weight.nbytes for weight in self.model.parameters()) + method.num_bytes(target)
        return run, torch.cuda.max_memory_allocated(device) - before + weights

    def _measure_parts(self, unit: Unit) -> Record:
        """Milliseconds of a step and of its parts, at the average length of the texts."""
        method, shape = self.methods[unit.method], self.methods[unit.method].shape(unit.batch)
        texts = [prompt + text for prompt, text in self._undrafted_texts(unit)]
        if not texts:
            raise RedrafterError("there are no texts that give the context length.")
        mean = sum(map(len, texts)) // len(texts)
        context = min(mean, context_length(self.model) or mean)
        tokens = itertools.cycle(itertools.chain.from_iterable(texts))
        rows = [list(itertools.islice(tokens, context)) for _ in range(unit.batch)]
        settings = method.settings(unit.batch) | self.options.sampling(unit.temperature)
        parsed = request(self.model, method.method, rows, **settings)
        profiler = StepProfiler(parsed, method.method, repeats=REPEATS, compile=self.options.compile)
        record: Record = {"context": context, "step_ms": profiler.step_ms(shape), "draft_ms": 0.0, "nodes": 1}
        if shape is not None:
            record |= {"nodes": profiler.tree(shape).size, "draft_ms": profiler.draft_ms(shape)}
        return record | {"verify_ms": profiler.verify_ms(record["nodes"])}

    def _undrafted_texts(self, unit: Unit) -> Iterator[tuple[list[int], list[int]]]:
        """Prompts and the texts that were generated for them without a drafter."""
        undrafted = next(iter(self.methods))
        for (method, category, temperature, batch), texts in self.texts.items():
            if (method, temperature, batch) == (undrafted, unit.temperature, unit.batch):
                yield from zip(self._prompts(category), texts, strict=True)

    def _compare_texts(self, unit: Unit) -> Record:
        """The number of texts, and where and by which margin they diverge from those without a drafter."""
        key = (unit.category, unit.temperature, unit.batch)
        plain, drafted = (self.texts.get((name, *key)) for name in (next(iter(self.methods)), unit.method))
        if plain is None or drafted is None:
            raise RedrafterError("there are no texts to compare.")
        settings = self.options.sampling(unit.temperature) | {"max_new_tokens": self.options.max_new_tokens}
        prompts = self._prompts(unit.category)
        divergences = [
            find_divergence(self.model, prompts, row, expected, text, settings)
            for row, (expected, text) in enumerate(zip(plain, drafted, strict=True))
            if expected != text
        ]
        return {
            "texts_compared": len(plain),
            "parted": [asdict(one) | {"explained": one.explained} for one in divergences],
        }
