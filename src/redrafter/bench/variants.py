"""Drafting methods with properties changed: a fixed shape, with or without coupled drafts or lookup, or flat beams.

Guarantees that a variant differs from its method in these properties only and never changes the generated text.
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


@dataclass(frozen=True)
class MethodVariant:
    """A method with a fixed shape, a fixed coupling, with or without lookup, or flat beams."""

    method: Method
    fixed: DraftShape | None = None
    """The shape of all drafts; None keeps the method's default."""
    coupled: bool | None = None
    """Whether drafts are ranked with the noise that the target samples with; None keeps the method's default."""
    flat: bool = False
    """Whether the target verifies each beam as a separate chain instead of sharing common prefixes."""
    lookup: bool | None = None
    """Whether continuations found in the text join the drafts; None keeps the shape's own lookup."""

    @property
    def layers(self) -> Sequence[int]:
        """The target's layers that the method reads."""
        return self.method.layers

    def shape(self, batch: int) -> DraftShape:
        """The fixed shape, or the method's, with or without lookup."""
        shape = self.fixed or self.method.shape(batch)
        return shape if self.lookup is None else shape.with_lookup(self.lookup)

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """The method's proposer with the change.  Raises RedrafterError if flat beams are requested of a fixed tree."""
        proposer = self.method.proposer(target, shape)
        if proposer is None:
            return None
        if self.coupled is not None:
            proposer = _ChangedProposer(proposer, noise=partial(_with_coupling, coupled=self.coupled))
        if self.flat:
            # a beam search scores more candidates than its beams hold; a fixed tree, such as Medusa's, does not
            complete = shape.node_budget is None and not shape.lookup and proposer.size == shape.max_nodes
            all_candidates = shape.model_copy(update={"node_budget": shape.num_candidates})
            largest = self.method.proposer(target, all_candidates) if complete else None
            if largest is None or largest.size != shape.num_candidates:
                raise RedrafterError("the method does not draft complete beams, so they cannot be flattened.")
            proposer = _ChangedProposer(proposer, tree=partial(flat_beams, width=shape.beam_width))
        return proposer


class _ChangedProposer(Proposer):
    """A proposer whose sampling noise or trees are replaced."""

    def __init__(
        self,
        proposer: Proposer,
        noise: Callable[[SamplingNoise], SamplingNoise] = lambda noise: noise,
        tree: Callable[[DraftTree], DraftTree] = lambda tree: tree,
    ):
        self._proposer, self._noise, self._tree = proposer, noise, tree
        self.length, self.size, self.positions = proposer.length, proposer.size, proposer.positions
        self.modules = proposer.modules
        self.memory, self.read = proposer.memory, proposer.read  # type: ignore[method-assign]

    def prepare(self) -> Proposer:
        """A changed version of the prepared proposer."""
        return _ChangedProposer(self._proposer.prepare(), self._noise, self._tree)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """The proposer's trees with the change."""
        return self._tree(self._proposer.propose(memory, rows, context, self._noise(noise)))


@dataclass(frozen=True)
class _FixedCoupling(SamplingNoise):
    """Sampling noise that ranks drafts, or does not, whatever the drafter requests."""

    ranks: bool = True

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """As in the base class, without regard to `coupled`."""
        return super().ranking(self.ranks, names)


def _with_coupling(noise: SamplingNoise, coupled: bool) -> SamplingNoise:
    return _FixedCoupling(**vars(noise), ranks=coupled)


def flat_beams(tree: DraftTree, width: int) -> DraftTree:
    """Splits a prefix tree of `width` distinct beams into one chain per beam below the root."""
    length = (tree.size - 1) // width
    levels = [tree.valid.sum(dim=1, keepdim=True) - width + torch.arange(width, device=tree.tokens.device)]
    for _ in range(length - 1):  # from the last tokens of the beams, which are the last nodes, towards the root
        levels.insert(0, tree.parents.gather(1, levels[0]))
    return parallel_chains(tree.tokens[:, 0], torch.stack([tree.tokens.gather(1, nodes) for nodes in levels], dim=2))
