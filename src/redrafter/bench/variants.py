"""Drafting methods with one property changed: a fixed shape, with or without coupled drafts, or flat beams.

Guarantees that a variant differs from its method in that property only and never changes the generated text.
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
from redrafter.proposers.trees import num_candidates, size_of
from redrafter.targets.target import Target


@dataclass(frozen=True)
class MethodVariant:
    """A method with a fixed shape, a fixed coupling, or flat beams."""

    method: Method
    shape: DraftShape | None = None
    coupled: bool | None = None
    """Whether drafts are ranked with the noise that the target samples with; None keeps the method's default."""
    flat: bool = False
    """Whether the target verifies each beam as a separate chain instead of sharing common prefixes."""

    @property
    def layers(self) -> Sequence[int]:
        """The target's layers that the method reads."""
        return self.method.layers

    def drafting(
        self, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
    ) -> tuple[int, int, int | None]:
        """The fixed shape, whatever is requested; the method's if there is none."""
        if self.shape is None:
            return self.method.drafting(batch, width, length, budget)
        return self.shape.beam_width, self.shape.beam_length, self.shape.node_budget

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> Proposer | None:
        """The method's proposer with the change.  Raises RedrafterError if flat beams need whole beams it lacks."""
        found = self.method.proposer(target, width, length, budget)
        if found is None:
            return None
        if self.coupled is not None:
            found = _ChangedProposer(found, noise=partial(_with_coupling, coupled=self.coupled))
        if self.flat:
            # a beam search scores more candidates than its beams hold; a fixed tree, such as Medusa's, does not
            candidates = num_candidates(width, length)
            whole = budget is None and found.size == size_of(width, length, None)
            largest = self.method.proposer(target, width, length, candidates) if whole else None
            if largest is None or largest.size != candidates:
                raise RedrafterError("the method does not draft whole beams, so they cannot be flattened.")
            found = _ChangedProposer(found, tree=partial(flat_beams, width=width))
        return found


class _ChangedProposer:
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
        self.memory, self.read = proposer.memory, proposer.read

    def quickened(self) -> Proposer:
        return _ChangedProposer(self._proposer.quickened(), self._noise, self._tree)

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        return self._tree(self._proposer.propose(memory, place, context, self._noise(draw)))


@dataclass(frozen=True)
class _FixedCoupling(SamplingNoise):
    """Sampling noise that ranks drafts, or does not, whatever the drafter requests."""

    ranks: bool = True

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        return super().ranking(self.ranks, names)


def _with_coupling(noise: SamplingNoise, coupled: bool) -> SamplingNoise:
    return _FixedCoupling(noise.warpers, noise.noise, coupled)


def flat_beams(tree: DraftTree, width: int) -> DraftTree:
    """Splits a prefix tree of `width` distinct beams into one chain per beam below the root."""
    length = (tree.size - 1) // width
    levels = [tree.valid.sum(dim=1, keepdim=True) - width + torch.arange(width, device=tree.tokens.device)]
    for _ in range(length - 1):  # from the last tokens of the beams, which are the last nodes, towards the root
        levels.insert(0, tree.parents.gather(1, levels[0]))
    return parallel_chains(tree.tokens[:, 0], torch.stack([tree.tokens.gather(1, nodes) for nodes in levels], dim=2))
