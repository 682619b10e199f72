"""The shape of a draft: beams, their length and a budget of nodes.

Promises that a shape that exists can be drafted.  Does not know torch.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

MOST_NODES = 1024
"""Of a tree that is kept in a config, the root counted."""


def counted(number: int, noun: str) -> str:
    """So many of what a noun names."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class DraftShape(BaseModel):
    """How to draft where `batch` rows or more are decoded together.

    `beam_length` counts drafted tokens only; 0 decodes without drafting.  With a `node_budget` the so many most
    probable nodes are drafted, the root counted, not whole beams.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch: PositiveInt = 1
    beam_width: PositiveInt
    beam_length: NonNegativeInt
    node_budget: PositiveInt | None = None

    @property
    def in_words(self) -> str:
        """Beams and budget."""
        if not self.beam_length:
            return "without drafting"
        budget = f", the {self.node_budget} most probable nodes" if self.node_budget else ""
        beams = "one beam" if self.beam_width == 1 else f"{self.beam_width} beams"
        return f"{beams} of {counted(self.beam_length, 'token')}{budget}"
