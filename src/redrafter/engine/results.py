"""The results of decoding: events, finished rows and counts.

Does not know how they are computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

FinishReason = Literal["eos", "stop", "length", "cancelled"]
"""An end token; a stop string or another criterion; the maximum length; the caller."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and those of the most likely tokens, best first.

    They are natural logarithms of the model's own probabilities, before penalties, temperature and truncation.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Event:
    """Tokens of one row from one step: `accepted` drafted tokens, then at most one token of the target.

    `step` numbers the forward passes of the batch.  `text` is the text that the tokens add, if a tokenizer was given;
    `scores` and `logits` [tokens, V], and one entry of `logprobs` per token, are set if requested.
    """

    row: int
    tokens: list[int]
    accepted: int
    drafted: int
    finish_reason: FinishReason | None
    step: int = 0
    text: str | None = None
    scores: Float[Tensor, "tokens V"] | None = None
    logits: Float[Tensor, "tokens V"] | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Stats:
    """Counts of a generation; `rows` holds the same for every row.

    `steps`: forward passes of the target that wrote tokens, without those that only read prompts; without a drafter
    `tokens == steps`.  `drafted`: proposed tokens.  `accepted`: proposed tokens that were kept.
    `accepted_by_position[i]`: steps that accepted a token at depth i + 1.  `seconds`: wall time including the prompt;
    for a row, until it finished.
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
        """Mean number of tokens per forward pass of the target (acceptance length); 1 without a drafter."""
        return self.tokens / max(1, self.steps)

    def count(self, event: Event) -> None:
        """Adds an event."""
        self.steps += 1
        self.tokens += len(event.tokens)
        self.drafted += event.drafted
        self.accepted += event.accepted
        for position in range(event.accepted):
            self.accepted_by_position[position] += 1

    @classmethod
    def total(cls, rows: list[Stats], *, seconds: float) -> Stats:
        """The sum over rows that were decoded together in `seconds` seconds."""
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
    """`sequences` [B, longest]: prompt and new tokens of every row, padded on the right.

    `new_tokens`: new tokens of every row, and `texts` their text, if a tokenizer was given.  `scores` and `logits`
    [new, V]: what each token was chosen from, after and before the processors, and `logprobs`, one entry for each new
    token, if requested.
    """

    sequences: Int[Tensor, "B T"]
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    stats: Stats
    texts: list[str] | None = None
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    logprobs: list[list[TokenLogprob]] | None = None


@dataclass(frozen=True)
class Finished:
    """A finished row."""

    row: int
    new_tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    text: str
    scores: Tensor
    logits: Tensor
    logprobs: list[TokenLogprob] | None = None

    @classmethod
    def of(cls, events: list[Event], stats: Stats) -> Finished:
        """The row of these events, the last of which has a finish reason."""
        last = events[-1]
        assert last.finish_reason is not None
        logprobs = [one for event in events for one in event.logprobs or ()]
        return cls(
            last.row,
            [token for event in events for token in event.tokens],
            last.finish_reason,
            stats,
            text="".join(event.text or "" for event in events),
            scores=_concatenated([event.scores for event in events]),
            logits=_concatenated([event.logits for event in events]),
            logprobs=logprobs if any(event.logprobs is not None for event in events) else None,
        )


def finished(events: Iterable[Event], *, rows: int, positions: int) -> Iterator[Finished]:
    """The rows of a stream, each when it finishes.  `positions` is the largest number of drafted tokens per path."""
    begin = time.perf_counter()
    by_row: list[list[Event]] = [[] for _ in range(rows)]
    for event in events:
        own = by_row[event.row]
        own.append(event)
        if event.finish_reason is None:
            continue
        stats = Stats(accepted_by_position=[0] * positions)
        for one in own:
            stats.count(one)
        stats.seconds = time.perf_counter() - begin
        yield Finished.of(own, stats)
        own.clear()


def _concatenated(parts: list[Tensor | None]) -> Tensor:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else torch.zeros((0, 0))
