"""The k largest scores of each row and the row's log-sum-exp, in one pass over the row.

Guarantees the values of `plain_topk` up to rounding; of equal scores the smaller id comes first, which PyTorch leaves
open.  Does not synchronize with the device, so a CUDA graph can contain it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.kernels import has_kernels

MAX_WIDTH = 64
"""The largest k of the kernel; PyTorch computes larger ones."""


class TopK(NamedTuple):
    """The best `W` of each row, best first."""

    values: Float[Tensor, "R W"]
    """float32, or the dtype of the scores if that is wider."""
    ids: Int[Tensor, "R W"]
    logsumexp: Float[Tensor, " R"]
    """Over the complete row."""


def topk(scores: Float[Tensor, "R V"], width: int) -> TopK:
    """The best `width <= V` of each row.  If scores are NaN, ids are still valid columns."""
    if not has_kernels(scores.device, scores.dtype) or width > MAX_WIDTH:
        return plain_topk(scores, width)
    from redrafter.kernels.triton import drafting

    with torch.cuda.device_of(scores):
        return TopK(*drafting.topk(scores, width))


def plain_topk(scores: Float[Tensor, "R V"], width: int) -> TopK:
    """`topk` in PyTorch, for any device and dtype."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return TopK(*scores.topk(width, dim=-1), scores.logsumexp(dim=-1))
