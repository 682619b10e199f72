"""Holds drafted text against undrafted text, and explains where they part.

Low precision rounds, and rounding differs with the shape of a computation, so two right ways to compute can choose
differently between two all but equal logits.  Does not excuse anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from redrafter.core.noise import row_seeds
from redrafter.core.rows import RowState
from redrafter.core.shapes import ShapeOverrides
from redrafter.core.tree import chain
from redrafter.decoding.settings import ONE_TEXT
from redrafter.engine.generate import generate
from redrafter.engine.request import request
from redrafter.engine.results import Finished
from redrafter.proposers import Drafter, method_of
from redrafter.proposers.base import measured_shape

ROUNDING = 8
"""Roundings of the largest logit, in units of the dtype's epsilon, by which two ways to compute a logit may differ.

A property of the arithmetic, not of this package's own computation, which is what is being checked.
"""


@dataclass(frozen=True)
class Divergence:
    """The first difference between the two texts of a prompt."""

    row: int
    position: int
    """Index among the new tokens."""
    margin: float
    """Distance of the two best logits there, in the model's forward over the plain text, with noise where sampled."""
    rounding: float
    """The distance that rounding explains."""

    @property
    def explained(self) -> bool:
        """Whether rounding alone can have swapped the two."""
        return self.margin <= self.rounding


@dataclass(frozen=True)
class Report:
    """All divergences, and how well the drafter did."""

    divergences: list[Divergence]
    tokens: int
    tokens_per_step: float


def compare(
    model: nn.Module,
    drafter: Drafter,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    on_row: Callable[[Finished], object] | None = None,
    **settings: Any,
) -> Report:
    """Generates from every prompt with and without the drafter; `settings` are those of `generate`.

    `on_row` is called with each of these texts, two for each prompt, as it is written.

    Raises RedrafterError for bad prompts and settings.
    """
    settings = settings | ONE_TEXT | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if request(model, None, prompts, **settings).sampler.do_sample:  # both ways must draw alike
        settings["seed"] = row_seeds(settings.get("seed"), len(prompts))
    plain = generate(model, None, prompts, on_row=on_row, **settings)
    batch = min(batch_size, len(prompts))
    shape = measured_shape(method_of(drafter), batch, ShapeOverrides(beam_width, beam_length, node_budget))
    drafted = generate(model, drafter, prompts, on_row=on_row, shape=shape, **settings)
    divergences = [
        parting(model, prompts, row, one, other, settings)
        for row, (one, other) in enumerate(zip(plain.new_tokens, drafted.new_tokens, strict=True))
        if one != other
    ]
    return Report(divergences, drafted.stats.tokens, drafted.stats.tokens_per_step)


def parting(
    model: nn.Module,
    prompts: list[list[int]],
    row: int,
    one: list[int],
    other: list[int],
    settings: dict[str, Any],
) -> Divergence:
    """Where two texts of the prompt `row` part, the margin of the model's logits there, and what rounding reaches."""
    shorter = min(len(one), len(other))
    position = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    asked = request(model, None, prompts, **settings)
    text = torch.tensor([prompts[row] + one[:position]], device=asked.target.device)
    with torch.inference_mode():
        logits = asked.target.module(input_ids=text, use_cache=False).logits[:, -1:]
        place = RowState(
            row=torch.tensor([row], device=text.device),
            seed=torch.tensor([asked.rows[row].seed], device=text.device),
            text=text,
            length=torch.tensor([text.shape[1] - 1], device=text.device),
            alive=torch.tensor([1], device=text.device),
        )
        noise = asked.sampler.noise(place, depths=1, vocabulary=logits.shape[-1])
        scores = asked.sampler.choose(noise, chain(text[:, -1:]), logits, place).scores[0, 0]
        best = (scores if noise.gumbel is None else scores + noise.gumbel[0, 0]).double().topk(2).values
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * logits.double().abs().max()
    for processor in asked.sampler.processors[0]:
        rounding = rounding / getattr(processor, "temperature", 1.0)
    return Divergence(row, position, float(best[0] - best[1]), float(rounding))
