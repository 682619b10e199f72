"""Beam search, with the recurrent drafter (arXiv 2403.09919, section 3.2) or whatever else scores what may follow.

Promises the `width` most probable continuations that a beam search of that width finds, best first, and all that it
weighed on the way; nothing of vocabulary size is kept.  Does not know trees or the target's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.kernels.topk import WIDEST, Top, top
from redrafter.proposers.fused_drafter import Joined


class Level(NamedTuple):
    """Every continuation weighed at one position: the best `width` of each beam."""

    tokens: Int[Tensor, "B C"]
    parents: Int[Tensor, "B C"]
    """The entry of the level before that each continues; 0 on the first level, which continues the root."""
    scores: Float[Tensor, "B C"]
    """Log-probability of the whole path."""


class BeamStep(NamedTuple):
    """Beams that are one token longer."""

    level: Level
    beams: Int[Tensor, "B W L"]
    scores: Float[Tensor, "B W"]
    above: Int[Tensor, "B W"]
    """Each beam's entry in the level."""
    parents: Int[Tensor, "B W"]
    """The beam that each continues."""


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
    joined: Joined | None = None,
) -> Search:
    """Continuations of the guaranteed token `root`, and their log-probabilities under the drafter.

    `embed` is the target's token embedding, `context` what the target knew where it chose `root`.  The first
    step grows one beam only; each later one takes the best `width` of every beam's own best.
    `adjust(logits, position)` changes the head's logits [B, beams, head] before they are made probabilities.
    `joined` is the drafter's, for fewer products.
    """
    if width > drafter.config.head_size:
        raise ValueError(f"width {width} exceeds the {drafter.config.head_size} tokens that the drafter scores")
    state = drafter.step(None, embed(root))[:, None]  # [B, 1, H], then [B, W, H]
    context = drafter.context(context)[:, None]
    read = drafter.read(context)
    seen = None if joined is None else drafter.seen(context.expand_as(state), state)
    carried = state  # what joined products made of it for the next step

    def following(beams: Tensor, parents: Tensor) -> Tensor:
        nonlocal state, seen, carried
        position = beams.shape[2]
        if joined is None or read is None:
            if position:
                begun = state.gather(1, parents[..., None].expand(-1, -1, state.shape[-1]))
                state = drafter.step(begun, embed(beams[..., -1]))
            return drafter.logits(context.expand_as(state), state, read)
        if position:
            state, seen = joined.moved(beams[..., -1], parents, carried, context)
        carried, first = joined.products(state, seen, read, last=position == length - 1)
        return drafter.scores(first)

    return search(following, root, width=width, length=length, adjust=adjust, names=drafter.draft_vocabulary)


def search(
    following: Callable[[Tensor, Tensor], Tensor],
    root: Int[Tensor, " B"],
    *,
    width: int,
    length: int,
    adjust: Callable[[Tensor, int], Tensor] | None = None,
    names: Int[Tensor, " head"] | None = None,
) -> Search:
    """Continuations of `root`, and their log-probabilities.

    `following(beams, parents)` gives the logits [B, beams, head] of what follows each of the beams [B, beams, position]
    so far, of which there is one at first, and `parents` [B, beams] says which of its last beams each continues.
    `adjust(logits, position)` changes them before they are made probabilities; `names` are the target's ids of the
    draft vocabulary, where it has its own.
    """
    beams = root.new_empty((root.shape[0], 1, 0))
    scores = torch.zeros((root.shape[0], 1), dtype=torch.float32, device=root.device)
    parents = above = torch.zeros_like(root)[:, None]
    levels: list[Level] = []
    for position in range(length):
        logits = following(beams, parents)
        if adjust is not None:
            logits = adjust(logits.float(), position)
        best = top(logits.flatten(0, 1), width)
        level, beams, scores, above, parents = grow(best, names, beams, scores, above)
        levels.append(level)
    return Search(beams, scores, levels)


def grow(
    best: Top,
    names: Int[Tensor, " head"] | None,
    beams: Int[Tensor, "B beams position"],
    scores: Float[Tensor, "B beams"],
    above: Int[Tensor, "B beams"],
) -> BeamStep:
    """The best tokens of every beam weighed, and the best `width` of all kept.

    `best` has a row for each beam; `names` are the target's ids of the draft vocabulary, where it has its own;
    `scores` are the beams' log-probabilities, `above` their entries in the level before.
    """
    width = best.values.shape[1]
    if not has_kernels(best.values.device, best.values.dtype) or width > WIDEST:
        return plain_extend_beams(best, names, beams, scores, above)
    from redrafter.kernels.triton import drafting

    with torch.cuda.device_of(beams):
        tokens, parents, weighed, *grown = drafting.grow(*best, names, beams, scores, above)
    return BeamStep(Level(tokens, parents, weighed), *grown)


def plain_extend_beams(
    best: Top,
    names: Int[Tensor, " head"] | None,
    beams: Int[Tensor, "B beams position"],
    scores: Float[Tensor, "B beams"],
    above: Int[Tensor, "B beams"],
) -> BeamStep:
    """As `grow`, on any device."""
    batch, _, position = beams.shape
    width = best.values.shape[1]
    gain = best.values - best.logsumexp[:, None]  # [B·beams, W]
    gain = gain.clamp(max=0)  # never above the parent, not by rounding either
    grown = (scores[..., None] + gain.view(batch, -1, width)).flatten(1)
    drafted = (best.ids if names is None else names[best.ids]).view(batch, -1)
    level = Level(drafted, above.repeat_interleave(width, dim=1), grown)
    scores, above = grown.topk(width, dim=-1)
    parents = above.div(width, rounding_mode="floor")
    begun = beams.gather(1, parents[..., None].expand(-1, -1, position))
    beams = torch.cat((begun, drafted.gather(1, above)[..., None]), dim=-1)
    return BeamStep(level, beams, scores, above, parents)
