"""Processors of logits that transformers lacks, or has only in a slower form.

Promises transformers' protocol: token ids [R, T] and scores [R, V] in, scores out.  Does not know who calls them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, which transformers lacks: of the tokens written, not of the prompt.

    `score -= presence * (count > 0) + frequency * count`
    (https://platform.openai.com/docs/api-reference/chat/create).
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Scores of rows, lowered for what each wrote."""
        new = input_ids[:, self.prompt_length :]
        count = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self.presence * (count > 0) - self.frequency * count


class Nucleus(TopPLogitsWarper):  # type: ignore[misc]
    """Top-p as transformers has it (arXiv 1904.09751, section 3.1), without sorting the vocabulary on a CPU.

    The nucleus is looked for among the largest scores, then among more of them for those rows alone whose mass is not
    reached, so that no row's result depends on another's; rows flatter than that are sorted.  Looking asks the device,
    which a GPU would be stopped by; there a sort is cheap.
    """

    looks = (128, 2048)
    """How many scores are looked at, one after the other."""

    @classmethod
    def like(cls, other: TopPLogitsWarper) -> Nucleus:
        """The same setting."""
        return cls(other.top_p, other.filter_value, other.min_tokens_to_keep)

    def __call__(self, input_ids: Int[Tensor, "R T"] | None, scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Scores with the tail of each row filled in."""
        if scores.device.type != "cpu":
            return super().__call__(input_ids, scores)  # type: ignore[no-any-return]
        total = scores.logsumexp(dim=-1, keepdim=True)
        out = torch.full_like(scores, self.filter_value)
        rows = torch.arange(len(scores))  # those whose nucleus is not found yet
        for size in self.looks:
            if not len(rows) or size >= scores.shape[-1]:
                break
            top = scores[rows].topk(size, dim=-1)
            chances = (top.values - total[rows]).exp()
            inside = chances.cumsum(dim=-1) - chances < self.top_p  # the mass before a token falls short of top_p
            inside[:, : self.min_tokens_to_keep] = True
            found = ~inside[:, -1]
            kept = top.values.masked_fill(~inside, self.filter_value)
            out[rows[found]] = out[rows[found]].scatter(1, top.indices[found], kept[found])
            rows = rows[~found]
        if len(rows):
            out[rows] = super().__call__(input_ids, scores[rows])
        return out
