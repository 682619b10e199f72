"""The recurrent drafter as a proposer: beam search, then prefix folding or the best nodes of a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import DraftTree
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.proposers.base import Memoryless
from redrafter.proposers.beam_search import beam_search
from redrafter.proposers.fused_drafter import Joined
from redrafter.proposers.trees import size_of, tree_of
from redrafter.targets.target import Target


@dataclass(frozen=True)
class RecurrentProposer(Memoryless):
    """Drafts `width` beams of `length` tokens and folds them into one tree a row.

    With a `budget` the tree holds the root and the most probable of all nodes that the search weighed, beams or not.
    """

    drafter: RecurrentDrafter
    target: Target
    width: int
    length: int
    budget: int | None = None
    joined: Joined | None = None
    """The drafter's products, where they were made fewer."""

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

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root; the drafter computes in its own dtype, and coupled to the target's draws."""
        root = place.root
        found = beam_search(
            self.drafter,
            self._embed,
            context.flatten(1).to(self.drafter.dtype),
            root,
            width=self.width,
            length=self.length,
            adjust=draw.ranking(names=self.drafter.draft_vocabulary),
            joined=self.joined,
        )
        return tree_of(root, found, self.budget)

    def quickened(self) -> RecurrentProposer:
        """With joined products, where kernels run."""
        if not has_kernels(self.drafter.device, self.drafter.dtype):
            return self
        return replace(self, joined=Joined.of(self.drafter, self._embed))

    def _embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        return self.target.embed(tokens).to(self.drafter.dtype)  # type: ignore[no-any-return]
