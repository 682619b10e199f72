"""An EAGLE head as a proposer: beams of features, and of all that they weighed the best nodes (EAGLE-2).

Promises that its memory holds what the head keeps of the target's own features, whatever was drafted, accepted or
rejected before.  Does not know the head's layer but as `EagleHead.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import DraftTree, chain, parallel_chains, tree_mask
from redrafter.core.tree_attention import packed
from redrafter.heads.eagle import EagleHead
from redrafter.kernels import has_kernels
from redrafter.proposers.base import Ready
from redrafter.proposers.beam_search import search
from redrafter.proposers.trees import beyond, size_of, tree_of
from redrafter.targets.target import MAX_ATTENTION_NODES, Target


@dataclass(frozen=True)
class EagleProposer(Ready):
    """Drafts `width` beams of `length` tokens, or of all that they weigh the `budget` most probable nodes.

    Its memory holds at slot p what the layer keeps of the target's feature at position p and the token after it.  So a
    prompt's last slot waits for the root, and a draft begins by taking in the last L + 1 positions before the root,
    among which are all that the last step wrote; beams then lie behind them, where a later draft writes over them.
    """

    head: EagleHead
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
        """As many as a step may write."""
        return self.length + 1

    @property
    def modules(self) -> tuple[nn.Module]:
        """The head."""
        return (self.head,)

    def memory(self, *, batch: int, slots: int) -> SlotCache:
        """The layer's keys and values, with room for the beams."""
        return self.head.new_cache(batch=batch, slots=slots + beyond(self.width, self.length, self.budget))

    def read(self, memory: SlotCache | None, place: RowState, states: Float[Tensor, "B P state"], start: int) -> None:
        """Takes in the prompt's features with the tokens after them; after its last one, whatever stands there yet."""
        index = start + 1 + torch.arange(states.shape[1], device=states.device)
        tokens = place.text[:, index.clamp(max=place.text.shape[1] - 1)]
        self._run(memory, chain(tokens), self._features(states), torch.full_like(place.length, start))

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root."""
        features = self._features(context)
        latest = self._take_in(memory, place, features)  # [B, beams, H]: the feature at each beam's last token
        given = latest[:, :, None][:, :, :0]  # [B, beams, depth, H]: those before its tokens
        root = place.root

        def following(beams: Tensor, parents: Tensor) -> Tensor:
            nonlocal given, latest
            if beams.shape[2]:
                given = torch.cat((given, latest[:, :, None]), dim=2)
                given = given.gather(1, parents[..., None, None].expand(-1, -1, *given.shape[2:]))
                above = torch.cat((features[:, -1:], given.transpose(1, 2).flatten(1, 2)), dim=1)
                latest = self._run(memory, parallel_chains(root, beams), above, place.length - 1)[:, -beams.shape[1] :]
            return self.target.logits(latest.flatten(0, 1)).view(*latest.shape[:2], -1)

        adjust = draw.ranking(self.head.config.coupled)
        found = search(following, root, width=self.width, length=self.length, adjust=adjust)
        return tree_of(root, found, self.budget)

    def _take_in(
        self, memory: SlotCache | None, place: RowState, features: Float[Tensor, "B positions hidden"]
    ) -> Float[Tensor, "B 1 hidden"]:
        """Runs the last L + 1 positions before the root again, each into its slot; the feature at the root.

        Of a shorter text all, and its last one again behind them, where nothing is looked up.
        """
        first = place.length[:, None] - 1 - self.length  # position of the first of the features
        begin = first.clamp(min=0)
        index = begin + torch.arange(self.length + 1, device=begin.device)
        seen = (index - first).clamp(max=self.length)
        tokens = place.text.gather(1, (index + 1).minimum(place.length[:, None]))
        found = self._run(memory, chain(tokens), _at(features, seen), begin[:, 0])
        return _at(found, place.length[:, None] - 1 - begin)

    def _run(
        self,
        memory: SlotCache | None,
        tree: DraftTree,
        features: Float[Tensor, "B N hidden"],
        begin: Int[Tensor, " B"],
    ) -> Float[Tensor, "B N hidden"]:
        """The head over nodes that take the slots `begin … begin + N - 1`; a node's token is the one after its feature.

        The mask is a packed one where the kernels of `fast.attention` can read it.
        """
        assert memory is not None
        memory.window.slots = begin[:, None] + torch.arange(tree.size, device=begin.device)
        if has_kernels(features.device, features.dtype) and tree.size <= MAX_ATTENTION_NODES:
            memory.window.visible = None
            mask = packed(tree, begin)
        else:
            mask = tree_mask(tree, begin, slots=memory.visible)[:, None]
        return self.head(  # type: ignore[no-any-return]
            self.target.embed(tree.tokens), features, begin[:, None] + tree.depth, mask, memory
        )

    def _features(self, states: Float[Tensor, "B P state"]) -> Float[Tensor, "B P hidden"]:
        """What the output head reads, in the head's own dtype."""
        return states[..., -self.target.hidden_size :].to(self.head.dtype)


def _at(features: Float[Tensor, "B P hidden"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M hidden"]:
    """Each row's features at some places."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
