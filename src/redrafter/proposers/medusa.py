"""Medusa heads as a proposer: a tree of the same form in every step, filled with each head's best tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import DraftTree, ancestors_of
from redrafter.heads.medusa import MedusaHeads, drawn_from
from redrafter.kernels.topk import top
from redrafter.proposers.base import Memoryless


class MedusaProposer(Memoryless):
    """Drafts the paths of the heads' tree that hold ranks below `width` and at most `length` tokens.

    With a `budget` they are the first of those, up to so many nodes.
    """

    positions = 1

    def __init__(self, heads: MedusaHeads, width: int, length: int, budget: int | None = None):
        """The tree's form goes to the heads' device here, once."""
        self.heads, self.length = heads, length
        paths = drawn_from(heads.config.tree, width, length, budget)
        number = {path: node for node, path in enumerate([(), *paths])}
        self.size = len(number)
        self.depths = max(map(len, number))
        self.ranks = 1 + max(max(path) for path in paths)

        def held(values: list[int]) -> Tensor:
            return torch.tensor(values, device=heads.device)

        self._picked = held([(len(path) - 1) * self.ranks + path[-1] for path in paths])
        self._parents = held([0, *(number[path[:-1]] for path in paths)])[None]
        self._depth = held([len(path) for path in number])[None]
        self._valid = torch.ones_like(self._depth, dtype=torch.bool)
        self._ancestors = ancestors_of(self._parents, max_depth=self.depths)

    @property
    def modules(self) -> tuple[MedusaHeads]:
        """The heads."""
        return (self.heads,)

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root; the heads compute in their own dtype, and coupled to the target's draws."""
        batch = len(context)
        logits = self.heads.logits(context[:, -1].to(self.heads.dtype), self.depths)
        if adjust := draw.ranking(names=self.heads.draft_vocabulary):
            logits = torch.cat([adjust(one, depth) for depth, one in enumerate(logits.split(1, dim=1))], dim=1)
        best = top(logits.flatten(0, 1), self.ranks).ids.view(batch, -1)  # [B, depths · ranks]
        tokens = self.heads.to_target_ids(best[:, self._picked])
        return DraftTree(
            torch.cat((place.root[:, None], tokens), dim=1),
            self._parents.expand(batch, -1),
            self._depth.expand(batch, -1),
            self._valid.expand(batch, -1),
            self._ancestors.expand(batch, -1, -1),
        )
