"""Continuations of a text that are found in the text itself, and how likely each is (prompt lookup, Saxena 2023).

Guarantees that only tokens up to the end of each text are read, in tensors of fixed shapes and without synchronizing
with the device.  Does not know trees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

NGRAM = 16
"""The largest number of tokens at the end of a text that is compared with earlier places."""

ACCEPTANCE = (0.0, 0.25, 0.54, 0.62, 0.66, 0.78, 0.8, 0.82, 0.84, 0.86, 0.86, 0.87, 0.87, 0.88, 0.89, 0.9, 0.95)
"""Probability that the next token is the one after an earlier place that matches the last 0, 1, … tokens."""

ACCEPTANCE_SAMPLED = (
    *(0.0, 0.12, 0.35, 0.48, 0.55, 0.63, 0.69, 0.72, 0.74),
    *(0.76, 0.78, 0.79, 0.8, 0.81, 0.82, 0.83, 0.84),
)
"""The same for rows that sample, at temperature 1.  `docs/methods.md` says where the figures come from."""

ALTERNATIVE = 0.25
"""Factor of that probability for places that do not match best."""


class Continuations(NamedTuple):
    """K continuations of L tokens for each text, best first."""

    tokens: Int[Tensor, "B K L"]
    """-1 if there are fewer than K."""
    log_probs: Float[Tensor, "B K L"]
    """Estimated log-probability that the continuation is right up to each token; -inf if there is none."""


def continuations(
    text: Int[Tensor, "B S"],
    end: Int[Tensor, " B"],
    *,
    count: int,
    length: int,
    ngram: int = NGRAM,
    sampled: Int[Tensor, " B"] | None = None,
) -> Continuations:
    """What followed the `count` earlier places that match the text's last tokens best; the latest of equals first.

    Texts end at position `end`; later entries are ignored.  A place matches with the number of equal tokens before and
    including it and the end, at most `ngram`.  A continuation that reaches the end of the text goes on with its own
    tokens, so that a text which repeats itself is continued for all `length` tokens.  `sampled` is 1 for rows that
    sample, whose tokens agree with an earlier place less often; None if no row does.
    """
    slots, device = text.shape[1], text.device
    ngram, count = min(ngram, slots), min(count, slots)
    position = torch.arange(slots, device=device)
    padded = torch.nn.functional.pad(text, (ngram - 1, 0), value=-1)
    last = padded.gather(1, end[:, None] + torch.arange(ngram, device=device))
    differs = padded.unfold(1, ngram, 1) != last[:, None]  # [B, S, ngram]: of the tokens up to each position
    back = torch.arange(ngram - 1, -1, -1, device=device, dtype=torch.int16)
    matched = torch.where(differs, back, ngram).amin(dim=2)
    rank = torch.where(position < end[:, None], matched * slots + position, -1)
    best = rank.topk(count, dim=1).values  # a longer match first, then a later one
    found, place = best.div(slots, rounding_mode="floor"), best % slots
    exists = (found > 0)[..., None]

    index = torch.arange(length, device=device)
    period = (end[:, None] - place).clamp(min=1)[..., None]
    tokens = text.gather(1, (place[..., None] + 1 + index % period).flatten(1).clamp(max=slots - 1))
    matches = (found[..., None] + index).clamp(0, NGRAM)
    if sampled is not None:
        matches = matches + (NGRAM + 1) * sampled[:, None, None]
    log_probs = _log_acceptance(device)[matches].cumsum(dim=2)
    log_probs = log_probs + math.log(ALTERNATIVE) * (torch.arange(count, device=device) > 0)[:, None]
    tokens = torch.where(exists, tokens.unflatten(1, (count, length)), -1)
    return Continuations(tokens, torch.where(exists, log_probs, -torch.inf))


_tables: dict[torch.device, Tensor] = {}


def _log_acceptance(device: torch.device) -> Float[Tensor, " matches"]:
    """Logarithms of both tables, copied to a device once: a captured step must not copy from the host."""
    if device not in _tables:
        _tables[device] = torch.tensor(ACCEPTANCE + ACCEPTANCE_SAMPLED, dtype=torch.float32).log().to(device)
    return _tables[device]
