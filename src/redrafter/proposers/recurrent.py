"""The recurrent drafter as a proposer: beam search with the head, merged into one prefix tree per row.

Paper: arXiv 2403.09919, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise, at_positions
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.proposers.base import Proposer
from redrafter.proposers.beam_search import Search, search, tree_of
from redrafter.proposers.fused_drafter import FusedDrafter
from redrafter.targets.target import Target


class RecurrentProposer(Proposer):
    """Drafts beams and merges them into one tree per row; with a budget, the tree of the most probable candidates."""

    def __init__(self, drafter: RecurrentDrafter, target: Target, shape: DraftShape, fused: FusedDrafter | None = None):
        """`fused`: the drafter's layers combined into fewer products, made by `prepare`."""
        self.drafter, self.target, self.shape, self.fused = drafter, target, shape, fused
        self.length, self.size = shape.depth, shape.beam_nodes
        self.positions = drafter.config.context_positions
        self.modules = (drafter,)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Trees below the root.  The drafter computes in its own dtype and ranks by the target's sampling noise."""
        beams = beam_search(
            self.drafter,
            self._embed,
            context.flatten(1).to(self.drafter.dtype),
            rows.root,
            self.shape,
            adjust=noise.ranking(names=self.drafter.draft_vocabulary),
            fused=self.fused,
        )
        return tree_of(rows.root, beams, self.shape)

    def prepare(self) -> RecurrentProposer:
        """With fused products if kernels run."""
        if not has_kernels(self.drafter.device, self.drafter.dtype):
            return self
        return RecurrentProposer(self.drafter, self.target, self.shape, FusedDrafter.of(self.drafter, self._embed))

    def _embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        return self.target.embed(tokens).to(self.drafter.dtype)  # type: ignore[no-any-return]


def beam_search(
    drafter: RecurrentDrafter,
    embed: Callable[[Tensor], Tensor],
    context: Float[Tensor, "B features"],
    root: Int[Tensor, " B"],
    shape: DraftShape,
    *,
    adjust: Callable[[Tensor, int], Tensor] | None = None,
    fused: FusedDrafter | None = None,
) -> Search:
    """Continuations of the guaranteed token `root` and their log-probabilities under the drafter.

    `embed` is the target's token embedding, `context` the hidden states that the target chose `root` from.
    `adjust(logits, depth)` changes the head's logits [B, beams, head] before the softmax.
    """
    if shape.beam_width > drafter.config.head_size:
        raise ValueError(f"width {shape.beam_width} exceeds the {drafter.config.head_size} tokens that are scored")
    state = drafter.step(None, embed(root))[:, None]  # [B, 1, H], then [B, W, H]
    context = drafter.context(context)[:, None]
    read = drafter.read(context)
    seen = None if fused is None else drafter.seen(context.expand_as(state), state)
    carried = state  # the fused products' input to the next step

    def following(beams: Tensor, parents: Tensor) -> Tensor:
        nonlocal state, seen, carried
        depth = beams.shape[2]
        if fused is None or read is None:
            if depth:
                previous = at_positions(state, parents)
                state = drafter.step(previous, embed(beams[..., -1]))
            return drafter.logits(context.expand_as(state), state, read)
        if depth:
            state, seen = fused.moved(beams[..., -1], parents, carried, context)
        carried, first = fused.products(state, seen, read, last=depth == shape.beam_length - 1)
        return drafter.scores(first)

    return search(following, root, shape, adjust=adjust, names=drafter.draft_vocabulary)
