"""Logits processors that transformers lacks.  They follow its protocol: token ids [R, T] and scores [R, V] in, scores
out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from redrafter.core.warping import with_occurrence_penalty


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """`core.warping.with_occurrence_penalty` for one row, beside processors that must see its text."""

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self.prompt_length = prompt_length
        self.penalties = torch.tensor([[presence], [frequency]], dtype=torch.float64)

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Lowers the scores of tokens that a row has written."""
        new = input_ids[:, self.prompt_length :]
        count = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        presence, frequency = self.penalties.to(scores.device)
        return with_occurrence_penalty(scores[None], count[None], presence, frequency)[0]
