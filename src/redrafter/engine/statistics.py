"""Counts of a long-lived engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from redrafter.engine.results import Event


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the engine started, and its load now."""

    running: int
    waiting: int
    slots: int
    requests: dict[str, int]
    """Ended requests by finish reason, and "error"."""
    prompt_tokens: int
    generated_tokens: int
    steps: int
    """Forward passes that wrote tokens, each for all running requests."""
    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_by_position: list[int]
    cache_usage: float
    """Share of the positions for keys and values that are in use."""
    prefix_queries: int
    """Prompt tokens that were looked up among the texts in the cache."""
    prefix_hits: int
    """Prompt tokens whose keys and values were found there."""


@dataclass
class Counts:
    """The part of the statistics that only grows."""

    accepted_by_position: list[int]
    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, outcome: Event | Exception) -> bool:
        """Counts what a request received; returns whether that ended it."""
        if isinstance(outcome, Exception):
            self.requests["error"] += 1
            return True
        self.generated_tokens += len(outcome.tokens)
        self.drafts += outcome.drafted > 0
        self.drafted_tokens += outcome.drafted
        self.accepted_tokens += outcome.accepted
        for position in range(outcome.accepted):
            self.accepted_by_position[position] += 1
        if outcome.finish_reason is not None:
            self.requests[outcome.finish_reason] += 1
        return outcome.finish_reason is not None

    def snapshot(self, **load: Any) -> EngineStatistics:
        """The statistics with the `load` now."""
        own = vars(self) | {"requests": dict(self.requests), "accepted_by_position": [*self.accepted_by_position]}
        return EngineStatistics(**own, **load)
