"""Prompt lookup: what followed the text's last tokens when they stood in it before (Saxena 2023).

After https://github.com/apoorvumang/prompt-lookup-decoding, in transformers `prompt_lookup_num_tokens`: the longest
n-gram that ends the text and occurred before gives the tokens that followed its first occurrence.  Promises that for
all rows at once, without reading the device.  Does not know models: it costs no memory and nothing to train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import DraftTree, chain
from redrafter.errors import RedrafterError
from redrafter.proposers.base import ByText, Memoryless
from redrafter.proposers.trees import check_shape
from redrafter.targets.target import Target


@dataclass(frozen=True)
class PromptLookup(ByText):
    """Drafts by looking up the text's last `ngram` tokens, or fewer, in the text before them."""

    beam_length = 10

    ngram: int = 3

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> PromptLookupProposer | None:
        """What drafts so; None for a length of 0.  Raises RedrafterError for more than one beam, or a budget."""
        if self.ngram < 1:
            raise RedrafterError(f"Prompt lookup looks for at least 1 token, not {self.ngram}.")
        if width != 1:
            raise RedrafterError(f"Prompt lookup drafts one beam, not {width}: leave beam_width out.")
        if budget is not None:
            raise RedrafterError("Prompt lookup drafts one beam, so node_budget means nothing: leave it out.")
        check_shape(width, length, budget, tokens=target.vocab_size)
        return PromptLookupProposer(length, self.ngram) if length else None


@dataclass(frozen=True)
class PromptLookupProposer(Memoryless):
    """Drafts a chain of `length` tokens, or as many as there are: none where nothing is found."""

    length: int
    ngram: int

    @property
    def size(self) -> int:
        """The root and the chain."""
        return 1 + self.length

    @property
    def positions(self) -> int:
        """The target's states are not read; decoding keeps one."""
        return 1

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """None."""
        return ()

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Chains below the root."""
        text, end = place.text, place.length[:, None]
        after = self._found(text, end)
        index = after + torch.arange(self.length, device=text.device)
        valid = (after > 0) & (index <= end)
        drafted = text.gather(1, index.clamp(max=text.shape[1] - 1))
        root = place.root[:, None]
        return chain(torch.cat((root, drafted), dim=1), torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1))

    def _found(self, text: Int[Tensor, "B S"], end: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        """The position after the first occurrence of the longest n-gram; 0 where there is none."""
        slots = text.shape[1]
        position = torch.arange(slots, device=text.device)
        alike = (position < end).expand_as(text)  # n-grams that end at a position agree so far
        matched = torch.zeros_like(text)
        for back in range(min(self.ngram, slots)):
            last = text.gather(1, (end - back).clamp(min=0))
            before = text.roll(back, dims=1)  # [B, S]: the token so many places before each
            alike = alike & (position >= back) & (before == last)
            matched = matched + alike
        longest, first = (matched * slots - position).max(dim=1, keepdim=True)
        return torch.where(longest > 0, first + 1, 0)
