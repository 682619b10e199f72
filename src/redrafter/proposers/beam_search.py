"""Beam search over whatever scores the next token (arXiv 2403.09919, section 3.2).

Guarantees the `beam_width` most probable continuations that a beam search of that width finds, best first, and returns
all candidates that it scored.  Nothing of vocabulary size is kept.  Does not know the target's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, most_probable, prefix_tree
from redrafter.kernels import has_kernels
from redrafter.kernels.topk import MAX_WIDTH, TopK, topk


class Level(NamedTuple):
    """Every candidate at one depth: the best `W` continuations of each beam."""

    tokens: Int[Tensor, "B C"]
    parents: Int[Tensor, "B C"]
    """The entry of the level above that each continues; 0 at depth 1, which continues the root."""
    scores: Float[Tensor, "B C"]
    """Log-probability of the path."""


class BeamStep(NamedTuple):
    """Beams after they were extended by one token."""

    level: Level
    beams: Int[Tensor, "B W L"]
    scores: Float[Tensor, "B W"]
    entries: Int[Tensor, "B W"]
    """Each beam's entry in the level."""
    parents: Int[Tensor, "B W"]
    """The beam that each continues."""


class Search(NamedTuple):
    """The result of a beam search."""

    beams: Int[Tensor, "B W L"]
    scores: Float[Tensor, "B W"]
    """Log-probabilities of the beams."""
    levels: list[Level]


def search(
    following: Callable[[Tensor, Tensor], Tensor],
    root: Int[Tensor, " B"],
    shape: DraftShape,
    *,
    adjust: Callable[[Tensor, int], Tensor] | None = None,
    names: Int[Tensor, " head"] | None = None,
) -> Search:
    """Continuations of `root` and their log-probabilities.

    `following(beams, parents)` returns the logits [B, beams, head] of the token after each of the beams [B, beams,
    depth]; there is one empty beam at first, and `parents` [B, beams] says which of the previous beams each continues.
    `adjust(logits, depth)` changes the logits before the softmax.  `names` are the target's ids of the draft
    vocabulary, if the drafter has one.
    """
    beams = root.new_empty((root.shape[0], 1, 0))
    scores = torch.zeros((root.shape[0], 1), dtype=torch.float32, device=root.device)
    parents = entries = torch.zeros_like(root)[:, None]
    levels: list[Level] = []
    for depth in range(shape.beam_length):
        logits = following(beams, parents)
        if adjust is not None:
            logits = adjust(logits.float(), depth)
        best = topk(logits.flatten(0, 1), shape.beam_width)
        level, beams, scores, entries, parents = extend_beams(best, names, beams, scores, entries)
        levels.append(level)
    return Search(beams, scores, levels)


def tree_of(root: Int[Tensor, " B"], found: Search, shape: DraftShape) -> DraftTree:
    """The prefix tree of the beams; with a node budget or lookup, the tree of the most probable candidates."""
    if not shape.node_budget and not shape.lookup:
        return prefix_tree(root, found.beams)
    return most_probable(root, found.levels, size=shape.beam_nodes)


def extend_beams(
    best: TopK,
    names: Int[Tensor, " head"] | None,
    beams: Int[Tensor, "B beams depth"],
    scores: Float[Tensor, "B beams"],
    entries: Int[Tensor, "B beams"],
) -> BeamStep:
    """Extends every beam by its best tokens and keeps the best `W` of all.

    `best` has one row for each beam.  `scores` are the beams' log-probabilities, `entries` their entries in the level
    above.  `names`: see `search`.
    """
    width = best.values.shape[1]
    if not has_kernels(best.values.device, best.values.dtype) or width > MAX_WIDTH:
        return plain_extend_beams(best, names, beams, scores, entries)
    from redrafter.kernels.triton import drafting

    with torch.cuda.device_of(beams):
        tokens, parents, totals, *step = drafting.extend_beams(*best, names, beams, scores, entries)
    return BeamStep(Level(tokens, parents, totals), *step)


def plain_extend_beams(
    best: TopK,
    names: Int[Tensor, " head"] | None,
    beams: Int[Tensor, "B beams depth"],
    scores: Float[Tensor, "B beams"],
    entries: Int[Tensor, "B beams"],
) -> BeamStep:
    """`extend_beams` in PyTorch, for any device."""
    batch, _, depth = beams.shape
    width = best.values.shape[1]
    gain = best.values - best.logsumexp[:, None]  # [B·beams, W]
    gain = gain.clamp(max=0)  # rounding must not lift a child above its parent
    totals = (scores[..., None] + gain.view(batch, -1, width)).flatten(1)
    tokens = (best.ids if names is None else names[best.ids]).view(batch, -1)
    level = Level(tokens, entries.repeat_interleave(width, dim=1), totals)
    scores, entries = totals.topk(width, dim=-1)
    parents = entries.div(width, rounding_mode="floor")
    previous = beams.gather(1, parents[..., None].expand(-1, -1, depth))
    beams = torch.cat((previous, tokens.gather(1, entries)[..., None]), dim=-1)
    return BeamStep(level, beams, scores, entries, parents)
