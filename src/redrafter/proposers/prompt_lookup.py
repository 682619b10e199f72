"""Prompt lookup: drafts what followed an earlier occurrence of the text's last tokens (Saxena 2023).

After https://github.com/apoorvumang/prompt-lookup-decoding (`prompt_lookup_num_tokens` in transformers): the longest
n-gram that ends the text and occurred before gives the tokens that followed its first occurrence.  All rows are
searched at once, without synchronizing with the device.  Needs no model, memory or training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, chain
from redrafter.errors import RedrafterError
from redrafter.proposers.base import Proposer
from redrafter.targets.target import Target


@dataclass(frozen=True)
class PromptLookup:
    """Looks up the last `ngram` tokens, or fewer, in the text before them.  Drafts a chain of ten tokens by default."""

    ngram: int = 3
    layers: tuple[int, ...] = ()

    def shape(self, batch: int) -> DraftShape:
        """One beam, for every batch size."""
        return DraftShape(beam_width=1, beam_length=10)

    def proposer(self, target: Target, shape: DraftShape) -> PromptLookupProposer | None:
        """A proposer of that shape; None for a length of 0.  Raises RedrafterError for several beams or a budget."""
        if self.ngram < 1:
            raise RedrafterError(f"ngram must be at least 1, not {self.ngram}.")
        if shape.beam_width != 1:
            raise RedrafterError(f"Prompt lookup drafts one beam, not {shape.beam_width}: leave out beam_width.")
        if shape.node_budget is not None:
            raise RedrafterError("Prompt lookup drafts one beam and supports no node_budget: leave it out.")
        return PromptLookupProposer(shape.beam_length, self.ngram) if shape.beam_length else None


class PromptLookupProposer(Proposer):
    """Drafts a chain of at most `length` tokens, or none if nothing matches."""

    def __init__(self, length: int, ngram: int):
        self.length, self.ngram, self.size = length, ngram, 1 + length

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Chains below the root."""
        text, end = rows.text, rows.length[:, None]
        start = self._match(text, end)
        index = start + torch.arange(self.length, device=text.device)
        valid = (start > 0) & (index <= end)
        drafted = text.gather(1, index.clamp(max=text.shape[1] - 1))
        root = rows.root[:, None]
        return chain(torch.cat((root, drafted), dim=1), torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1))

    def _match(self, text: Int[Tensor, "B S"], end: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        """The position after the first occurrence of the longest n-gram; 0 if there is none."""
        slots = text.shape[1]
        position = torch.arange(slots, device=text.device)
        equal = (position < end).expand_as(text)  # n-grams that end at a position and match so far
        matched = torch.zeros_like(text)
        for back in range(min(self.ngram, slots)):
            last = text.gather(1, (end - back).clamp(min=0))
            before = text.roll(back, dims=1)  # [B, S]: the token `back` positions earlier
            equal = equal & (position >= back) & (before == last)
            matched = matched + equal
        longest, first = (matched * slots - position).max(dim=1, keepdim=True)
        return torch.where(longest > 0, first + 1, 0)
