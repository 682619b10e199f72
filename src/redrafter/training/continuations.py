"""The paper's local distillation: what the target itself writes, greedily, after every position of true text.

Paper: arXiv 2403.09919.  Promises one run of the target for each depth and chunk of positions, whatever the number of
positions.  Does not know files.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redrafter.core.tree import chain
from redrafter.targets.target import Target

CHUNK = 512
"""Positions that one run of the target continues; bounds the memory of logits and masks."""


def branch_mask(
    position: Int[Tensor, " C"], *, depth: int, text: int, slots: int, window: int | None = None
) -> Bool[Tensor, "1 C slots"]:
    """What tokens at `depth` after each of the positions see: the text up to there, and their own branch.

    Text lies in the slots before `text`; then come the chunk's tokens of depth 1, of depth 2 and so on.
    """
    slot = torch.arange(slots, device=position.device)
    at, branch = slot - text, torch.arange(len(position), device=position.device)[:, None]
    place = torch.where(at < 0, slot, position[:, None] + 1 + at.clamp(min=0) // len(position))  # in the text's order
    own = (at >= 0) & (at % len(position) == branch)
    now = position[:, None] + depth
    mask = torch.where(at < 0, slot <= position[:, None], own)
    if window is not None:
        mask = mask & (now - place < window)
    return mask[None]


@torch.inference_mode()
def continuations(
    target: Target,
    input_ids: Int[Tensor, "B P"],
    *,
    depth: int,
    ends: frozenset[int] = frozenset(),
    chunk: int = CHUNK,
) -> Int[Tensor, "B P depth"]:
    """The `depth` tokens that the target writes after each position, greedily.

    -1 after an end token, and where the target has no position left.  Rows are padded right; what follows padding is of
    no use.
    """
    batch, size = input_ids.shape
    device = input_ids.device
    chunk = min(chunk, size)
    out = input_ids.new_full((batch, size, depth), -1)
    cache = target.new_cache(batch=batch, slots=size + chunk * (depth - 1))
    for begin in range(0, size, chunk):
        tokens = input_ids[:, begin : begin + chunk]
        cache.window.visible = begin + tokens.shape[1]
        _, logits = target.forward(chain(tokens), input_ids.new_full((batch,), begin), cache)
        out[:, begin : begin + chunk, 0] = logits.argmax(-1)
    for begin in range(0, size, chunk):
        position = torch.arange(begin, min(begin + chunk, size), device=device)
        count = len(position)
        for level in range(1, depth):
            first = size + (level - 1) * count
            cache.window.visible = first + count
            _, logits = target.run(
                out[:, position, level - 1],
                (position + level).expand(batch, -1),
                torch.arange(first, first + count, device=device).expand(batch, -1),
                partial(branch_mask, position, depth=level, text=size, slots=first + count),
                cache,
            )
            out[:, position, level] = logits.argmax(-1)
    is_end = torch.isin(out, torch.tensor(sorted(ends), dtype=out.dtype, device=device))
    ended = is_end.cumsum(-1) - is_end.long() > 0
    if target.context_length is not None:
        read = torch.arange(size, device=device)[:, None] + torch.arange(depth, device=device)  # the last one, for each
        ended = ended | (read >= target.context_length)
    return out.masked_fill(ended, -1)
