"""What methods that draft by beams share: which shapes can be drafted, and the trees that come of them."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, most_probable, prefix_tree
from redrafter.errors import RedrafterError
from redrafter.proposers.base import Proposer
from redrafter.proposers.beam_search import Search


def num_candidates(width: int, length: int) -> int:
    """Nodes that a beam search looks at, the root counted."""
    return 1 + width + (length - 1) * width**2


def size_of(width: int, length: int, budget: int | None) -> int:
    """Nodes of a draft's tree: the budget; without one, nodes where no two beams share a prefix."""
    return min(budget, num_candidates(width, length)) if budget else 1 + width * length


def beyond(width: int, length: int, budget: int | None) -> int:
    """Slots that beams in a memory need beside those of the tree; their last tokens are never taken in."""
    return max(0, 1 + width * (length - 1) - size_of(width, length, budget))


def tree_of(root: Int[Tensor, " B"], found: Search, budget: int | None) -> DraftTree:
    """Beams folded; with a budget the root and the most probable of all nodes that the search weighed."""
    if not budget:
        return prefix_tree(root, found.beams)
    width, length = found.beams.shape[1:]
    return most_probable(root, found.levels, size=size_of(width, length, budget))


def drafted_in_words(proposer: Proposer, shape: DraftShape) -> str:
    """A shape as its proposer drafts it, which need not be in beams."""
    in_beams = all(getattr(one, "by_beams", True) for one in proposer.modules)
    if in_beams and proposer.size == size_of(shape.beam_width, shape.beam_length, shape.node_budget):
        return shape.in_words
    return f"a tree of {proposer.size} nodes, {shape.beam_length} deep"


def check_shape(width: int, length: int, budget: int | None, *, tokens: int) -> None:
    """Raises RedrafterError for what a drafter of so many tokens cannot draft."""
    if length < 0:
        raise RedrafterError(f"beam_length must be at least 1, or 0 to decode without drafting, not {length}.")
    if not 1 <= width <= tokens:
        raise RedrafterError(f"beam_width must lie between 1 and the drafter's {tokens} tokens, not {width}.")
    if budget is not None and budget < length + 1:
        raise RedrafterError(f"node_budget must hold the root and {length} drafted tokens, not be {budget}.")
