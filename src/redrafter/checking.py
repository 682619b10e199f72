"""Holds drafted text against undrafted text, and explains where they part.

Low precision rounds, and rounding differs with the shape of a computation, so two right ways to compute can choose
differently between two all but equal logits.  Does not excuse anything else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from redrafter.decoding import generate
from redrafter.drafter import RecurrentDrafter
from redrafter.sampling import Sampler, row_seeds

ROUNDING = 8
"""Roundings of the largest logit, in units of the dtype's epsilon, by which two ways to compute a logit may differ.

A property of the arithmetic, not of this package's own computation, which is what is being checked.
"""


@dataclass(frozen=True)
class Parting:
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
    """All partings, and how well the drafter did."""

    partings: list[Parting]
    tokens: int
    tokens_per_step: float


def compare(
    model: PreTrainedModel,
    drafter: RecurrentDrafter,
    prompts: list[list[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    beam_width: int | None = None,
    beam_length: int | None = None,
    sampler: Sampler | None = None,
    seed: int | None = None,
) -> Report:
    """Generates from every prompt with and without the drafter, greedily unless `sampler` says otherwise.

    Raises RedrafterError for bad prompts.
    """
    sampler = sampler or Sampler()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, **asdict(sampler)}
    seeds = row_seeds(seed, len(prompts))
    if sampler.do_sample or seed is not None:
        settings["seed"] = seeds
    plain = generate(model, None, prompts, **settings)
    drafted = generate(model, drafter, prompts, beam_width=beam_width, beam_length=beam_length, **settings)
    partings = [
        _parting(model, row, prompts[row], one, other, sampler, seeds[row])
        for row, (one, other) in enumerate(zip(plain.new_tokens, drafted.new_tokens, strict=True))
        if one != other
    ]
    return Report(partings, drafted.stats.tokens, drafted.stats.tokens_per_step)


def _parting(
    model: PreTrainedModel,
    row: int,
    prompt: list[int],
    one: list[int],
    other: list[int],
    sampler: Sampler,
    seed: int,
) -> Parting:
    shorter = min(len(one), len(other))
    position = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    text = torch.tensor([prompt + one[:position]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=text, use_cache=False).logits[:, -1:]
        place = torch.tensor([text.shape[1]], device=text.device)
        draw = sampler.draw(place * 0 + seed, place, depths=1, vocabulary=logits.shape[-1])
        best = draw.scores(logits, torch.zeros_like(text[:, -1:]))[0, 0].double().topk(2).values
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * logits.double().abs().max()
    if sampler.do_sample:
        rounding = rounding / sampler.temperature
    return Parting(row, position, float(best[0] - best[1]), float(rounding))
