"""What is measured, one unit after another: in turn, round by round, each kept the moment it is there.

Promises that methods that are compared are measured next to each other, in an order that turns from round to round, and
that a run that was killed goes on with the first unit that is missing.  Does not know what becomes of the figures.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from redrafter.bench.calls import Call, call, call_transformers
from redrafter.bench.clock import Run, by_transformers, follow, untimed
from redrafter.bench.contenders import THEIRS, Contender
from redrafter.bench.tasks import ALL, Tasks
from redrafter.decoding.settings import ONE_TEXT
from redrafter.engine.generate import stream
from redrafter.engine.request import request
from redrafter.errors import RedrafterError
from redrafter.evaluation.checking import parting
from redrafter.evaluation.profiling import StepProfiler
from redrafter.training.journal import Journal

Kind = Literal["calls", "decode", "together", "parts", "texts"]
Record = dict[str, Any]

WARM_UP = 16
"""New tokens of the call that nobody counts."""

REQUESTS = 8
"""Prompts at most of which complete calls are timed, each in a call of its own."""

GROUPS = 4
"""Calls of rows together at most, each with other prompts while there are some."""

REPEATS = 20
"""Times that a part of a step is timed."""


class Unit(NamedTuple):
    """One thing to measure; `calls`, `decode` and `together` once a round, the others once.

    `calls`: complete calls of `generate` that write `new_tokens` each, one prompt a call; `decode`: a category's
    prompts are written, rows enter and leave; `together`: so many rows that do not end; `parts`: a step, piece by
    piece; `texts`: what was written, held against what was written without a drafter.
    """

    kind: Kind
    method: str
    category: str
    temperature: float
    batch: int
    round: int
    new_tokens: int = 0
    """Of each of the `calls`; the others write as many as the command says."""


@dataclass(frozen=True)
class Asked:
    """What all units of a run have in common."""

    max_new_tokens: int
    seed: int
    compile: bool
    requests: int = REQUESTS
    """Prompts of complete calls at most."""

    def law(self, temperature: float) -> dict[str, Any]:
        """How tokens are chosen at a temperature, of which 0 is greedy decoding."""
        if not temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "seed": self.seed}


def turned(contenders: Sequence[str], number: int) -> list[str]:
    """Their order in a round: each comes first once in so many rounds."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def of_bench(
    contenders: Sequence[str],
    categories: Sequence[str],
    temperatures: Sequence[float],
    *,
    batch: int,
    batches: Sequence[int],
    rounds: int,
    answers: Sequence[int] = (),
    only_sampling: Collection[str] = (),
) -> list[Unit]:
    """The units of a comparison, in order; the first of the contenders is the one without a drafter.

    The longest of the `answers` comes first: transformers compiles its steps again for a longer cache. Those of
    `only_sampling` are not measured where decoding is greedy.
    """
    found: list[Unit] = []
    for number in range(rounds):
        order = turned(contenders, number)
        for temperature, length in itertools.product(temperatures, sorted(answers, reverse=True)):
            found += [Unit("calls", name, ALL, temperature, 1, number, length) for name in order]
        for temperature, category in itertools.product(temperatures, categories):
            found += [Unit("decode", name, category, temperature, batch, number) for name in order]
        for temperature, rows in itertools.product(temperatures, batches):
            found += [Unit("together", name, ALL, temperature, rows, number) for name in order]
    for temperature in temperatures:
        own = [name for name in contenders if name != THEIRS]
        found += [Unit("parts", name, ALL, temperature, batch, 0) for name in own]
        for category in categories:
            found += [Unit("texts", name, category, temperature, batch, 0) for name in own[1:]]
    return [unit for unit in found if unit.temperature or unit.method not in only_sampling]


def requests(tasks: Tasks, new_tokens: int, model: PreTrainedModel) -> list[list[int]]:
    """The prompts of complete calls: one of each category in turn, those that leave room for so many new tokens."""
    limit = context_of(model)
    return [one for one in tasks.mixed if limit is None or len(one) + new_tokens <= limit]


def context_of(model: PreTrainedModel) -> int | None:
    """Positions of the model, where its config says how many."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


@dataclass
class Runner:
    """Measures units of one model; `contenders` and `prompts` by their names."""

    model: PreTrainedModel
    contenders: Mapping[str, Contender]
    tasks: Tasks
    asked: Asked
    texts: dict[tuple[str, str, float, int], list[list[int]]] = field(default_factory=dict)
    """What was written in the first round, by method, category, temperature and batch."""
    _warm: set[tuple[Any, ...]] = field(default_factory=set)
    """What was run before anything was timed."""

    def measure(self, unit: Unit) -> Record:
        """The figures of a unit.  Raises RedrafterError where it cannot be measured."""
        if unit.kind == "parts":
            return self._parts(unit)
        if unit.kind == "texts":
            return self._held(unit)
        if unit.kind == "calls":
            return self._calls(unit)
        together = unit.kind == "together"
        prompts = self._groups(unit.batch) if together else self._prompts(unit.category)
        self._warm_up(unit, prompts)
        run, memory = self._with_memory(unit, prompts)
        found = run.told | ({"peak_memory_bytes": memory} if memory else {})
        if not unit.round and not together:
            found["texts"] = [run.texts[row] for row in range(len(prompts))]
        return found

    def remember(self, unit: Unit, found: Record) -> None:
        """Keeps what later units need of one that is measured."""
        if "texts" in found:
            self.texts[unit.method, unit.category, unit.temperature, unit.batch] = found["texts"]

    def _calls(self, unit: Unit) -> Record:
        """The times of complete calls, prompt by prompt.

        Before the first of them every prompt has had a short call, so that no time includes what is built on first use,
        and on CUDA one of full length, for which code is compiled.
        """
        prompts = requests(self.tasks, unit.new_tokens, self.model)[: self.asked.requests]
        law, one = self._law(unit.temperature), self.contenders[unit.method]

        def called(prompt: list[int], new_tokens: int) -> Call:
            if one.label == THEIRS:
                return call_transformers(self.model, prompt, new_tokens, **law)
            how = one.settings(1) | law | {"compile": self.asked.compile}
            return call(self.model, one.method, prompt, new_tokens, **how)

        warm = ("calls", unit.method, unit.temperature, unit.new_tokens)
        if warm not in self._warm:
            if self.model.device.type == "cuda":
                called(max(prompts, key=len), unit.new_tokens)
            for prompt in prompts:
                called(prompt, min(WARM_UP, unit.new_tokens))
            self._warm.add(warm)
        found = [called(prompt, unit.new_tokens) for prompt in prompts]
        return {
            "seconds": [one.seconds for one in found],
            "first_token_seconds": [one.first for one in found],
            "starting_seconds": [one.starting for one in found],
            "decoding_seconds": [one.decoding for one in found],
            "decoding_tokens": [one.tokens for one in found],
        }

    def _warm_up(self, unit: Unit, prompts: list[list[int]]) -> None:
        """Builds what is built on first use, so that no time includes it.

        The longest prompts write some tokens once for each way of decoding, and every prompt is read once by each
        method: libraries choose, load or compile kernels by the length of a prompt, which would count as the time of
        its first token.
        """
        together = unit.kind == "together"
        warm: tuple[Any, ...] = (unit.kind, unit.method, unit.temperature, unit.batch)
        if warm not in self._warm:
            longest = sorted(prompts, key=len)[-unit.batch :]
            # transformers compiles its steps for a cache of the length of the call
            new_tokens = self.asked.max_new_tokens
            self._run(unit, longest, new_tokens if unit.method == THEIRS else min(WARM_UP, new_tokens))
            self._warm.add(warm)
        warm = ("prompts", unit.method, unit.batch, together, unit.category)
        if warm not in self._warm:
            self._run(unit, prompts, 1)
            self._warm.add(warm)

    def _law(self, temperature: float) -> dict[str, Any]:
        """The same, and off what the model's own config may say of stop strings and of several texts."""
        return self.asked.law(temperature) | {"stop_strings": ()} | ONE_TEXT

    def _groups(self, rows: int) -> list[list[int]]:
        """Prompts of whole groups of so many rows."""
        groups = max(1, min(GROUPS, len(self.tasks.mixed) // rows))
        return self.tasks.repeated(groups * rows)

    def _prompts(self, category: str) -> list[list[int]]:
        return self.tasks.mixed if category == ALL else self.tasks.prompts[category]

    def _run(self, unit: Unit, prompts: list[list[int]], new_tokens: int) -> Run:
        law, together = self._law(unit.temperature), unit.kind == "together"
        one = self.contenders[unit.method]
        if one.label == THEIRS:
            ends = request(self.model, None, prompts, **law).ends
            skip = untimed(self.model.device)
            how: dict[str, Any] = {"batch": unit.batch, "ends": ends, "together": together, "skip": skip}
            return by_transformers(self.model, prompts, max_new_tokens=new_tokens, **how, **law)
        if together:  # a call for each group
            groups = [prompts[begin : begin + unit.batch] for begin in range(0, len(prompts), unit.batch)]
            return Run.joined([self._streamed(unit, group, new_tokens, eos_token_id=()) for group in groups])
        return self._streamed(unit, prompts, new_tokens)

    def _streamed(self, unit: Unit, prompts: list[list[int]], new_tokens: int, **more: Any) -> Run:
        one = self.contenders[unit.method]
        shape = one.shape(unit.batch)
        settings = one.settings(unit.batch) | self._law(unit.temperature) | more
        events = stream(
            self.model,
            one.method,
            prompts,
            batch_size=unit.batch,
            max_new_tokens=new_tokens,
            compile=self.asked.compile,
            **settings,
        )
        return follow(
            events,
            positions=shape.beam_length if shape else 0,
            skip=untimed(self.model.device),
            together=unit.kind == "together",
        )

    def _with_memory(self, unit: Unit, prompts: list[list[int]]) -> tuple[Run, int | None]:
        """A run, and on CUDA the memory that it needed, with the weights of the model and of this method alone."""
        device, one = self.model.device, self.contenders[unit.method]
        if device.type != "cuda":
            return self._run(unit, prompts, self.asked.max_new_tokens), None
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run = self._run(unit, prompts, self.asked.max_new_tokens)
        target = request(self.model, one.method, prompts[:1], **one.settings(unit.batch), **self._law(0.0)).target
        weights = sum(weight.nbytes for weight in self.model.parameters()) + one.bytes(target)
        return run, torch.cuda.max_memory_allocated(device) - before + weights

    def _parts(self, unit: Unit) -> Record:
        """Milliseconds of a step and of its parts, on rows as long as the texts are on average."""
        one, shape = self.contenders[unit.method], self.contenders[unit.method].shape(unit.batch)
        law = self._law(unit.temperature)
        written = [prompt + text for prompt, text in self._undrafted(unit)]
        if not written:
            raise RedrafterError("there are no texts to stand at.")
        limit = context_of(self.model)
        mean = sum(map(len, written)) // len(written)
        context = min(mean, limit or mean)
        tokens = itertools.cycle(itertools.chain.from_iterable(written))
        rows = [list(itertools.islice(tokens, context)) for _ in range(unit.batch)]
        asked = request(self.model, one.method, rows, **one.settings(unit.batch), **law)
        bench = StepProfiler(asked, one.method, repeats=REPEATS, compile=self.asked.compile)
        found: Record = {"context": context, "step_ms": bench.step_ms(shape), "draft_ms": 0.0, "nodes": 1}
        if shape is not None:
            found |= {"nodes": bench.tree(shape).size, "draft_ms": bench.draft_ms(shape)}
        return found | {"verify_ms": bench.verify_ms(found["nodes"])}

    def _undrafted(self, unit: Unit) -> Iterator[tuple[list[int], list[int]]]:
        """Prompts with what was written to them without a drafter."""
        alone = next(iter(self.contenders))
        for (method, category, temperature, batch), texts in self.texts.items():
            if (method, temperature, batch) == (alone, unit.temperature, unit.batch):
                yield from zip(self._prompts(category), texts, strict=True)

    def _held(self, unit: Unit) -> Record:
        """How many texts are equal, and where and by what margin the others part."""
        place = (unit.category, unit.temperature, unit.batch)
        plain, drafted = (self.texts.get((name, *place)) for name in (next(iter(self.contenders)), unit.method))
        if plain is None or drafted is None:
            raise RedrafterError("there are no texts to compare.")
        settings = self._law(unit.temperature) | {"max_new_tokens": self.asked.max_new_tokens}
        prompts = self._prompts(unit.category)
        found = [
            parting(self.model, prompts, row, one, other, settings)
            for row, (one, other) in enumerate(zip(plain, drafted, strict=True))
            if one != other
        ]
        return {
            "texts_compared": len(plain),
            "parted": [asdict(one) | {"explained": one.explained} for one in found],
        }


def run(
    units: Iterable[Unit],
    runner: Runner,
    journal: Journal,
    tell: Callable[[Unit], None],
    seconds: float | None = None,
) -> tuple[list[Record], list[str]]:
    """All units measured or read from the journal, and what failed, of which nothing more is tried.

    `tell` hears of every unit before it is measured.  After `seconds` none is begun.  Raises RedrafterError where the
    journal cannot be written.
    """
    begin, late = time.monotonic(), 0
    journal.open()
    with journal.path.open(encoding="utf-8") as lines:
        there = [json.loads(line) for line in lines]
    known = {Unit(**{name: one[name] for name in Unit._fields}): one for one in there}
    records: list[Record] = []
    failed: dict[Unit, str] = {}
    for unit in units:
        found = known.get(unit)
        tell(unit)
        if found is None:
            alike = unit._replace(round=0)  # the same in another round
            if alike in failed:
                continue
            if seconds is not None and time.monotonic() - begin >= seconds:
                late += 1
                continue
            try:
                found = unit._asdict() | runner.measure(unit)
            except RedrafterError as error:  # the others are still wanted
                where = "" if unit.category == ALL else f" on {unit.category}"
                where += f" in calls of {unit.new_tokens} tokens" if unit.new_tokens else ""
                failed[alike] = f"{unit.method}{where}, temperature {unit.temperature:g}, {unit.batch} rows: {error}"
                continue
            journal.checkpoint([found], done=journal.done + 1, source="", counts=Counter())
        runner.remember(unit, found)
        records.append(found)
    journal.close()
    unbegun = f"{late} measurements, for which no time was left; the same command goes on with them."
    return records, [*failed.values(), *([unbegun] if late else [])]
