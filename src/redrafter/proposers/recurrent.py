"""The recurrent drafter as a proposer: beam search, then prefix folding or the best nodes of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from redrafter.beam import beam_search
from redrafter.drafter import RecurrentDrafter
from redrafter.sampling import Draw
from redrafter.target import Target
from redrafter.tree import DraftTree, fold, most_probable


def weighed(width: int, length: int) -> int:
    """Nodes that a beam search looks at, the root counted."""
    return 1 + width + (length - 1) * width**2


def size_of(width: int, length: int, budget: int | None) -> int:
    """Nodes of a draft's tree."""
    return min(budget, weighed(width, length)) if budget else 1 + width * length


@dataclass(frozen=True)
class RecurrentProposer:
    """Drafts `width` beams of `length` tokens and folds them into one tree a row.

    With a `budget` the tree holds the root and the most probable of all nodes that the search weighed, beams or not.
    """

    drafter: RecurrentDrafter
    target: Target
    width: int
    length: int
    budget: int | None = None

    @property
    def size(self) -> int:
        """The budget; without one, nodes where no two beams share a prefix."""
        return size_of(self.width, self.length, self.budget)

    @property
    def positions(self) -> int:
        """As the drafter was trained."""
        return self.drafter.config.context_positions

    @property
    def modules(self) -> tuple[RecurrentDrafter]:
        """The drafter."""
        return (self.drafter,)

    def propose(self, context: Float[Tensor, "B features"], root: Int[Tensor, " B"], draw: Draw) -> DraftTree:
        """Trees below `root`; the drafter computes in its own dtype.

        Coupled drafting: where the target samples, its noise is known beforehand, and the drafter's logits get the same
        warpers and the same noise, so that it ranks first what the target is about to draw.
        """
        dtype = self.drafter.dtype
        found = beam_search(
            self.drafter,
            lambda tokens: self.target.embed(tokens).to(dtype),
            context.to(dtype),
            root,
            width=self.width,
            length=self.length,
            adjust=None if draw.noise is None else partial(self._as_drawn, draw),
        )
        return most_probable(root, found.levels, size=self.size) if self.budget else fold(root, found.beams)

    def _as_drawn(self, draw: Draw, logits: Float[Tensor, "B beams head"], position: int) -> Tensor:
        assert draw.noise is not None
        noise = draw.noise[:, position]
        if self.drafter.draft_vocabulary is not None:
            noise = noise[:, self.drafter.draft_vocabulary]
        return draw.warp(logits) + noise[:, None]
