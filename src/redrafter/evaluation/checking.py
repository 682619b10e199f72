"""Compares drafted with undrafted text and decides whether rounding explains a difference.

Rounding depends on the shape of a computation, so two correct computations can choose differently between two almost
equal logits.  Any other difference is an error.
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
from redrafter.decoding.state import sampler_of, settings_of
from redrafter.engine.generate import generate
from redrafter.engine.request import request
from redrafter.engine.results import Finished
from redrafter.proposers import Drafter, method_of
from redrafter.proposers.base import measured_shape

ROUNDING = 8
"""Tolerated difference of a logit between two computations, in units of the dtype's epsilon times the largest logit.

It follows from floating-point arithmetic, not from measurements of this package, since they are what is checked.
"""


@dataclass(frozen=True)
class Divergence:
    """The first difference between the two texts of a prompt.

    `position`: index among the new tokens.  `margin`: difference of the two largest logits there, in a forward pass
    over the undrafted text, with the noise if sampled.  `rounding`: the difference that rounding explains.
    """

    row: int
    position: int
    margin: float
    rounding: float

    @property
    def explained(self) -> bool:
        """Whether rounding can have swapped the two largest logits."""
        return self.margin <= self.rounding


@dataclass(frozen=True)
class Report:
    """All divergences, the number of tokens, and the tokens per step with the drafter."""

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
    lookup: bool | None = None,
    on_row: Callable[[Finished], object] | None = None,
    **settings: Any,
) -> Report:
    """Generates from every prompt with and without the drafter; `settings` as for `generate`.

    `on_row` is called with every finished text, two per prompt.  Raises RedrafterError for bad prompts and settings.
    """
    settings = settings | ONE_TEXT | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if request(model, None, prompts, **settings).sampler.features.sampling:  # both must sample with the same seeds
        settings["seed"] = row_seeds(settings.get("seed"), len(prompts))
    plain = generate(model, None, prompts, on_row=on_row, **settings)
    batch = min(batch_size, len(prompts))
    shape = measured_shape(method_of(drafter), batch, ShapeOverrides(beam_width, beam_length, node_budget, lookup))
    drafted = generate(model, drafter, prompts, on_row=on_row, shape=shape, **settings)
    divergences = compare_texts(lambda: model, prompts, plain.new_tokens, drafted.new_tokens, settings)
    return Report(divergences, drafted.stats.tokens, drafted.stats.tokens_per_step)


def compare_texts(
    model: Callable[[], nn.Module],
    prompts: list[list[int]],
    texts: list[list[int]],
    others: list[list[int]],
    settings: dict[str, Any],
) -> list[Divergence]:
    """All divergences between undrafted `texts` of the prompts and `others`, wherever they were generated.

    `model` loads the model whose logits decide about rounding; it is called only if texts differ.  `settings` are those
    that the texts were generated with; if sampled, with the same seeds.
    """
    different = [row for row, (one, other) in enumerate(zip(texts, others, strict=True)) if one != other]
    if not different:
        return []
    loaded = model()
    return [find_divergence(loaded, prompts, row, texts[row], others[row], settings) for row in different]


def find_divergence(
    model: nn.Module,
    prompts: list[list[int]],
    row: int,
    one: list[int],
    other: list[int],
    settings: dict[str, Any],
) -> Divergence:
    """The first difference between two texts of the prompt `row`, with its margin and the limit of rounding."""
    shorter = min(len(one), len(other))
    position = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    made = request(model, None, prompts, **settings)
    own = made.rows[row]
    text = torch.tensor([prompts[row] + one[:position]], device=made.target.device)
    with torch.inference_mode():
        logits = made.target.module(input_ids=text, use_cache=False).logits[:, -1:]
        state = RowState(
            row=torch.tensor([row], device=text.device),
            seed=torch.tensor([own.seed], device=text.device),
            text=text,
            length=torch.tensor([text.shape[1] - 1], device=text.device),
            alive=torch.tensor([1], device=text.device),
            settings=settings_of(own, count=1, vocabulary=logits.shape[-1], device=text.device),
        )
        sampler = sampler_of({0: own})
        noise = sampler.noise(state, depths=1, vocabulary=logits.shape[-1])
        scores = sampler.choose(noise, chain(text[:, -1:]), logits, state).scores[0, 0]
        best = (scores if noise.gumbel is None else scores + noise.gumbel[0, 0]).double().topk(2).values
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * logits.double().abs().max() / own.sampling.temperature
    return Divergence(row, position, float(best[0] - best[1]), float(rounding))
