"""Two-model speculative decoding: a smaller causal language model drafts (arXiv 2211.17192, 2302.01318).

With more than one beam its drafts are trees, as in SpecInfer (arXiv 2305.09781).  Guarantees that the draft model sees
the text as the target does, through the same masks and kernels, with its own keys and values.  Verification uses the
target's own samples, so the draft model's probabilities are not needed for exactness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import PromptChunk, RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, chain, parallel_chains
from redrafter.errors import RedrafterError
from redrafter.proposers.base import Proposer
from redrafter.proposers.beam_search import search, tree_of
from redrafter.proposers.prompt_lookup import with_lookup
from redrafter.targets.target import Target


@dataclass(frozen=True)
class TwoModel:
    """Drafts with another transformers causal language model that has the target's vocabulary and device.

    The default draft is a greedy chain of five tokens.  When sampling, it ranks by the draft model's probabilities
    under the target's temperature and truncation and by the target's sampling noise; with `coupled=False`, by the
    probabilities alone.
    """

    model: nn.Module
    coupled: bool = True
    layers: tuple[int, ...] = ()

    def shape(self, batch: int) -> DraftShape:
        """One beam and lookup, for every batch size."""
        return DraftShape(beam_width=1, beam_length=5).with_lookup()

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """A proposer of that shape; None for a length of 0.

        Raises RedrafterError if the draft model has another vocabulary, is on another device or cannot run trees.
        """
        draft = Target(self.model)
        if draft.vocab_size != target.vocab_size:
            raise RedrafterError(
                f"The draft model has a vocabulary of {draft.vocab_size} tokens, the model one of {target.vocab_size}; "
                "they must be the same."
            )
        if draft.device != target.device:
            raise RedrafterError(
                f"The draft model is on {draft.device}, the model on {target.device}; move one of them."
            )
        shape.check(vocabulary=draft.vocab_size)
        if not shape.beam_length:
            return None
        return with_lookup(TwoModelProposer(draft, shape, self.coupled), shape)


class TwoModelProposer(Proposer):
    """Drafts beams with a model; with a budget, the tree of the most probable candidates.

    Slot p of the memory holds the draft model's keys and values of position p.  A draft begins by running the last
    L + 1 tokens of the text, which include everything that the last step wrote.  Beams go behind the root and are
    overwritten later.  Beyond the draft model's context length drafts are worse, but the text stays exact.
    """

    def __init__(self, draft: Target, shape: DraftShape, coupled: bool = True):
        self.draft, self.shape, self.coupled = draft, shape, coupled
        self.length, self.size = shape.depth, shape.beam_nodes
        self.modules = (draft.module,)

    def memory(self, *, batch: int, slots: int) -> SlotCache:
        """Keys and values of the draft model, with room for the beams."""
        return self.draft.new_cache(batch=batch, slots=slots + self.shape.extra_slots)

    def read(self, memory: SlotCache | None, chunk: PromptChunk, states: Float[Tensor, "V N state"]) -> None:
        """Runs the same tokens as the target."""
        assert memory is not None
        self.draft.read_prompt(chunk, memory)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root."""
        assert memory is not None
        after_root = self._run_latest(memory, rows)
        root = rows.root

        def following(beams: Tensor, parents: Tensor) -> Tensor:
            count, depth = beams.shape[1:]
            if not depth:
                return after_root
            tree = parallel_chains(root, beams)
            ends = torch.arange(tree.size - count, tree.size, device=root.device).expand(len(root), -1)
            return self.draft.forward(tree, rows.length, memory, select=ends)[1]

        beams = search(following, root, self.shape, adjust=noise.ranking(self.coupled))
        return tree_of(root, beams, self.shape)

    def _run_latest(self, memory: SlotCache, rows: RowState) -> Float[Tensor, "B 1 V"]:
        """Runs the last L + 1 tokens of the text, each into its slot, and returns the logits after the root.

        A shorter text runs completely, padded with the root in slots that are not read.
        """
        begin = (rows.length - self.length).clamp(min=0)
        index = begin[:, None] + torch.arange(self.length + 1, device=begin.device)
        tokens = torch.where(index < rows.length[:, None], rows.text.gather(1, index), rows.root[:, None])
        select = (rows.length - begin)[:, None]
        return self.draft.forward(chain(tokens), begin, memory, select)[1]
