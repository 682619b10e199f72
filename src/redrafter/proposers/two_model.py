"""Two-model speculative decoding: a smaller causal language model drafts (arXiv 2211.17192, 2302.01318).

With more than one beam its drafts are trees, as in SpecInfer (arXiv 2305.09781).  Promises that the draft model sees
the text as the target does, through the same masks and kernels, and keeps keys and values of its own.  Does not know
how its drafts are judged: here that is by the target's own draw, so its probabilities are not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import DraftTree, chain, parallel_chains
from redrafter.errors import RedrafterError
from redrafter.proposers.base import ByText, Ready
from redrafter.proposers.beam_search import search
from redrafter.proposers.trees import beyond, check_shape, size_of, tree_of
from redrafter.targets.target import Target


@dataclass(frozen=True)
class TwoModel(ByText):
    """Drafts by another causal language model of transformers that has the target's vocabulary and device.

    By default a chain of its greedy continuation.  When sampling it ranks by its own probabilities under the target's
    temperature and truncation and by the noise that the target is about to draw with, as all methods do here; without
    `coupled`, by its probabilities alone.
    """

    beam_length = 5

    model: nn.Module
    coupled: bool = True

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> TwoModelProposer | None:
        """What drafts so for a target; None for a length of 0.

        Raises RedrafterError where the draft model has another vocabulary, is elsewhere or cannot run trees.
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
        check_shape(width, length, budget, tokens=draft.vocab_size)
        return TwoModelProposer(draft, width, length, budget, self.coupled) if length else None


@dataclass(frozen=True)
class TwoModelProposer(Ready):
    """Drafts `width` beams of `length` tokens by a model, or of all that they weigh the `budget` most probable nodes.

    Its memory holds at slot p what the draft model keeps of the text's position p.  A draft begins by taking in the
    text's last L + 1 tokens, among which are all that the last step wrote; beams then lie behind the root, where a
    later draft writes over them.  Texts longer than the draft model's context are drafted worse, and right all the
    same.
    """

    draft: Target
    width: int
    length: int
    budget: int | None = None
    coupled: bool = True

    @property
    def size(self) -> int:
        """The budget; without one, nodes where no two beams share a prefix."""
        return size_of(self.width, self.length, self.budget)

    @property
    def positions(self) -> int:
        """The target's states are not read; decoding keeps one."""
        return 1

    @property
    def modules(self) -> tuple[nn.Module]:
        """The draft model."""
        return (self.draft.module,)

    def memory(self, *, batch: int, slots: int) -> SlotCache:
        """Its keys and values, with room for the beams."""
        return self.draft.new_cache(batch=batch, slots=slots + beyond(self.width, self.length, self.budget))

    def read(self, memory: SlotCache | None, place: RowState, states: Tensor, start: int) -> None:
        """Takes in the same tokens as the target."""
        assert memory is not None
        tokens = place.text[:, start : start + states.shape[1]]
        begin = torch.full_like(place.length, start)
        self.draft.forward(chain(tokens), begin, memory, select=begin[:, None] * 0)

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root."""
        assert memory is not None
        after_root = self._take_in(memory, place)
        root = place.root

        def following(beams: Tensor, parents: Tensor) -> Tensor:
            count, depth = beams.shape[1:]
            if not depth:
                return after_root
            tree = parallel_chains(root, beams)
            ends = torch.arange(tree.size - count, tree.size, device=root.device).expand(len(root), -1)
            return self.draft.forward(tree, place.length, memory, select=ends)[1]

        adjust = draw.ranking(self.coupled)
        found = search(following, root, width=self.width, length=self.length, adjust=adjust)
        return tree_of(root, found, self.budget)

    def _take_in(self, memory: SlotCache, place: RowState) -> Float[Tensor, "B 1 V"]:
        """Runs the text's last L + 1 tokens again, each into its slot; the logits after the root.

        Of a shorter text all, and the root once more behind it, where nothing is looked up.
        """
        begin = (place.length - self.length).clamp(min=0)
        index = begin[:, None] + torch.arange(self.length + 1, device=begin.device)
        root = place.root[:, None]
        tokens = torch.where(index < place.length[:, None], place.text.gather(1, index), root)
        select = (place.length - begin)[:, None]
        return self.draft.forward(chain(tokens), begin, memory, select)[1]
