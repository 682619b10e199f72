"""The best few of each row of scores, and what makes them probabilities, in one pass over the row.

Promises what `plain_topk` gives, up to rounding; of equal scores the smaller id comes first, where the plain way says
nothing.  Asks the device nothing, so a CUDA graph can hold it.  Does not know drafters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.kernels import has_kernels

WIDEST = 64
"""The kernels' largest width; wider ones are found the plain way."""


class Top(NamedTuple):
    """The best `W` of each row, best first."""

    values: Float[Tensor, "R W"]
    """float32, or the scores' own dtype where that is wider."""
    ids: Int[Tensor, "R W"]
    logsumexp: Float[Tensor, " R"]
    """Of the whole row."""


def top(scores: Float[Tensor, "R V"], width: int) -> Top:
    """The best `width` of each row, which must have as many.  Where scores are NaN, ids are still columns."""
    if not has_kernels(scores.device, scores.dtype) or width > WIDEST:
        return plain_topk(scores, width)
    from redrafter.kernels.triton import drafting

    with torch.cuda.device_of(scores):
        return Top(*drafting.top(scores, width))


def plain_topk(scores: Float[Tensor, "R V"], width: int) -> Top:
    """As `top`, by sorting; any device and dtype."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return Top(*scores.topk(width, dim=-1), scores.logsumexp(dim=-1))
