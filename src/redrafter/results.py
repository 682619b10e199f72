"""What decoding gives back: events as they come, rows as they end, counts in the field's words.

Does not know how any of it came about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Int
from torch import Tensor

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class Event:
    """Tokens of one row from one step: `accepted` drafted ones, then at most one that the target wrote alone."""

    row: int
    tokens: list[int]
    accepted: int
    drafted: int
    finish_reason: FinishReason | None


@dataclass
class Stats:
    """Counts of a generation, in vLLM's words; `rows` holds the same for every row.

    `steps`: runs of the target that wrote tokens, the prompt's own run counted as one, so that without a drafter
    `tokens == steps`.  `drafted`: tokens proposed, `accepted`: those kept, `accepted_by_position[i]`: steps that kept a
    drafted token at depth i + 1.  `seconds`: wall time, prompt included; for a row, until it ended.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    seconds: float = 0.0
    rows: list[Stats] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens written for each run of the target; 1 without a drafter."""
        return self.tokens / max(1, self.steps)

    def count(self, event: Event) -> None:
        """Adds one event of a row."""
        self.steps += 1
        self.tokens += len(event.tokens)
        self.drafted += event.drafted
        self.accepted += event.accepted
        for position in range(event.accepted):
            self.accepted_by_position[position] += 1


@dataclass(frozen=True)
class Generation:
    """`sequences` [B, longest]: prompt and new tokens of every row, padded right; `new_tokens`: the new ones alone."""

    sequences: Int[Tensor, "B T"]
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    stats: Stats


@dataclass(frozen=True)
class Finished:
    """A row that has ended, with all that it wrote."""

    row: int
    new_tokens: list[int]
    finish_reason: FinishReason
    stats: Stats


def finished(events: Iterable[Event], *, rows: int, positions: int) -> Iterator[Finished]:
    """The rows of a stream, each as it ends; `positions` is the drafted tokens of a step."""
    begin = time.perf_counter()
    new: list[list[int]] = [[] for _ in range(rows)]
    stats = [Stats(accepted_by_position=[0] * positions) for _ in range(rows)]
    for event in events:
        new[event.row] += event.tokens
        stats[event.row].count(event)
        if event.finish_reason is not None:
            stats[event.row].seconds = time.perf_counter() - begin
            yield Finished(event.row, new[event.row], event.finish_reason, stats[event.row])
