"""The fastest shape of a draft for each batch size, on this machine and on a target's own text.

Promises that a shape is chosen by tokens a second alone: what its drafts are accepted on the given prompts, over what
its step takes here.  Drafting is switched off where it does not pay.  Does not know how either is printed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redrafter import hub
from redrafter.config import DecodingShape, flat
from redrafter.decoding import generate
from redrafter.drafter import RecurrentDrafter
from redrafter.profiling import Bench
from redrafter.proposers import Method
from redrafter.proposers.beams import weighed
from redrafter.proposers.loading import KINDS
from redrafter.request import Request, request
from redrafter.results import Finished
from redrafter.training.data import Row
from redrafter.training.evaluation import Acceptance, answered, drafted_everywhere, walked

PAYS = 1.03
"""Times as fast as without drafting that a shape must be, or drafting is switched off."""

TOGETHER = 8
"""Rows that are written and drafted at together, to measure acceptance."""

FINALISTS = 3
"""Shapes whose whole step is timed; the sums of their parts choose them."""


@dataclass(frozen=True)
class Timed:
    """A shape with what its step writes and takes, for all rows together."""

    shape: DecodingShape
    tokens_per_step: float
    """Of one row."""
    milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return 1e3 * self.shape.batch * self.tokens_per_step / self.milliseconds


@dataclass(frozen=True)
class Tuned:
    """What was found for a batch size."""

    best: Timed
    alone: Timed
    """Without drafting."""

    @property
    def speed_up(self) -> float:
        """Tokens a second, over those without drafting."""
        return self.best.tokens_per_second / self.alone.tokens_per_second


def shapes(widths: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]) -> list[DecodingShape]:
    """Whole beams of every width and length, and every budget that cuts what their search weighs."""
    found = []
    for width, length in itertools.product(widths, lengths):
        for budget in (None, *budgets):
            if budget is None or length < budget < weighed(width, length):
                found.append(DecodingShape(beam_width=width, beam_length=length, node_budget=budget))
    return found


def choose(alone: Timed, drafted: Sequence[Timed]) -> Timed:
    """The fastest of what was drafted, or decoding without drafting where that does not pay."""
    best = max(drafted, key=lambda one: one.tokens_per_second)
    return best if best.tokens_per_second >= PAYS * alone.tokens_per_second else alone


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

    def tokens_per_step(self, shape: DecodingShape) -> float:
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


def tune(bench: Bench, tokens_per_step: Mapping[DecodingShape, float]) -> Tuned:
    """The fastest of the shapes at a bench's batch, by what each writes in a step.

    The parts of every shape's step are timed, and the whole step of those that promise the most: so a part is measured
    once for all shapes in which it differs little.
    """
    known: dict[tuple[Any, ...], float] = {}

    def once(key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        if key not in known:
            known[key] = measure()
        return known[key]

    def parts(shape: DecodingShape) -> float:
        nodes, length, whole = bench.tree(shape).size, shape.beam_length, shape.node_budget is None
        return (
            once(("draft", shape.beam_width, length, whole), lambda: bench.draft_ms(shape))
            + once(("verify", nodes), lambda: bench.verify_ms(nodes))
            + once(("rest", nodes, length), lambda: bench.rest_ms(shape))
        )

    def timed(shape: DecodingShape, milliseconds: float) -> Timed:
        own = shape.model_copy(update={"batch": bench.batch})
        return Timed(own, tokens_per_step.get(shape, 1.0), milliseconds)

    promised = {shape: timed(shape, parts(shape)).tokens_per_second for shape in tokens_per_step}
    finalists = sorted(promised, key=lambda shape: -promised[shape])[:FINALISTS]
    alone = timed(DecodingShape(beam_width=1, beam_length=0), bench.step_ms())
    return Tuned(choose(alone, [timed(shape, bench.step_ms(shape)) for shape in finalists]), alone)


def record(source: Path, shapes: Sequence[DecodingShape], tuned_on: str, output: Path | None = None) -> Path:
    """Writes the shapes into a head's config in its folder, whatever else it says kept; or into a copy at `output`.

    Raises RedrafterError where it cannot be written; what was there before is then still there.
    """
    told = json.loads((source / hub.CONFIG).read_text())
    told |= {"shapes": [shape.model_dump(exclude_none=True) for shape in shapes], "tuned_on": tuned_on}
    KINDS.get(str(told.get("model_type")), RecurrentDrafter).config_type.model_validate(told)
    contents = {}
    if output is not None:
        contents = {name: (source / name).read_bytes() for name in (hub.WEIGHTS, hub.CARD) if (source / name).exists()}
        contents |= {name: text.encode() for name, text in hub.CUSTOM_GENERATE.items()}
    contents[hub.CONFIG] = (flat(json.dumps(told, indent=2, ensure_ascii=False)) + "\n").encode()
    hub.write_files(output or source, contents)
    return output or source
