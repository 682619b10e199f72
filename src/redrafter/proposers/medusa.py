"""Medusa heads as a proposer: a tree of constant form, filled with the best tokens of each head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, ancestors_of
from redrafter.errors import RedrafterError
from redrafter.heads.medusa import MedusaHeads, drafted_paths
from redrafter.kernels.topk import topk
from redrafter.proposers.base import Proposer
from redrafter.targets.target import Target


class MedusaProposer(Proposer):
    """Drafts the paths of the heads' tree that the shape allows (see `MedusaConfig`)."""

    def __init__(self, heads: MedusaHeads, target: Target, shape: DraftShape):
        """Raises RedrafterError for a length above the number of heads."""
        if shape.beam_length > heads.config.heads:
            raise RedrafterError(
                f"beam_length must be at most {heads.config.heads}, the number of heads, not {shape.beam_length}."
            )
        paths = drafted_paths(heads.config.tree, shape)
        number = {path: node for node, path in enumerate([(), *paths])}
        self.heads, self.modules = heads, (heads,)
        self.length, self.size = shape.beam_length, len(number)
        self.depths = max(map(len, number))
        self.ranks = 1 + max(max(path) for path in paths)

        def constant(values: list[int]) -> Tensor:
            return torch.tensor(values, device=heads.device)

        self._picked = constant([(len(path) - 1) * self.ranks + path[-1] for path in paths])
        self._parents = constant([0, *(number[path[:-1]] for path in paths)])[None]
        self._depth = constant([len(path) for path in number])[None]
        self._valid = torch.ones_like(self._depth, dtype=torch.bool)
        self._ancestors = ancestors_of(self._parents, max_depth=self.depths)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root.  The heads compute in their own dtype and rank by the target's sampling noise."""
        batch = len(context)
        logits = self.heads.logits(context[:, -1].to(self.heads.dtype), self.depths)
        if adjust := noise.ranking(names=self.heads.draft_vocabulary):
            logits = torch.cat([adjust(one, depth) for depth, one in enumerate(logits.split(1, dim=1))], dim=1)
        best = topk(logits.flatten(0, 1), self.ranks)
        picked = best.ids.view(batch, -1)[:, self._picked]  # of [B, depths · ranks]
        tokens = self.heads.to_target_ids(picked)
        gains = (best.values - best.logsumexp[:, None]).view(batch, -1)[:, self._picked]
        along = torch.nn.functional.pad(gains, (1, 0))[:, None].where(self._ancestors, 0)
        return DraftTree(
            torch.cat((rows.root[:, None], tokens), dim=1),
            self._parents.expand(batch, -1),
            self._depth.expand(batch, -1),
            self._valid.expand(batch, -1),
            self._ancestors.expand(batch, -1, -1),
            along.sum(dim=2),
        )
