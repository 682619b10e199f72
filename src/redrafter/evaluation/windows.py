"""Windows of a text: the positions at which a draft can begin, and the tokens that follow each.

Training learns from them and evaluation compares drafts with them.  Does not know drafters.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


def windows(
    input_ids: Int[Tensor, "B P"],
    trained: Bool[Tensor, "B P"],
    *,
    length: int,
    continuations: Int[Tensor, "B P depth"] | None = None,
    from_start: bool = False,
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, "M length1"], Bool[Tensor, "M length"]]:
    """Rows and positions t of all windows, their tokens `t+1 … t+1+length`, and which of the last `length` to predict.

    The guaranteed token t+1 and all tokens up to a predicted one must be trained; a window with nothing to predict is
    omitted.  `length1 = length + 1`.  `continuations` (-1 past the end) replace the tokens that follow each t; then
    only t+1 must be trained.  `from_start` also allows t = -1, before the text, as decoding does.
    """
    if continuations is not None:
        tokens = continuations[..., : length + 1]
        tokens = pad(tokens, (0, length + 1 - tokens.shape[-1]), value=-1)
        wanted = (tokens[..., 1:] >= 0) & pad(trained, (0, 1))[:, 1:, None]
        rows, positions = wanted[..., 0].nonzero(as_tuple=True)
        return rows, positions, tokens[rows, positions].clamp(min=0), wanted[rows, positions]
    tokens = pad(input_ids, (0, length)).unfold(1, length + 1, 1)  # [B, P, length1], entry t + 1 starts at t + 1
    wanted = pad(trained, (0, length)).unfold(1, length + 1, 1).cumprod(dim=-1).bool()[..., 1:]
    first = 0 if from_start else 1
    rows, starts = wanted[:, first:, 0].nonzero(as_tuple=True)
    return rows, starts + first - 1, tokens[rows, starts + first], wanted[rows, starts + first]


def context_at(
    hidden: Float[Tensor, "B P state"],
    rows: Int[Tensor, " M"],
    positions: Int[Tensor, " M"],
    count: int,
    segments: Int[Tensor, "B P"] | None = None,
) -> Float[Tensor, "M features"]:
    """The drafter's input at each position: the states of the last `count` positions, oldest first.

    States before the text, or in another one of the `segments` that share the row, are zero.
    """
    source = positions[:, None] - torch.arange(count - 1, -1, -1, device=hidden.device)
    valid = source >= 0
    source, rows = source.clamp(min=0), rows[:, None]
    if segments is not None:
        valid = valid & (segments[rows, source] == segments[rows, positions[:, None]])
    return (hidden[rows, source] * valid[..., None]).flatten(1)
