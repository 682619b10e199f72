"""Tensor functions of a verify step: settings of requests for drafted tokens, and acceptance by comparison.

Guarantees, for every drafted position, the settings of its request.  Nothing here synchronizes with the device or knows
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.warping import above_min_p


class DraftedRows(NamedTuple):
    """Where the drafted tokens of a batch are.  Their rows are those of requests in order."""

    request: Int[Tensor, " T"]
    """The request of each drafted token."""
    offset: Int[Tensor, " T"]
    """Its place in the request's draft, from 0."""
    length: Int[Tensor, " R"]
    """The length of each request's draft."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> DraftedRows:
        """For drafts of these lengths, on the CPU."""
        length = torch.tensor(lengths, dtype=torch.long)
        request = torch.arange(len(lengths)).repeat_interleave(length)
        offset = torch.arange(len(request)) - (length.cumsum(0) - length)[request]
        return cls(request, offset, length)

    def to(self, device: torch.device) -> DraftedRows:
        """A copy on the device."""
        return DraftedRows(*(one.to(device, non_blocking=True) for one in self))


def constrained(
    logits: Float[Tensor, "T V"],
    request: Int[Tensor, " T"],
    *,
    temperature: Float[Tensor, " R"],
    min_p: Float[Tensor, " R"] | None,
    top_k: Int[Tensor, " R"] | None,
    top_p: Float[Tensor, " R"] | None,
    truncate: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Float[Tensor, "T V"]:
    """Logits of drafted positions after temperature, `min_p` and `truncate(logits, top_k, top_p)`, in vLLM's order.

    A temperature of 0 is greedy decoding, whose logits are not divided.
    """
    divisor = torch.where(temperature == 0, 1.0, temperature)[request]
    scores = logits / divisor[:, None]
    if min_p is not None:
        scores = above_min_p(scores[:, None], min_p[request])[:, 0]
    if top_k is None and top_p is None:
        return scores
    return truncate(scores, None if top_k is None else top_k[request], None if top_p is None else top_p[request])


def accepted(
    chosen: Int[Tensor, " T"],
    drafted: Int[Tensor, " T"],
    last: Int[Tensor, " R"],
    rows: DraftedRows,
    longest: int,
) -> Int[Tensor, "R longest+1"]:
    """The tokens that a step adds to each request; -1 after them.

    `chosen` is the model's own token at each drafted position, `last` its token after the complete draft.  Drafted
    tokens are kept as long as they equal the chosen ones; the first that differs is replaced.  So the text is the
    model's own, whatever was drafted.
    """
    requests = len(last)
    table = chosen.new_full((requests, longest + 1), -1, dtype=torch.long)
    table[rows.request, rows.offset] = chosen.long()
    table.scatter_(1, rows.length[:, None], last.long()[:, None])
    equal = torch.zeros((requests, longest), dtype=torch.long, device=chosen.device)
    equal[rows.request, rows.offset] = (chosen == drafted).long()
    kept = equal.cumprod(dim=1).sum(dim=1)  # at most the length of the draft
    return table.masked_fill(torch.arange(longest + 1, device=chosen.device) > kept[:, None], -1)
