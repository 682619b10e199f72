"""What decoding gives back: events as they come, rows as they end, counts in the field's words.

Does not know how any of it came about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

FinishReason = Literal["eos", "stop", "length"]
"""An end token; a stop string or another criterion; no token left to write."""


@dataclass(frozen=True)
class Event:
    """Tokens of one row from one step: `accepted` drafted ones, then at most one that the target wrote alone.

    `text` is what they add to the row's text, where a tokenizer was given; `scores` and `logits` [tokens, V] where they
    were asked for.
    """

    row: int
    tokens: list[int]
    accepted: int
    drafted: int
    finish_reason: FinishReason | None
    text: str | None = None
    scores: Float[Tensor, "tokens V"] | None = None
    logits: Float[Tensor, "tokens V"] | None = None


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
    rows: list[Stats] = field(default_factory=list, repr=False)

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

    @classmethod
    def total(cls, rows: list[Stats], *, seconds: float) -> Stats:
        """The sum over rows that were decoded together in `seconds`."""
        return cls(
            steps=sum(row.steps for row in rows),
            tokens=sum(row.tokens for row in rows),
            drafted=sum(row.drafted for row in rows),
            accepted=sum(row.accepted for row in rows),
            accepted_by_position=[sum(counts) for counts in zip(*(r.accepted_by_position for r in rows), strict=True)],
            seconds=seconds,
            rows=rows,
        )


@dataclass(frozen=True)
class Generation:
    """`sequences` [B, longest]: prompt and new tokens of every row, padded right; `new_tokens`: the new ones alone.

    `texts`: those as text, where a tokenizer was given.  `scores` and `logits` [new, V] of every row, where asked for:
    what each token was chosen from, after the processors and before them.
    """

    sequences: Int[Tensor, "B T"]
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    stats: Stats
    texts: list[str] | None = None
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None


@dataclass(frozen=True)
class Finished:
    """A row that has ended, with all that it wrote."""

    row: int
    new_tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    text: str
    scores: Tensor
    logits: Tensor


def finished(events: Iterable[Event], *, rows: int, positions: int) -> Iterator[Finished]:
    """The rows of a stream, each as it ends; `positions` is the drafted tokens of a step."""
    begin = time.perf_counter()
    written: list[list[Event]] = [[] for _ in range(rows)]
    for event in events:
        own = written[event.row]
        own.append(event)
        if event.finish_reason is None:
            continue
        stats = Stats(accepted_by_position=[0] * positions)
        for one in own:
            stats.count(one)
        stats.seconds = time.perf_counter() - begin
        yield Finished(
            event.row,
            [token for one in own for token in one.tokens],
            event.finish_reason,
            stats,
            text="".join(one.text or "" for one in own),
            scores=_stacked([one.scores for one in own]),
            logits=_stacked([one.logits for one in own]),
        )
        own.clear()


def _stacked(parts: list[Tensor | None]) -> Tensor:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else torch.zeros((0, 0))
