"""Beam search with the recurrent drafter (arXiv 2403.09919, section 3.2).

Promises the `width` most probable continuations that a beam search of that width finds, best first, and all that it
weighed on the way; nothing of vocabulary size is kept.  Does not know trees or the target's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.drafter import RecurrentDrafter


class Level(NamedTuple):
    """Every continuation weighed at one position: the best `width` of each beam."""

    tokens: Int[Tensor, "B C"]
    parents: Int[Tensor, "B C"]
    """The entry of the level before that each continues; 0 on the first level, which continues the root."""
    scores: Float[Tensor, "B C"]
    """Log-probability of the whole path."""


class Search(NamedTuple):
    """What a beam search found."""

    beams: Int[Tensor, "B W L"]
    scores: Float[Tensor, "B W"]
    """Log-probabilities of the beams."""
    levels: list[Level]


def beam_search(
    drafter: RecurrentDrafter,
    embed: Callable[[Tensor], Tensor],
    context: Float[Tensor, "B features"],
    root: Int[Tensor, " B"],
    *,
    width: int,
    length: int,
    adjust: Callable[[Tensor, int], Tensor] | None = None,
) -> Search:
    """Continuations of the guaranteed token `root`, and their log-probabilities under the drafter.

    `embed` is the target's token embedding, `context` what the target knew where it chose `root`.  The first
    step grows one beam only; each later one takes the best `width` of every beam's own best.
    `adjust(logits, position)` changes the head's logits [B, beams, head] before they are made probabilities.
    """
    best = min(width, drafter.config.head_size)
    if best < width:
        raise ValueError(f"width {width} exceeds the {best} tokens that the drafter scores")
    state = drafter.step(None, embed(root))[:, None]  # [B, 1, H], then [B, W, H]
    context = drafter.context(context)[:, None]
    beams = root.new_empty((root.shape[0], 1, 0))
    scores = context.new_zeros((root.shape[0], 1), dtype=torch.float32)
    levels: list[Level] = []
    above = root.new_zeros((root.shape[0], 1))  # each beam's entry in the level before
    for position in range(length):
        logits = drafter.logits(context.expand_as(state), state).float()
        if adjust is not None:
            logits = adjust(logits, position)
        top, choice = logits.topk(width, dim=-1)
        gain = top - logits.logsumexp(dim=-1, keepdim=True)  # [B, beams, W]
        grown = scores[..., None] + gain.clamp(max=0)  # never above the parent, not by rounding either
        drafted = drafter.to_target_ids(choice.flatten(1))
        levels.append(Level(drafted, above.repeat_interleave(width, dim=1), grown.flatten(1)))
        scores, above = grown.flatten(1).topk(width, dim=-1)
        tokens = drafted.gather(1, above)
        parent = above.div(width, rounding_mode="floor")[..., None]
        beams = torch.cat((beams.gather(1, parent.expand(-1, -1, position)), tokens[..., None]), dim=-1)
        if position + 1 < length:
            carried = state.gather(1, parent.expand(-1, -1, state.shape[-1]))
            state = drafter.step(carried, embed(tokens))
    return Search(beams, scores, levels)
