"""The shape of a draft: beam width, beam length and node budget.

Guarantees that a shape is consistent.  Does not know torch, nor which drafter can draft in a shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from redrafter.errors import RedrafterError

MAX_NODES = 1024
"""Limit on the nodes of a tree that a config stores, including the root."""


LOOKUP_CHAINS, LOOKUP_LENGTH = 4, 10
"""Continuations that are looked up in a text by default, and their tokens."""


def counted(number: int, noun: str) -> str:
    """`"1 token"`, `"2 tokens"`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class DraftShape(BaseModel):
    """How to draft.

    `beam_width` beams of `beam_length` drafted tokens (the guaranteed token is not counted); a length of 0 decodes
    without drafting.  With a `node_budget`, the tree holds that many most probable candidates, including the root,
    instead of complete beams.  `lookup` is the number of tokens of continuations found in the text itself, which join
    the tree; 0 for none.  `batch` is the smallest number of rows decoded together that the shape is meant for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch: PositiveInt = 1
    beam_width: PositiveInt
    beam_length: NonNegativeInt
    node_budget: PositiveInt | None = None
    lookup: NonNegativeInt = 0

    @property
    def num_candidates(self) -> int:
        """Nodes that a beam search of this shape scores, including the root."""
        return 1 + self.beam_width + (self.beam_length - 1) * self.beam_width**2

    @property
    def beam_nodes(self) -> int:
        """Nodes of the tree of the beam search: the budget, or as many as if no two beams share a prefix."""
        if self.node_budget:
            return min(self.node_budget, self.num_candidates)
        return 1 + self.beam_width * self.beam_length

    @property
    def max_nodes(self) -> int:
        """Nodes of the tree, with those that are found in the text.  A budget limits both together."""
        if self.node_budget:
            return min(self.node_budget, self.num_candidates + LOOKUP_CHAINS * self.lookup)
        return self.beam_nodes + self.lookup

    @property
    def depth(self) -> int:
        """The largest number of drafted tokens on a path."""
        return max(self.beam_length, min(self.lookup, self.max_nodes - 1))

    @property
    def extra_slots(self) -> int:
        """Cache slots that beams need in addition to those of the tree.  The last tokens are never run."""
        return max(0, 1 + self.beam_width * (self.beam_length - 1) - self.max_nodes)

    @property
    def description(self) -> str:
        """For reports, such as `"4 beams of 5 tokens, the 21 most probable nodes"`."""
        if not self.beam_length:
            return "without drafting"
        budget = f", the {self.node_budget} most probable nodes" if self.node_budget else ""
        beams = "one beam" if self.beam_width == 1 else f"{self.beam_width} beams"
        lookup = ", with lookup" if self.lookup else ""
        return f"{beams} of {counted(self.beam_length, 'token')}{budget}{lookup}"

    def with_lookup(self, lookup: bool = True) -> DraftShape:
        """The same shape with the default length of lookup, or without lookup."""
        return self.model_copy(update={"lookup": LOOKUP_LENGTH if lookup and self.beam_length else 0})

    def check(self, *, vocabulary: int) -> None:
        """Raises RedrafterError if a drafter that scores `vocabulary` tokens cannot draft in this shape."""
        if self.beam_width > vocabulary:
            raise RedrafterError(
                f"beam_width must lie between 1 and the drafter's {vocabulary} tokens, not {self.beam_width}."
            )
        check_budget(self.beam_length, self.node_budget)


def check_budget(length: int, budget: int | None) -> None:
    """Raises RedrafterError if a node budget cannot contain a path of `length` drafted tokens."""
    if budget is not None and budget < length + 1:
        raise RedrafterError(f"node_budget must hold the root and {length} drafted tokens, not be {budget}.")


@dataclass(frozen=True)
class ShapeOverrides:
    """The parts of a draft's shape that a caller sets.  None leaves a part to the drafter.

    `lookup` switches continuations found in the text on or off.
    """

    beam_width: int | None = None
    beam_length: int | None = None
    node_budget: int | None = None
    lookup: bool | None = None

    def __bool__(self) -> bool:
        """Whether any part of the beam search is set."""
        return (self.beam_width, self.beam_length, self.node_budget) != (None, None, None)

    def applied_to(self, shape: DraftShape) -> DraftShape:
        """The shape with these parts replaced.  Raises RedrafterError for values that no drafter can use."""
        width = shape.beam_width if self.beam_width is None else self.beam_width
        length = shape.beam_length if self.beam_length is None else self.beam_length
        budget = shape.node_budget if self.node_budget is None else self.node_budget
        if length < 0:
            raise RedrafterError(f"beam_length must be at least 1, or 0 to decode without drafting, not {length}.")
        if width < 1:
            raise RedrafterError(f"beam_width must be at least 1, not {width}.")
        check_budget(length, budget)
        lookup = shape.lookup if length else 0
        return DraftShape(batch=shape.batch, beam_width=width, beam_length=length, node_budget=budget, lookup=lookup)
