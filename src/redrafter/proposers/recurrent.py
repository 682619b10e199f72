"""The recurrent drafter as a proposer: beam search, then prefix folding."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from redrafter.beam import beam_search
from redrafter.drafter import RecurrentDrafter
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

    def propose(self, context: Float[Tensor, "B H"], root: Int[Tensor, " B"]) -> DraftTree:
        """Trees below `root`; the drafter computes in its own dtype."""
        dtype = self.drafter.dtype
        beams, _ = beam_search(
            self.drafter,
            lambda tokens: self.target.embed(tokens).to(dtype),
            context.to(dtype),
            root,
            width=self.width,
            length=self.length,
        )
        return fold(root, beams)
