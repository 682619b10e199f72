"""The interface of the continuous-batching engine.  A placeholder: the branch `engine` replaces this module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from redrafter.core.shapes import DraftShape
from redrafter.engine.results import Event, Finished, Stats
from redrafter.errors import RedrafterError


class EngineFull(RedrafterError):
    """Too many requests wait."""


class EngineClosed(RedrafterError):
    """The engine accepts no more requests."""


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the start."""

    running: int
    waiting: int
    slots: int
    requests: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    steps: int
    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_by_position: list[int]
    cache_usage: float
    prefix_hits: int
    prefix_queries: int


class Submission:
    """A submitted request."""

    prompt: list[int]
    stats: Stats

    def __iter__(self) -> Iterator[Event]:
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[Event]:
        raise NotImplementedError

    def cancel(self) -> None:
        """Ends the request."""
        raise NotImplementedError

    def result(self, timeout: float | None = None) -> Finished:
        """Waits for the end."""
        raise NotImplementedError


class Engine:
    """Decodes requests in one batch."""

    max_length: int
    slots: int
    vocab_size: int
    context_length: int | None

    def __init__(
        self,
        model: Any,
        drafter: Any = None,
        *,
        tokenizer: Any = None,
        slots: int = 32,
        max_length: int | None = None,
        max_waiting: int = 256,
        shape: DraftShape | None = None,
        prefill_tokens: int | None = None,
        fast: bool = True,
        compile: bool = False,
    ):
        raise NotImplementedError

    def submit(self, prompt: Sequence[int], **settings: Any) -> Submission:
        """Adds a request."""
        raise NotImplementedError

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts nothing new and waits."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends everything."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """What is loaded."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
