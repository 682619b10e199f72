"""Logits processors that transformers lacks, or has only in a slower form.

They follow transformers' protocol: token ids [R, T] and scores [R, V] in, scores out.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, of the new tokens only, which transformers lacks.

    `score -= presence * (count > 0) + frequency * count`
    (https://platform.openai.com/docs/api-reference/chat/create).
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Lowers the scores of tokens that a row has written."""
        new = input_ids[:, self.prompt_length :]
        count = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self.presence * (count > 0) - self.frequency * count


class Nucleus(TopPLogitsWarper):  # type: ignore[misc]
    """Top-p that keeps exactly the tokens that transformers keeps, without sorting the vocabulary on a CPU.

    transformers sorts the scores of a row in ascending order, adds up their probabilities in float32 and drops tokens
    while the sum is at most `1 - top_p`.  This class searches the last token to keep among the `size` largest scores.
    transformers processes a row if that token is not among them, if its score equals the next one (torch's sort is not
    stable, so only the sort itself determines which one is kept), if the sum is so close to `1 - top_p` that rounding
    decides, or if the scores contain NaN.  Rows are independent.  The search synchronizes with the device; on a GPU,
    where sorting is cheap, transformers processes all rows.
    """

    sizes = (128, 2048)
    """Tried in this order."""

    @classmethod
    def like(cls, other: TopPLogitsWarper) -> Nucleus:
        """A processor with the same settings."""
        return cls(other.top_p, other.filter_value, other.min_tokens_to_keep)

    def __call__(self, input_ids: Int[Tensor, "R T"] | None, scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """The scores with `filter_value` for dropped tokens."""
        if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
            return super().__call__(input_ids, scores)  # type: ignore[no-any-return]
        out = torch.empty_like(scores)
        rows = torch.arange(len(scores))  # not processed yet
        for size in self.sizes:
            if not len(rows) or not self.min_tokens_to_keep < size < scores.shape[-1]:
                break
            found, kept = self._kept(scores[rows], size)
            out[rows[found]] = scores[rows[found]].masked_fill(~kept, self.filter_value)
            rows = rows[~found]
        if len(rows):
            out[rows] = super().__call__(input_ids, scores[rows])
        return out

    def _kept(self, scores: Float[Tensor, "R V"], size: int) -> tuple[Bool[Tensor, " R"], Bool[Tensor, "found V"]]:
        """The rows that their `size` largest scores decide, and the tokens that these rows keep."""
        limit, vocabulary = 1 - self.top_p, scores.shape[-1]
        total = scores.logsumexp(dim=-1, keepdim=True).double()
        top = scores.topk(size, dim=-1).values
        chances = (top.double() - total).exp()
        mass = 1 - (chances.cumsum(dim=-1) - chances)  # of a token and all smaller ones
        # Bounds of the rounding, in units of float32: of the sum that transformers' softmax divides by, whose tail
        # holds `limit`; and of `total`.
        rounding = 2**-24 * (limit * (limit * vocabulary / 4 + 4 * size) + total.abs() + 256)
        inside = mass > limit
        inside[:, : self.min_tokens_to_keep] = True
        close = ((mass - limit).abs() <= rounding)[:, self.min_tokens_to_keep :].any(dim=-1)
        count = inside.sum(dim=-1, keepdim=True).clamp(max=size - 1)
        last = top.gather(1, count - 1)
        tied = (last == top.gather(1, count))[:, 0]
        found = total[:, 0].isfinite() & ~inside[:, -1] & ~close & ~tied
        return found, scores[found] >= last[found]
