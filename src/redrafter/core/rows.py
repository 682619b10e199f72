"""Where the rows of a batch stand, and what is known of the target's next choices before it runs.

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
    """Where trees stand: their rows' texts so far."""

    row: Int[Tensor, " B"]
    """The number of each row in its call."""
    seed: Int[Tensor, " B"]
    text: Int[Tensor, "B S"]
    """Tokens by position, the root of the tree included; what follows is not defined."""
    length: Int[Tensor, " B"]
    """Position of the root."""
    alive: Int[Tensor, " B"]

    @property
    def root(self) -> Int[Tensor, " B"]:
        """The last token, which the target chose and has not yet taken in."""
        return self.text.gather(1, self.length[:, None])[:, 0]


@dataclass(frozen=True)
class SamplingNoise:
    """What is known of the choices at successive positions before the target runs."""

    warpers: tuple[LogitsProcessor, ...]
    noise: Float[Tensor, "B depths V"] | None
    """None where decoding is greedy."""

    def warp(self, logits: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
        """Logits over any vocabulary after temperature and truncation, in float32 at least."""
        scores = precise(logits).flatten(0, -2)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.view(logits.shape)

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """How a drafter's logits after nodes of a depth become what it ranks by; None for as they are.

        Where the target samples, `coupled` to its noise or by the warpers alone; `names` as for `coupled`.
        """
        if self.noise is None:
            return None
        return partial(self.coupled, names=names) if coupled else lambda logits, _: self.warp(logits)

    def coupled(
        self, logits: Float[Tensor, "B beams head"], position: int, names: Int[Tensor, " head"] | None = None
    ) -> Float[Tensor, "B beams head"]:
        """A drafter's logits after nodes of depth `position`, with the warpers and the noise that the target will draw.

        So they rank first what it is about to draw.  `names`: the target's ids of the draft vocabulary, where it has
        its own.
        """
        assert self.noise is not None
        noise = self.noise[:, position]
        return self.warp(logits) + (noise if names is None else noise[:, names])[:, None]


def precise(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least, as transformers has scores."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
