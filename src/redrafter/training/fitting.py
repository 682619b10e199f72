"""The tree of Medusa heads, fitted to how often each head's best tokens are right along given rows.

Paper: arXiv 2401.10774, section 2.3.3: the accuracy of each rank of each head is measured alone, and a path's
probability is taken for their product.  Does not know how heads are trained.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from redrafter.data.examples import Row
from redrafter.evaluation.acceptance import CHUNK, everywhere
from redrafter.heads.medusa import MedusaHeads, fit_tree
from redrafter.targets.target import Target

BATCH = 8
"""Rows that go through the target together."""

ROWS = 64
"""Training rows that a tree is fitted on where none are held out."""


def fit(heads: MedusaHeads, target: Target, rows: list[Row], held_out: list[Row]) -> None:
    """Gives the heads the tree of as many nodes that is best by their accuracies on the rows held out.

    Without any it is fitted on some of the others, which the heads know better than what they will draft.  Rows in
    which no draft can begin leave the tree as it was.
    """
    config = heads.config
    some = held_out or rows[:: max(1, len(rows) // ROWS)][:ROWS]
    measured = accuracies(heads, target, some)
    if not measured.any():
        return
    useful = [of_ranks[:most] for of_ranks, most in zip(measured.tolist(), config.ranks, strict=True)]
    told: dict[str, object] = {"tree": fit_tree(useful, 1 + len(config.tree))}
    told |= {"fitted_on": f"{len(some)} {'held-out' if held_out else 'training'} rows"}
    heads.config = config.model_copy(update=told)


@torch.no_grad()
def accuracies(heads: MedusaHeads, target: Target, rows: list[Row]) -> Float[Tensor, "heads ranks"]:
    """How often the token that head k ranks r-th stands in the text, k places after the guaranteed one.

    Over the windows of training (`loss.windows`), up to the largest of the config's `ranks`; 0 where none was seen.
    """
    count, ranks = heads.config.heads, max(heads.config.ranks)
    right = torch.zeros((count, ranks), dtype=torch.double, device=target.device)
    seen = torch.zeros((count, 1), dtype=torch.double, device=target.device)
    for places in everywhere(target, rows, length=count, batch_size=BATCH):
        if places.hidden is None:
            continue
        for row, position, tokens, known in places.chunks(CHUNK):
            best = heads.logits(places.hidden[row, position].to(heads.dtype)).topk(ranks, dim=-1).indices
            hits = (heads.to_target_ids(best) == tokens[:, 1:, None]) & known[..., None]
            right += hits.sum(dim=0)
            seen += known.sum(dim=0)[:, None]
    return (right / seen.clamp(min=1)).cpu()
