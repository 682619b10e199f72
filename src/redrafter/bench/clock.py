"""Decoding followed with a clock: what a call wrote, and the time of its steps.

Promises that prompts' own runs are not in the time of the steps, nor, on CUDA, the first steps of a call, in which a
graph is captured or code compiled.  Does not know who drafts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from redrafter.engine.results import Event, Stats
from redrafter.errors import RedrafterError, reason

CAPTURING = 3
"""Steps of a call until a graph is captured."""

TOO_SHORT = "The texts end before a step can be timed: let more tokens be written."


@dataclass
class Run:
    """What one call wrote, and its times in seconds."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    """New tokens by row."""
    stats: Stats = field(default_factory=Stats)
    """Of all rows and steps, the prompts' own counted."""
    first: list[float] = field(default_factory=list)
    """From a row's entry to its first token."""
    times: list[float] = field(default_factory=list)
    """Of each step that counts, all else that a call does between two steps included."""
    tokens: int = 0
    """That those steps wrote, of all rows."""

    @classmethod
    def joined(cls, runs: Sequence[Run]) -> Run:
        """Several calls as one, their rows numbered on."""
        found = cls(stats=Stats.total([run.stats for run in runs], seconds=0.0))
        for run in runs:
            found.texts |= {len(found.texts) + row: text for row, text in sorted(run.texts.items())}
            found.first += run.first
            found.times += run.times
            found.tokens += run.tokens
        return found

    @property
    def told(self) -> dict[str, Any]:
        """For a line of JSON, the texts aside.  Raises RedrafterError where no step counts."""
        if not self.times or not self.tokens:
            raise RedrafterError(TOO_SHORT)
        return {
            "tokens": self.tokens,
            "seconds": sum(self.times),
            "steps": len(self.times),
            "first_token_seconds": self.first,
            "drafts": self.stats.steps - len(self.texts),
            "drafted": self.stats.drafted,
            "accepted": self.stats.accepted,
            "accepted_by_position": self.stats.accepted_by_position,
        }


def untimed(device: torch.device) -> int:
    """First steps of a call that do not count."""
    return CAPTURING if device.type == "cuda" else 0


def follow(events: Iterator[Event], *, positions: int, skip: int = 0, together: bool = False) -> Run:
    """Follows a stream whose drafts have so many `positions`; the first `skip` steps do not count.

    `together`: only until the first row ends, so that all steps are of as many rows; that last step is not timed.
    """
    run, steps = Run(stats=Stats(accepted_by_position=[0] * positions)), 0
    for took, turn in _turns(events):
        entering = turn[0].row not in run.texts
        for event in turn:
            run.texts.setdefault(event.row, []).extend(event.tokens)
            run.stats.count(event)
        if entering:
            run.first += [took] * len(turn)
            continue
        if together and any(event.finish_reason for event in turn):
            break
        steps += 1
        if steps > skip:
            run.times.append(took)
            run.tokens += sum(len(event.tokens) for event in turn)
    return run


def _turns(events: Iterator[Event]) -> Iterator[tuple[float, list[Event]]]:
    """Each turn of decoding's loop with its seconds: rows that enter, or a step of all that are there."""
    turn: list[Event] = []
    rows: set[int] = set()
    known: set[int] = set()
    took, begin = 0.0, time.perf_counter()
    for event in events:
        passed = time.perf_counter() - begin
        if turn and (event.row in rows or (event.row in known) != (turn[0].row in known)):
            yield took, turn
            known |= rows
            turn, rows, took = [], set(), 0.0
        took += passed
        turn.append(event)
        rows.add(event.row)
        begin = time.perf_counter()
    if turn:
        yield took, turn


class _Steps(StoppingCriteria):  # type: ignore[misc]
    """Is asked after every token that transformers writes, stops nothing and notes the time."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """No row ends here."""
        if len(self.times) == 1:
            input_ids[0, -1].item()  # from here on transformers itself waits for the device once a step
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def by_transformers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    ends: frozenset[int],
    together: bool = False,
    skip: int = 0,
    seed: int = 0,
    **settings: Any,
) -> Run:
    """transformers' own `generate`, with a static cache on CUDA, whose steps it compiles.

    `ends`: end tokens, after which a row's tokens are not counted; `together`: rows do not end; `skip`: first steps of
    each call that do not count.  Raises RedrafterError where transformers cannot.
    """
    run = Run(stats=Stats())
    settings["stop_strings"] = settings.get("stop_strings") or None  # how transformers is told of none
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # a longer one later is compiled anew
    if together:
        settings |= {"min_new_tokens": settings["max_new_tokens"]}
    if model.device.type == "cuda":
        settings |= {"cache_implementation": "static"}
    with seeded(seed, model.device):
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            steps = _Steps()
            try:
                written = _written(model, [prompts[row] for row in rows], steps, settings)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise RedrafterError(f"transformers' generate fails: {reason(error)}.") from error
            texts = [_until(text, frozenset() if together else ends) for text in written]
            run.texts |= dict(zip(rows, texts, strict=True))
            took = [after - before for before, after in zip(steps.times, steps.times[1:], strict=False)]
            run.first += took[:1] * len(rows)
            run.times += took[1 + skip :]
            run.tokens += sum(max(0, len(text) - 1 - skip) for text in texts)
            run.stats.tokens += sum(map(len, texts))
            run.stats.steps += sum(map(len, texts))
    return run


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators begin with `seed`, and are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _written(
    model: PreTrainedModel, prompts: list[list[int]], steps: _Steps, settings: dict[str, Any]
) -> list[list[int]]:
    """What it adds to prompts that are padded at their left."""
    pad = getattr(model.generation_config, "pad_token_id", None) or 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    found = model.generate(ids, attention_mask=mask, pad_token_id=pad, stopping_criteria=[steps], **settings)
    return found[:, longest:].tolist()  # type: ignore[no-any-return]


def _until(text: list[int], ends: frozenset[int]) -> list[int]:
    """The text with its first end token, and no more."""
    last = next((place for place, token in enumerate(text) if token in ends), len(text))
    return text[: last + 1]
