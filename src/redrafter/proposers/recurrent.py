"""The recurrent drafter as a proposer: beam search, then prefix folding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from redrafter.beam import beam_search
from redrafter.drafter import RecurrentDrafter
from redrafter.sampling import Draw
from redrafter.target import Target
from redrafter.tree import DraftTree, fold


@dataclass(frozen=True)
class RecurrentProposer:
    """Drafts `width` beams of `length` tokens and folds them into one tree a row."""

    drafter: RecurrentDrafter
    target: Target
    width: int
    length: int

    @property
    def size(self) -> int:
        """Nodes where no two beams share a prefix."""
        return 1 + self.width * self.length

    def propose(self, context: Float[Tensor, "B H"], root: Int[Tensor, " B"], draw: Draw) -> DraftTree:
        """Trees below `root`; the drafter computes in its own dtype.

        Coupled drafting: where the target samples, its noise is known beforehand, and the drafter's logits get the same
        warpers and the same noise, so that it ranks first what the target is about to draw.
        """
        dtype = self.drafter.dtype
        beams, _ = beam_search(
            self.drafter,
            lambda tokens: self.target.embed(tokens).to(dtype),
            context.to(dtype),
            root,
            width=self.width,
            length=self.length,
            adjust=None if draw.noise is None else partial(self._as_drawn, draw),
        )
        return fold(root, beams)

    def _as_drawn(self, draw: Draw, logits: Float[Tensor, "B beams head"], position: int) -> Tensor:
        assert draw.noise is not None
        noise = draw.noise[:, position]
        if self.drafter.draft_vocabulary is not None:
            noise = noise[:, self.drafter.draft_vocabulary]
        return draw.warp(logits) + noise[:, None]
