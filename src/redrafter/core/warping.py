"""Temperature, truncation and penalties with one setting per row, as transformers' logits processors define them.

Guarantees transformers' results for each row, whatever the settings of other rows.  A setting at its neutral value
leaves a row's scores unchanged, bit by bit.  Does not synchronize with a GPU.  Does not know texts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUCLEUS_SIZES = (128, 2048)
"""Numbers of largest scores among which the end of a nucleus is searched on a CPU, in this order."""


def with_temperature(scores: Float[Tensor, "B N V"], temperature: Float[Tensor, " B"]) -> Float[Tensor, "B N V"]:
    """Divides by the temperature.  Neutral: 1."""
    return scores / _aligned(temperature, scores)


def within_top_k(scores: Float[Tensor, "B N V"], top_k: Int[Tensor, " B"], most: int) -> Float[Tensor, "B N V"]:
    """Keeps the `top_k` largest scores, and those equal to the last of them.  Neutral: 0.

    `most` is at least the largest `top_k`.
    """
    size = min(most, scores.shape[-1])
    index = (top_k - 1).clamp(0, size - 1)[:, None, None].expand(-1, scores.shape[1], 1)
    least = scores.topk(size, dim=-1).values.gather(2, index)
    return scores.masked_fill((scores < least) & (top_k > 0)[:, None, None], -torch.inf)


def within_top_p(scores: Float[Tensor, "B N V"], top_p: Float[Tensor, " B"]) -> Float[Tensor, "B N V"]:
    """Keeps the most probable tokens whose probabilities add up to `top_p`.  Neutral: 1."""
    limit = (1 - top_p.double())[:, None].expand(-1, scores.shape[1]).flatten()
    return _nucleus(scores.flatten(0, 1), limit[:, None]).view_as(scores)


def above_min_p(scores: Float[Tensor, "B N V"], min_p: Float[Tensor, " B"]) -> Float[Tensor, "B N V"]:
    """Keeps tokens with at least `min_p` times the largest probability.  Neutral: 0."""
    probability = scores.softmax(dim=-1)
    least = _aligned(min_p, scores) * probability.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probability < least, -torch.inf)


def with_repetition_penalty(
    scores: Float[Tensor, "B N V"], seen: Bool[Tensor, "B N V"], penalty: Float[Tensor, " B"]
) -> Float[Tensor, "B N V"]:
    """The repetition penalty of arXiv 1909.05858, section 4.1, as transformers defines it.  Neutral: 1."""
    penalty = _aligned(penalty, scores)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def with_occurrence_penalty(
    scores: Float[Tensor, "B N V"],
    count: Float[Tensor, "B N V"],
    presence: Float[Tensor, " B"],
    frequency: Float[Tensor, " B"],
) -> Float[Tensor, "B N V"]:
    """OpenAI's penalties for tokens that occur `count` times.  Neutral: 0.

    `score -= presence * (count > 0) + frequency * count`
    https://platform.openai.com/docs/api-reference/chat/create
    """
    return scores - _aligned(presence, scores) * (count > 0) - _aligned(frequency, scores) * count


def _aligned(setting: Float[Tensor, " B"], scores: Float[Tensor, "B N V"]) -> Float[Tensor, "B 1 1"]:
    return setting.to(scores.dtype)[:, None, None]


def _nucleus(scores: Float[Tensor, "R V"], limit: Float[Tensor, "R 1"]) -> Float[Tensor, "R V"]:
    """Drops the least probable tokens whose probabilities add up to at most `limit`; exactly those that transformers
    drops.

    transformers sorts the scores of a row in ascending order, adds up their probabilities in float32 and drops tokens
    while the sum is at most `1 - top_p`.  On a CPU, where sorting a vocabulary is slow, the last token to keep is
    searched among the largest scores instead.  A row is sorted if that token is not among them, if its score equals the
    next one (torch's sort is not stable, so only the sort itself determines which one is kept), if the sum is so close
    to the limit that rounding decides, or if the scores contain NaN.
    """
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return _sorted_nucleus(scores, limit)
    out = scores.clone()
    rows = torch.arange(len(scores))[limit[:, 0] > 0]  # not processed yet
    for size in NUCLEUS_SIZES:
        if not len(rows) or size >= scores.shape[-1]:
            break
        found, kept = _kept(scores[rows], limit[rows], size)
        out[rows[found]] = scores[rows[found]].masked_fill(~kept, -torch.inf)
        rows = rows[~found]
    if len(rows):
        out[rows] = _sorted_nucleus(scores[rows], limit[rows])
    return out


def _sorted_nucleus(scores: Float[Tensor, "R V"], limit: Float[Tensor, "R 1"]) -> Float[Tensor, "R V"]:
    """transformers' own method."""
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= limit.to(scores.dtype)
    dropped &= limit > 0  # with top_p = 1, tokens with probability 0 stay
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def _kept(
    scores: Float[Tensor, "R V"], limit: Float[Tensor, "R 1"], size: int
) -> tuple[Bool[Tensor, " R"], Bool[Tensor, "found V"]]:
    """The rows that their `size` largest scores decide, and the tokens that these rows keep."""
    vocabulary = scores.shape[-1]
    total = scores.logsumexp(dim=-1, keepdim=True).double()
    top = scores.topk(size, dim=-1).values
    chances = (top.double() - total).exp()
    mass = 1 - (chances.cumsum(dim=-1) - chances)  # of a token and all smaller ones
    # Bounds of the rounding, in units of float32: of the sum that transformers' softmax divides by, whose tail holds
    # `limit`; and of `total`.
    rounding = 2**-24 * (limit * (limit * vocabulary / 4 + 4 * size) + total.abs() + 256)
    inside = mass > limit
    inside[:, 0] = True
    close = ((mass - limit).abs() <= rounding)[:, 1:].any(dim=-1)
    count = inside.sum(dim=-1, keepdim=True).clamp(max=size - 1)
    last = top.gather(1, count - 1)
    tied = (last == top.gather(1, count))[:, 0]
    found = total[:, 0].isfinite() & ~inside[:, -1] & ~close & ~tied
    return found, scores[found] >= last[found]
