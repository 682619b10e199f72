"""Methods as a bench measures them: in one shape, with the noise of the target's draws or not, or with beams unfolded.

Promises that what is compared differs in that alone, and that no text does.  Does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, parallel_chains
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer
from redrafter.targets.target import Target

NO_NOISE = "without the draws' noise"
UNFOLDED = "unfolded"


@dataclass(frozen=True)
class Variant:
    """A method that always drafts in one shape, ranks by the noise of the target's draws or not, or does not fold."""

    method: Method
    fixed: DraftShape | None = None
    coupled: bool | None = None
    """Whether drafts are ranked by the noise that the target is about to draw with; by default as the method does."""
    folded: bool = True
    """Whether beams that begin alike share nodes, as in decoding; else the target runs each as a chain of its own."""

    @property
    def layers(self) -> Sequence[int]:
        """As the method's."""
        return self.method.layers

    def shape(self, batch: int) -> DraftShape:
        """The fixed shape, or the method's."""
        return self.fixed or self.method.shape(batch)

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """The method's own, changed so.  Raises RedrafterError where there are no whole beams to unfold."""
        found = self.method.proposer(target, shape)
        if found is None:
            return None
        if self.coupled is not None:
            found = _Changed(found, draw=partial(_ranked, coupled=self.coupled))
        if not self.folded:
            # a beam search weighs more than its beams hold; a tree of a form of its own, as Medusa's, has no more
            candidates = shape.num_candidates
            complete = shape.node_budget is None and found.size == shape.max_nodes
            full = shape.model_copy(update={"node_budget": candidates})
            most = self.method.proposer(target, full) if complete else None
            if most is None or most.size != candidates:
                raise RedrafterError("the method does not draft whole beams that could be unfolded.")
            found = _Changed(found, tree=partial(unfolded, width=shape.beam_width))
        return found


class _Changed(Proposer):
    """A proposer that is shown other draws, or whose trees are made others."""

    def __init__(
        self,
        proposer: Proposer,
        draw: Callable[[SamplingNoise], SamplingNoise] = lambda draw: draw,
        tree: Callable[[DraftTree], DraftTree] = lambda tree: tree,
    ):
        self._proposer, self._draw, self._tree = proposer, draw, tree
        self.length, self.size, self.positions = proposer.length, proposer.size, proposer.positions
        self.modules = proposer.modules
        self.memory, self.read = proposer.memory, proposer.read  # type: ignore[method-assign]

    def prepare(self) -> Proposer:
        """As the proposer's."""
        return _Changed(self._proposer.prepare(), self._draw, self._tree)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """The proposer's, changed."""
        return self._tree(self._proposer.propose(memory, rows, context, self._draw(noise)))


@dataclass(frozen=True)
class _Ranked(SamplingNoise):
    """The draws of a step, by whose noise drafters rank or not, whatever they ask for."""

    by_noise: bool = True

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """As `SamplingNoise.ranking`."""
        return super().ranking(self.by_noise, names)


def _ranked(draw: SamplingNoise, coupled: bool) -> SamplingNoise:
    return _Ranked(draw.warpers, draw.gumbel, coupled)


def unfolded(tree: DraftTree, width: int) -> DraftTree:
    """Folded beams, each again in nodes of its own below the root: what is verified where nothing is folded.

    `tree` holds `width` beams, no two of them alike (`tree.fold`).
    """
    length = (tree.size - 1) // width
    levels = [tree.valid.sum(dim=1, keepdim=True) - width + torch.arange(width, device=tree.tokens.device)]
    for _ in range(length - 1):  # from the beams' ends, which are the last nodes, up
        levels.insert(0, tree.parents.gather(1, levels[0]))
    return parallel_chains(tree.tokens[:, 0], torch.stack([tree.tokens.gather(1, nodes) for nodes in levels], dim=2))
