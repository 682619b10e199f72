"""The state of the rows of a batch, and the sampling noise of the next step.

Does not know which model or proposer reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class RowState:
    """The texts so far, one per row."""

    row: Int[Tensor, " B"]
    """The number of each row in its call."""
    seed: Int[Tensor, " B"]
    text: Int[Tensor, "B S"]
    """Tokens by position, including the root.  Later entries are undefined."""
    length: Int[Tensor, " B"]
    """Position of the root."""
    alive: Int[Tensor, " B"]
    """1 for rows that are being decoded, 0 for free slots."""

    @property
    def root(self) -> Int[Tensor, " B"]:
        """The last token.  The target has chosen it, but not yet processed it."""
        return self.text.gather(1, self.length[:, None])[:, 0]


@dataclass(frozen=True)
class SamplingNoise:
    """What is known before the target runs about how it will sample at the next positions."""

    warpers: tuple[LogitsProcessor, ...]
    gumbel: Float[Tensor, "B depths V"] | None
    """Gumbel noise after nodes of each depth; None in greedy decoding."""

    def warp(self, logits: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
        """Applies temperature and truncation to logits over any vocabulary.  Returns float32 or wider."""
        scores = precise(logits).flatten(0, -2)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.view(logits.shape)

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """A function `(logits, depth) -> scores` that a drafter ranks candidates by; None for the logits themselves.

        When the target samples, scores include its noise if `coupled`, and the warpers in any case.  `names`: see
        `with_noise`.
        """
        if self.gumbel is None:
            return None
        return partial(self.with_noise, names=names) if coupled else lambda logits, _: self.warp(logits)

    def with_noise(
        self, logits: Float[Tensor, "B beams head"], depth: int, names: Int[Tensor, " head"] | None = None
    ) -> Float[Tensor, "B beams head"]:
        """A drafter's logits after nodes of a depth, with the warpers and noise that the target will use there.

        They rank the token first that the target is about to sample.  `names` are the target's ids of the draft
        vocabulary, if the drafter has one.
        """
        assert self.gumbel is not None
        noise = self.gumbel[:, depth]
        return self.warp(logits) + (noise if names is None else noise[:, names])[:, None]


def at_positions(states: Float[Tensor, "B P size"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M size"]:
    """The vectors of each row at the positions in `index`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def precise(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float32 or wider, as transformers' scores."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
