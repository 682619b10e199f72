"""The fastest draft shape for each batch size, on this machine and on a target's own texts.

The durations of the parts of a step choose a few candidates.  Complete calls of `generate`, drafted and undrafted in
alternation, decide: a shape is used only if its gain exceeds the spread of these pairs.  Does not print anything.
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
from redrafter.evaluation.profiling import StepProfiler
from redrafter.heads.config import flat
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.proposers import Drafter, method_of
from redrafter.proposers.methods import HEADS
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

MIN_SPEEDUP = 1.03
"""The least speed-up over undrafted calls for which drafting is switched on."""

BATCH = 8
"""Rows that are decoded together to measure acceptance."""

FINALISTS = 3
"""Shapes that are tried in complete calls, chosen by the estimated durations of their steps."""

SCREENED = 2
"""Complete calls of each finalist that choose the fastest one."""

PAIRS = 9
"""Pairs of a drafted and an undrafted call; one may be an outlier at this CONFIDENCE."""

CONFIDENCE = 0.95
"""Probability that the interval of a speed-up contains the true median."""

ESTIMATED = 16
"""New tokens of the calls that estimate the duration of tuning."""

Speed = Callable[[DraftShape | None, int], float]
"""Tokens per second of the complete call with a number, in a shape or, with None, undrafted."""


@dataclass(frozen=True)
class Tuned:
    """The result for one batch size."""

    candidate: DraftShape
    """The fastest shape with drafting."""
    tokens_per_step: float
    """Per row, with the candidate."""
    drafted: Sequence[float]
    """Tokens per second of all rows in the candidate's complete calls."""
    undrafted: Sequence[float]
    """The same for undrafted calls, each adjacent to the drafted call with the same prompts."""

    @property
    def ratios(self) -> list[float]:
        """The speed-up of each pair."""
        return [one / other for one, other in zip(self.drafted, self.undrafted, strict=True)]

    @property
    def speed_up(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """The confidence interval of the speed-up."""
        return interval(self.ratios)

    @property
    def pays(self) -> bool:
        """Whether drafting is faster by more than the spread of the pairs, and by at least MIN_SPEEDUP."""
        return self.speed_up >= MIN_SPEEDUP and self.interval[0] > 1

    @property
    def shape(self) -> DraftShape:
        """The candidate, or decoding without drafting."""
        off = DraftShape(batch=self.candidate.batch, beam_width=1, beam_length=0)
        return self.candidate if self.pays else off


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that contains the true median with at least CONFIDENCE, for any distribution of the values.

    Its bounds are two of the sorted values: the binomial distribution gives the probability that fewer than k of n
    independent values lie below the median.  Too few values have no bounds.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0  # values cut at each end, and the probability that the median is beyond them
    while outside < count:
        below += math.comb(count, outside) / 2**count
        if below > (1 - CONFIDENCE) / 2:
            break
        outside += 1
    return (ordered[outside - 1], ordered[count - outside]) if outside else (-math.inf, math.inf)


def shapes(widths: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]) -> list[DraftShape]:
    """Complete beams of every width and length, and every budget that is smaller than the candidates of the search."""
    complete = [DraftShape(beam_width=w, beam_length=length) for w, length in itertools.product(widths, lengths)]
    return [
        shape.model_copy(update={"node_budget": budget})
        for shape in complete
        for budget in (None, *budgets)
        if budget is None or shape.beam_length < budget < shape.num_candidates
    ]


@dataclass(frozen=True)
class Texts:
    """A target's own texts and the settings that they were written with."""

    model: nn.Module
    drafter: Drafter
    settings: dict[str, Any]
    request: Request
    rows: list[Row]

    @classmethod
    def written(
        cls,
        model: nn.Module,
        drafter: Drafter,
        prompts: list[list[int]],
        *,
        on_row: Callable[[Finished], object] | None = None,
        **settings: Any,
    ) -> Texts:
        """Decodes the prompts without the drafter.  `on_row` is called with each text.

        Raises RedrafterError for invalid prompts.
        """
        settings |= ONE_TEXT
        if settings.get("do_sample"):
            settings.setdefault("seed", 0)  # all shapes draft for the same samples
        checked = request(model, drafter, prompts, **settings)
        new = generate(model, None, prompts, batch_size=BATCH, on_row=on_row, **settings).new_tokens
        return cls(model, drafter, settings, checked, answered(checked, new))

    @property
    def length(self) -> int:
        """Mean length of the texts in tokens."""
        mean = sum(len(row.input_ids) for row in self.rows) // len(self.rows)
        return min(mean, self.request.target.context_length or mean)

    def again(self, batch: int, length: int) -> Request:
        """A request with `batch` rows of `length` tokens, cut from the texts."""
        tokens = itertools.cycle([token for row in self.rows for token in row.input_ids])
        rows = [list(itertools.islice(tokens, length)) for _ in range(batch)]
        return request(self.model, self.drafter, rows, **self.settings)

    def tokens_per_second(self, shape: DraftShape | None, number: int, *, batch: int, compile: bool) -> float:
        """The speed of a complete call of `generate` with the next `batch` prompts; undrafted without a shape."""
        prompts = [row.prompt for row in self.request.rows]
        own = [prompts[(number * batch + row) % len(prompts)] for row in range(batch)]
        begin = time.perf_counter()
        drafter = None if shape is None else self.drafter
        tokens = generate(self.model, drafter, own, compile=compile, shape=shape, **self.settings).stats.tokens
        return tokens / (time.perf_counter() - begin)

    def tokens_per_step(self, shape: DraftShape) -> float:
        """The mean acceptance length for these texts, without the forward passes of the prompts."""
        proposer = method_of(self.drafter).proposer(self.request.target, shape)
        assert proposer is not None
        verdicts = drafted_everywhere(
            self.request.target,
            proposer,
            self.rows,
            sampled_as=self.request.rows[0],
            seeds=[row.seed for row in self.request.rows],
            batch_size=BATCH,
            from_start=True,
        )
        found = torch.cat([walked(one) for one in verdicts])
        return Acceptance.of(found, proposer.length).mean_acceptance_length


def promising(profiler: StepProfiler, tokens_per_step: Mapping[DraftShape, float]) -> list[DraftShape]:
    """The FINALISTS of the shapes by estimated speed: tokens per step over the sum of the durations of the parts.

    Shapes share the duration of a part that hardly differs between them.
    """
    known: dict[tuple[Any, ...], float] = {}

    def once(key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        if key not in known:
            known[key] = measure()
        return known[key]

    def parts(shape: DraftShape) -> float:
        nodes, length, whole = profiler.tree(shape).size, shape.depth, shape.node_budget is None
        return (
            once(("draft", shape.beam_width, length, whole), lambda: profiler.draft_ms(shape))
            + once(("verify", nodes), lambda: profiler.verify_ms(nodes))
            + once(("rest", nodes, length), lambda: profiler.rest_ms(shape))
        )

    estimated = {shape: tokens / parts(shape) for shape, tokens in tokens_per_step.items()}
    finalists = sorted(estimated, key=lambda shape: -estimated[shape])[:FINALISTS]
    return [shape.model_copy(update={"batch": profiler.batch}) for shape in finalists]


def tune(finalists: Sequence[DraftShape], tokens_per_step: Mapping[DraftShape, float], speed: Speed) -> Tuned:
    """The fastest finalist in complete calls, and its speed-up over undrafted calls.

    The calls that choose it are separate from those that measure its speed-up, which would otherwise be biased.
    """
    for shape in (None, *finalists):
        speed(shape, 0)  # initialises what is created on first use
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
    """An upper estimate of the duration of tuning in seconds, from short undrafted calls.

    Ignores batch sizes for which memory does not suffice.  Raises RedrafterError for invalid prompts and settings.
    """
    request(model, None, prompts, max_new_tokens=max_new_tokens, **settings)

    def seconds(rows: int) -> float:
        own = list(itertools.islice(itertools.cycle(prompts), rows))
        new_tokens, times = min(ESTIMATED, max_new_tokens), []
        for _ in range(2):  # the first call initialises what is created on first use
            begin = time.perf_counter()
            try:
                written = generate(model, None, own, max_new_tokens=new_tokens, **settings).new_tokens
            except RedrafterError:
                return 0.0
            times.append((time.perf_counter() - begin) / max(map(len, written)))
        return max_new_tokens * times[-1]

    calls = 1 + FINALISTS + SCREENED * FINALISTS + 2 * PAIRS
    rows = min(BATCH, len(prompts))
    texts = 2 * math.ceil(len(prompts) / rows)  # decoding, and about as long for drafting at every position
    return texts * seconds(rows) + sum(calls * seconds(batch) for batch in batches)


def record(source: Path, shapes: Sequence[DraftShape], tuned_on: str, output: Path | None = None) -> Path:
    """Writes the shapes into the config of a head's folder, or of a copy at `output`.  Other fields are kept.

    Raises RedrafterError if writing fails; existing files are then unchanged.
    """
    check_drafter_folder(output or source)
    config = json.loads((source / hub.CONFIG).read_bytes())
    config |= {
        "shapes": [shape.model_dump(exclude_none=True, exclude={"lookup"}) for shape in shapes],
        "tuned_on": tuned_on,
    }
    HEADS.get(str(config.get("model_type")), RecurrentDrafter).config_type.model_validate(config)
    contents = {}
    if output is not None:
        contents = {name: (source / name).read_bytes() for name in (hub.WEIGHTS, hub.CARD) if (source / name).exists()}
        contents |= {name: text.encode() for name, text in hub.CUSTOM_GENERATE.items()}
    contents[hub.CONFIG] = (flat(json.dumps(config, indent=2, ensure_ascii=False)) + "\n").encode()
    hub.write_files(output or source, contents)
    return output or source
