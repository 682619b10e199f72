"""An EAGLE head as a proposer: beams of predicted features, and the most probable candidates (EAGLE-2).

Guarantees that its memory holds the head's keys and values for the target's own features, whatever was drafted,
accepted or rejected before.  Uses the head's layer only through `EagleHead.forward`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import PromptChunk, RowState, SamplingNoise, at_positions
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, chain, parallel_chains, tree_mask
from redrafter.core.tree_attention import MAX_ATTENTION_NODES, bit_mask
from redrafter.heads.eagle import EagleHead
from redrafter.kernels import has_kernels
from redrafter.proposers.base import Proposer
from redrafter.proposers.beam_search import search, tree_of
from redrafter.targets.target import Target


class EagleProposer(Proposer):
    """Drafts beams; with a budget, the tree of the most probable candidates.

    Slot p of the memory holds the layer's keys and values for the target's feature at position p and the token after
    it.  A draft begins by running the last L + 1 positions
    before the root, which include everything that the last step wrote.  Beams go behind them and are overwritten later.
    """

    def __init__(self, head: EagleHead, target: Target, shape: DraftShape):
        self.head, self.target, self.shape = head, target, shape
        self.length, self.size = shape.depth, shape.beam_nodes
        self.positions = shape.depth + 1
        self.modules = (head,)

    def memory(self, *, batch: int, slots: int) -> SlotCache:
        """Keys and values of the layer, with room for the beams."""
        return self.head.new_cache(batch=batch, slots=slots + self.shape.extra_slots)

    def read(self, memory: SlotCache | None, chunk: PromptChunk, states: Float[Tensor, "V N state"]) -> None:
        """Runs the prompt's features with the tokens after them."""
        assert memory is not None
        features = self._features(states)
        trees = chain(chunk.following)
        if chunk.from_start:
            memory.window.rows, memory.window.only_new = chunk.rows, True
            index = torch.arange(trees.size, device=features.device)
            self._run(memory, trees, features, chunk.begin, (index[:, None] >= index)[None, None])
        elif self._has_kernels(features, trees):
            memory.window.rows, memory.window.only_new = chunk.rows, False
            self._run(memory, trees, features, chunk.begin, bit_mask(trees, chunk.begin, chunk.rows))
        else:
            for i, row in enumerate(chunk.rows.tolist()):
                view, one = memory.view(slice(row, row + 1)), slice(i, i + 1)
                view.window.visible = memory.window.visible
                self._run(view, chain(chunk.following[one]), features[one], chunk.begin[one])

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root."""
        features = self._features(context)
        assert memory is not None
        latest = self._run_latest(memory, rows, features)  # [B, beams, H]: the feature at each beam's last token
        given = latest[:, :, None][:, :, :0]  # [B, beams, depth, H]: those before its tokens
        root, begin = rows.root, rows.length.clamp(min=1) - 1  # before a text of one token is a feature of zeros

        def following(beams: Tensor, parents: Tensor) -> Tensor:
            nonlocal given, latest
            if beams.shape[2]:
                given = torch.cat((given, latest[:, :, None]), dim=2)
                given = given.gather(1, parents[..., None, None].expand(-1, -1, *given.shape[2:]))
                inputs = torch.cat((features[:, -1:], given.transpose(1, 2).flatten(1, 2)), dim=1)
                latest = self._run(memory, parallel_chains(root, beams), inputs, begin)[:, -beams.shape[1] :]
            return self.target.logits(latest.flatten(0, 1)).view(*latest.shape[:2], -1)

        beams = search(following, root, self.shape, adjust=noise.ranking(self.head.config.coupled))
        return tree_of(root, beams, self.shape)

    def _run_latest(
        self, memory: SlotCache, rows: RowState, features: Float[Tensor, "B positions hidden"]
    ) -> Float[Tensor, "B 1 hidden"]:
        """Runs the last L + 1 positions before the root, each into its slot, and returns the feature at the root.

        A shorter text runs completely, padded with its last position in slots that are not read.
        """
        end = rows.length[:, None].clamp(min=1)
        first = end - 1 - self.length  # position of the first feature
        begin = first.clamp(min=0)
        index = begin + torch.arange(self.length + 1, device=begin.device)
        seen = (index - first).clamp(max=self.length)
        tokens = rows.text.gather(1, (index + 1).minimum(rows.length[:, None]))
        output = self._run(memory, chain(tokens), at_positions(features, seen), begin[:, 0])
        return at_positions(output, end - 1 - begin)

    def _run(
        self,
        memory: SlotCache,
        tree: DraftTree,
        features: Float[Tensor, "B N hidden"],
        begin: Int[Tensor, " B"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "B N hidden"]:
        """Runs the head over nodes in slots `begin … begin + N - 1`.  A node's token follows its feature.

        Without a `mask`, nodes attend to the text and their ancestors in the first rows of the memory.
        """
        memory.window.slots = begin[:, None] + torch.arange(tree.size, device=begin.device)
        if mask is None:
            memory.window.rows, memory.window.only_new = None, False
            if self._has_kernels(features, tree):
                memory.window.visible = None
                mask = bit_mask(tree, begin)
            else:
                mask = tree_mask(tree, begin, slots=memory.visible)[:, None]
        elif not memory.window.only_new:
            memory.window.visible = None
        embeddings = self.target.embed(tree.tokens)
        return self.head(embeddings, features, begin[:, None] + tree.depth, mask, memory)  # type: ignore[no-any-return]

    @staticmethod
    def _has_kernels(features: Tensor, tree: DraftTree) -> bool:
        return has_kernels(features.device, features.dtype) and tree.size <= MAX_ATTENTION_NODES

    def _features(self, states: Float[Tensor, "B P state"]) -> Float[Tensor, "B P hidden"]:
        """The output head's inputs in the head's dtype."""
        return states[..., -self.target.hidden_size :].to(self.head.dtype)
