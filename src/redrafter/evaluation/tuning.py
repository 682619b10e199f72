"""The fastest shape of a draft for each batch size, on this machine and on a target's own text.

The times of the parts of a step choose a few candidates.  Complete calls of `generate`, drafted and undrafted in turn,
decide: a shape is kept only if its gain exceeds the spread of those pairs.  Knows nothing about how either is printed.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redrafter.core.shapes import DraftShape
from redrafter.data.examples import Row
from redrafter.decoding.settings import ONE_TEXT
from redrafter.engine.generate import generate
from redrafter.engine.request import Request, request
from redrafter.engine.results import Finished
from redrafter.errors import RedrafterError
from redrafter.evaluation.acceptance import Acceptance, answered, drafted_everywhere, walked
from redrafter.evaluation.profiling import Bench
from redrafter.heads.config import flat
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.proposers import Method
from redrafter.proposers.loading import KINDS
from redrafter.proposers.trees import num_candidates
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

PAYS = 1.03
"""The least speed-up over undrafted calls for which drafting is switched on."""

TOGETHER = 8
"""Rows that are written and drafted at together, to measure acceptance."""

FINALISTS = 3
"""Shapes that are tried in complete calls; the sums of their parts choose them."""

SCREENED = 2
"""Complete calls of each finalist, of which the fastest goes on."""

PAIRS = 9
"""Pairs of a drafted and an undrafted call, of which one may be an outlier within CONFIDENCE."""

CONFIDENCE = 0.95
"""How often the interval of a speed-up holds the true median."""

ESTIMATED = 16
"""New tokens of the calls from which the time of a tuning is estimated."""

Speed = Callable[[DraftShape | None, int], float]
"""Tokens a second of the complete call of a number, in a shape or, with None, undrafted."""


@dataclass(frozen=True)
class Tuned:
    """What was found for a batch size."""

    candidate: DraftShape
    """The fastest of the shapes that draft."""
    tokens_per_step: float
    """Of one row, with the candidate."""
    drafted: Sequence[float]
    """Tokens a second of all rows in its complete calls."""
    undrafted: Sequence[float]
    """The same without drafting, each call right beside the drafted one of the same prompts."""

    @property
    def ratios(self) -> list[float]:
        """Of each pair."""
        return [one / other for one, other in zip(self.drafted, self.undrafted, strict=True)]

    @property
    def speed_up(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Between which the true median lies, with CONFIDENCE."""
        return interval(self.ratios)

    @property
    def pays(self) -> bool:
        """Whether drafting is faster by more than the pairs' spread, and by enough to be worth it."""
        return self.speed_up >= PAYS and self.interval[0] > 1

    @property
    def shape(self) -> DraftShape:
        """What is kept: the candidate, or decoding without drafting."""
        off = DraftShape(batch=self.candidate.batch, beam_width=1, beam_length=0)
        return self.candidate if self.pays else off


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the true median, with CONFIDENCE at least, whatever the values' distribution.

    It lies between two of the sorted values: fewer than k of n independent values lie below the median with a
    probability that the binomial distribution gives.  Too few values have no bounds.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0  # values left out at each end, and the probability that so few lie beyond the median
    while outside < count:
        below += math.comb(count, outside) / 2**count
        if below > (1 - CONFIDENCE) / 2:
            break
        outside += 1
    return (ordered[outside - 1], ordered[count - outside]) if outside else (-math.inf, math.inf)


def shapes(widths: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]) -> list[DraftShape]:
    """CompleteConfig beams of every width and length, and every budget that cuts what their search weighs."""
    found = []
    for width, length in itertools.product(widths, lengths):
        for budget in (None, *budgets):
            if budget is None or length < budget < num_candidates(width, length):
                found.append(DraftShape(beam_width=width, beam_length=length, node_budget=budget))
    return found


@dataclass(frozen=True)
class Texts:
    """A target's own texts, and how it was asked for them."""

    model: nn.Module
    drafter: Method
    settings: dict[str, Any]
    asked: Request
    rows: list[Row]

    @classmethod
    def written(
        cls,
        model: nn.Module,
        drafter: Method,
        prompts: list[list[int]],
        *,
        on_row: Callable[[Finished], object] | None = None,
        **settings: Any,
    ) -> Texts:
        """Lets the model write from the prompts, without the drafter; `on_row` is called with each text.

        Raises RedrafterError for bad prompts.
        """
        settings |= ONE_TEXT
        if settings.get("do_sample"):
            settings.setdefault("seed", 0)  # every shape drafts for the same draws
        asked = request(model, drafter, prompts, **settings)
        new = generate(model, None, prompts, batch_size=TOGETHER, on_row=on_row, **settings).new_tokens
        return cls(model, drafter, settings, asked, answered(asked, new))

    @property
    def length(self) -> int:
        """Tokens of a text, on average."""
        mean = sum(len(row.input_ids) for row in self.rows) // len(self.rows)
        return min(mean, self.asked.target.context_length or mean)

    def again(self, batch: int, length: int) -> Request:
        """A call of `batch` rows of `length` tokens, cut from the texts one after another."""
        tokens = itertools.cycle([token for row in self.rows for token in row.input_ids])
        rows = [list(itertools.islice(tokens, length)) for _ in range(batch)]
        return request(self.model, self.drafter, rows, **self.settings)

    def tokens_per_second(self, shape: DraftShape | None, number: int, *, batch: int, compile: bool) -> float:
        """Of one complete call of `generate` with the next `batch` prompts; undrafted without a shape."""
        prompts = [row.prompt for row in self.asked.rows]
        own = [prompts[(number * batch + row) % len(prompts)] for row in range(batch)]
        told = {} if shape is None else shape.model_dump(exclude={"batch"})
        begin = time.perf_counter()
        drafter = None if shape is None else self.drafter
        tokens = generate(self.model, drafter, own, compile=compile, **told, **self.settings).stats.tokens
        return tokens / (time.perf_counter() - begin)

    def tokens_per_step(self, shape: DraftShape) -> float:
        """What decoding that writes these texts writes in a step, the prompts' own runs not counted."""
        told = (shape.beam_width, shape.beam_length, shape.node_budget)
        proposer = self.drafter.proposer(self.asked.target, *told)
        assert proposer is not None
        verdicts = drafted_everywhere(
            self.asked.target,
            proposer,
            self.rows,
            sampler=self.asked.sampler,
            seeds=[row.seed for row in self.asked.rows],
            batch_size=TOGETHER,
        )
        found = torch.cat([walked(one) for one in verdicts])
        return Acceptance.of(found, shape.beam_length).mean_acceptance_length


def promising(bench: Bench, tokens_per_step: Mapping[DraftShape, float]) -> list[DraftShape]:
    """The FINALISTS of the shapes by an estimate: what each writes in a step, over the sum of its parts' times.

    A part is timed once for all shapes in which it differs little.
    """
    known: dict[tuple[Any, ...], float] = {}

    def once(key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        if key not in known:
            known[key] = measure()
        return known[key]

    def parts(shape: DraftShape) -> float:
        nodes, length, whole = bench.tree(shape).size, shape.beam_length, shape.node_budget is None
        return (
            once(("draft", shape.beam_width, length, whole), lambda: bench.draft_ms(shape))
            + once(("verify", nodes), lambda: bench.verify_ms(nodes))
            + once(("rest", nodes, length), lambda: bench.rest_ms(shape))
        )

    estimated = {shape: tokens / parts(shape) for shape, tokens in tokens_per_step.items()}
    finalists = sorted(estimated, key=lambda shape: -estimated[shape])[:FINALISTS]
    return [shape.model_copy(update={"batch": bench.batch}) for shape in finalists]


def tune(finalists: Sequence[DraftShape], tokens_per_step: Mapping[DraftShape, float], speed: Speed) -> Tuned:
    """The fastest of the finalists in complete calls, and its speed-up over undrafted calls.

    The calls that choose it are not among those that its speed-up is computed from, so that luck in the choice does not
    count as speed.
    """
    for shape in (None, *finalists):
        speed(shape, 0)  # builds what is built on first use
    totals = dict.fromkeys(finalists, 0.0)
    for number in range(SCREENED):
        for shape in finalists if number % 2 else reversed(finalists):
            totals[shape] += speed(shape, number)
    best = max(totals, key=lambda shape: totals[shape])
    found: dict[DraftShape | None, list[float]] = {best: [], None: []}
    for number in range(PAIRS):
        for shape in (best, None) if number % 2 else (None, best):
            found[shape].append(speed(shape, SCREENED + number))
    return Tuned(best, tokens_per_step[best.model_copy(update={"batch": 1})], found[best], found[None])


def estimate(
    model: nn.Module, prompts: Sequence[list[int]], batches: Sequence[int], *, max_new_tokens: int, **settings: Any
) -> float:
    """About how many seconds a tuning takes at most, from short undrafted calls.

    A batch size for which memory is too small counts for nothing.  Raises RedrafterError for bad prompts and settings.
    """
    request(model, None, prompts, max_new_tokens=max_new_tokens, **settings)

    def seconds(rows: int) -> float:
        own = list(itertools.islice(itertools.cycle(prompts), rows))
        new_tokens, times = min(ESTIMATED, max_new_tokens), []
        for _ in range(2):  # the first call builds what is built on first use
            begin = time.perf_counter()
            try:
                written = generate(model, None, own, max_new_tokens=new_tokens, **settings).new_tokens
            except RedrafterError:
                return 0.0
            times.append((time.perf_counter() - begin) / max(map(len, written)))
        return max_new_tokens * times[-1]

    calls = 1 + FINALISTS + SCREENED * FINALISTS + 2 * PAIRS
    rows = min(TOGETHER, len(prompts))
    texts = 2 * math.ceil(len(prompts) / rows)  # to write them, and about as long to draft at every place of them
    return texts * seconds(rows) + sum(calls * seconds(batch) for batch in batches)


def record(source: Path, shapes: Sequence[DraftShape], tuned_on: str, output: Path | None = None) -> Path:
    """Writes the shapes into a head's config in its folder, whatever else it says kept; or into a copy at `output`.

    Raises RedrafterError where it cannot be written; what was there before is then still there.
    """
    check_drafter_folder(output or source)
    told = json.loads((source / hub.CONFIG).read_bytes())
    told |= {"shapes": [shape.model_dump(exclude_none=True) for shape in shapes], "tuned_on": tuned_on}
    KINDS.get(str(told.get("model_type")), RecurrentDrafter).config_type.model_validate(told)
    contents = {}
    if output is not None:
        contents = {name: (source / name).read_bytes() for name in (hub.WEIGHTS, hub.CARD) if (source / name).exists()}
        contents |= {name: text.encode() for name, text in hub.CUSTOM_GENERATE.items()}
    contents[hub.CONFIG] = (flat(json.dumps(told, indent=2, ensure_ascii=False)) + "\n").encode()
    hub.write_files(output or source, contents)
    return output or source
