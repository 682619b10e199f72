"""Fits the tree of Medusa heads to the measured accuracy of each rank of each head.

Paper: arXiv 2401.10774, section 2.3.3.  A path's probability is taken as the product of its ranks' accuracies.  Does
not know how heads are trained.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from redrafter.data.examples import Row
from redrafter.evaluation.acceptance import MAX_WINDOWS, window_batches
from redrafter.heads.medusa import MedusaHeads, fit_tree
from redrafter.targets.target import Target

BATCH_SIZE = 8
"""Rows per run of the target."""

MAX_TRAINING_ROWS = 64
"""Training rows to fit a tree on if none are held out."""


def fit(heads: MedusaHeads, target: Target, rows: list[Row], held_out: list[Row]) -> None:
    """Replaces the heads' tree by the best one of the same size for the held-out rows.

    Without held-out rows, some of the training `rows` are used.  Rows without a window leave the tree unchanged.
    """
    config = heads.config
    used = held_out or rows[:: max(1, len(rows) // MAX_TRAINING_ROWS)][:MAX_TRAINING_ROWS]
    measured = accuracies(heads, target, used)
    if not measured.any():
        return
    limited = [ranks[:most] for ranks, most in zip(measured.tolist(), config.ranks, strict=True)]
    fitted_on = f"{len(used)} {'held-out' if held_out else 'training'} rows"
    tree = fit_tree(limited, 1 + len(config.tree))
    heads.config = config.model_copy(update={"tree": tree, "fitted_on": fitted_on})


@torch.no_grad()
def accuracies(heads: MedusaHeads, target: Target, rows: list[Row]) -> Float[Tensor, "heads ranks"]:
    """How often the r-th best token of head k is the text's token k positions after the guaranteed one.

    Over the windows of the rows, up to the largest of the config's `ranks`; 0 for heads without a window.
    """
    count, ranks = heads.config.heads, max(heads.config.ranks)
    correct = torch.zeros((count, ranks), dtype=torch.double, device=target.device)
    total = torch.zeros((count, 1), dtype=torch.double, device=target.device)
    for batch in window_batches(target, rows, length=count, batch_size=BATCH_SIZE):
        if batch.hidden is None:
            continue
        for row, position, tokens, known in batch.chunks(MAX_WINDOWS):
            best = heads.logits(batch.hidden[row, position].to(heads.dtype)).topk(ranks, dim=-1).indices
            hits = (heads.to_target_ids(best) == tokens[:, 1:, None]) & known[..., None]
            correct += hits.sum(dim=0)
            total += known.sum(dim=0)[:, None]
    return (correct / total.clamp(min=1)).cpu()
