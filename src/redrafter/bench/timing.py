"""Timing of complete calls, as their caller measures them, and of the steps of a stream.

Guarantees that step times exclude prompts and, on CUDA, the first steps of a call, in which a graph is captured or code
is compiled if no earlier call did.  Does not know rounds, results or reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from redrafter.engine.generate import stream
from redrafter.engine.results import Event, Stats
from redrafter.errors import RedrafterError, reason
from redrafter.proposers import Method

CAPTURE_STEPS = 3
"""Steps of a call until a CUDA graph is captured."""


def untimed_steps(device: torch.device) -> int:
    """Number of first steps of a call that are not timed."""
    return CAPTURE_STEPS if device.type == "cuda" else 0


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators and restores them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class TimedCall:
    """Times of one complete call, in seconds."""

    seconds: float
    """From the call to its return, including argument checks, the prompt and the first steps."""
    first: float
    """From the call to its first token."""
    startup: float
    """Duration of the first steps, in which a CUDA graph is captured or code is compiled; 0 elsewhere."""
    tokens: int
    """Tokens that were generated after those steps."""

    @property
    def decoding(self) -> float:
        """The remaining time, in which `tokens` were generated."""
        return self.seconds - self.first - self.startup


def time_call(
    model: PreTrainedModel, drafter: Method | None, prompt: Sequence[int], new_tokens: int, **settings: Any
) -> TimedCall:
    """Times one call of `redrafter.stream` that generates exactly `new_tokens` tokens; end tokens are disabled.

    Raises RedrafterError if the call generates fewer tokens.
    """
    times, tokens = [time.perf_counter()], []
    for event in stream(model, drafter, [prompt], max_new_tokens=new_tokens, eos_token_id=(), **settings):
        times.append(time.perf_counter())
        tokens.append(len(event.tokens))
    return _timed_call(times, tokens, new_tokens, untimed_steps(model.device))


def time_transformers_call(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, *, seed: int = 0, **settings: Any
) -> TimedCall:
    """Times one call of transformers' generate, as `time_call`."""
    with seeded(seed, model.device):
        texts, times = _generate(model, [prompt], max_new_tokens=new_tokens, eos_token_id=None, **settings)
    return _timed_call(times, [1] * len(texts[0]), new_tokens, untimed_steps(model.device))


def _timed_call(times: list[float], tokens: list[int], expected: int, skip: int) -> TimedCall:
    """`times`: when the call began and when each step finished; `tokens`: tokens of each step."""
    end = time.perf_counter()
    if sum(tokens) != expected:
        raise RedrafterError(
            f"A call generated {sum(tokens)} of {expected} tokens, so its time is not comparable: remove the settings "
            "that end texts early from the model's generation_config."
        )
    begin, first, *_ = times
    skip = min(skip, len(tokens) - 1)
    return TimedCall(end - begin, first - begin, times[1 + skip] - first, sum(tokens[1 + skip :]))


@dataclass
class TimedRun:
    """Texts of one or more calls and their times in seconds."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    """New tokens by row."""
    stats: Stats = field(default_factory=Stats)
    """Statistics of all rows and steps, including those that are not timed."""
    first: list[float] = field(default_factory=list)
    """Time to the first token of each row."""
    times: list[float] = field(default_factory=list)
    """Duration of each timed step, including the work between two steps."""
    tokens: int = 0
    """Tokens of the timed steps, over all rows."""

    @classmethod
    def concatenated(cls, runs: Sequence[TimedRun]) -> TimedRun:
        """Several calls as one; rows are renumbered."""
        total = cls(stats=Stats.total([run.stats for run in runs], seconds=0.0))
        for run in runs:
            total.texts |= {len(total.texts) + row: text for row, text in sorted(run.texts.items())}
            total.first += run.first
            total.times += run.times
            total.tokens += run.tokens
        return total

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object, without the texts.  Raises RedrafterError if no step was timed."""
        if not self.times or not self.tokens:
            raise RedrafterError("The texts end before a step can be timed: increase max_new_tokens.")
        return {
            "tokens": self.tokens,
            "seconds": sum(self.times),
            "steps": len(self.times),
            "first_token_seconds": self.first,
            "drafts": self.stats.steps,
            "drafted": self.stats.drafted,
            "accepted": self.stats.accepted,
            "accepted_by_position": self.stats.accepted_by_position,
        }


def time_stream(events: Iterator[Event], *, positions: int, skip: int = 0, fixed_batch: bool = False) -> TimedRun:
    """Times a stream whose drafts have up to `positions` tokens, without the first `skip` steps.

    `fixed_batch`: stops at the first step in which a row finishes, so that all timed steps have the same number of
    rows.
    """
    run, steps = TimedRun(stats=Stats(accepted_by_position=[0] * positions)), 0
    for seconds, events_of_step in _steps(events):
        entered = {event.row for event in events_of_step} - run.texts.keys()
        for event in events_of_step:
            run.texts.setdefault(event.row, []).extend(event.tokens)
            run.stats.count(event)
        if entered:  # the time includes their prompts
            run.first += [seconds] * len(entered)
            continue
        if fixed_batch and any(event.finish_reason for event in events_of_step):
            break
        steps += 1
        if steps > skip:
            run.times.append(seconds)
            run.tokens += sum(len(event.tokens) for event in events_of_step)
    return run


def _steps(events: Iterator[Event]) -> Iterator[tuple[float, list[Event]]]:
    """Groups events into steps, each with its seconds, which include prompts that were read before it."""
    step: list[Event] = []
    seconds, begin = 0.0, time.perf_counter()
    for event in events:
        elapsed = time.perf_counter() - begin
        if step and event.step != step[0].step:
            yield seconds, step
            step, seconds = [], 0.0
        seconds += elapsed
        step.append(event)
        begin = time.perf_counter()
    if step:
        yield seconds, step


class _TokenTimes(StoppingCriteria):  # type: ignore[misc]
    """Records the time of every token; never stops a row."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if len(self.times) == 1:
            input_ids[0, -1].item()  # afterwards transformers itself synchronizes once per step
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_transformers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    ends: frozenset[int],
    fixed_batch: bool = False,
    skip: int = 0,
    seed: int = 0,
    **settings: Any,
) -> TimedRun:
    """Times transformers' generate in batches of `batch` prompts, without the first `skip` steps of each call.

    `ends`: end tokens; later tokens of a row are not counted.  `fixed_batch`: rows do not end.  Raises RedrafterError
    if transformers fails.
    """
    run = TimedRun(stats=Stats())
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # a longer prompt later would recompile
    if fixed_batch:
        ends, settings = frozenset(), settings | {"min_new_tokens": settings["max_new_tokens"]}
    with seeded(seed, model.device):
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            texts, times = _generate(model, [prompts[row] for row in rows], **settings)
            texts = [_until(text, ends) for text in texts]
            run.texts |= dict(zip(rows, texts, strict=True))
            durations = [after - before for before, after in pairwise(times)]
            run.first += durations[:1] * len(rows)
            run.times += durations[1 + skip :]
            run.tokens += sum(max(0, len(text) - 1 - skip) for text in texts)
            run.stats.tokens += sum(map(len, texts))
            run.stats.steps += sum(map(len, texts))
    return run


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], **settings: Any
) -> tuple[list[list[int]], list[float]]:
    """Runs transformers' generate: new tokens of each row, and when the call began and each step finished.

    On CUDA it uses a static cache, for which transformers compiles its steps.  Raises RedrafterError if it fails.
    """
    clock = _TokenTimes()
    settings["stop_strings"] = settings.get("stop_strings") or None  # transformers needs a tokenizer for an empty list
    if model.device.type == "cuda":
        settings["cache_implementation"] = "static"
    pad = getattr(model.generation_config, "pad_token_id", None) or 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(one)) + [*one] for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    try:
        output = model.generate(ids, attention_mask=mask, pad_token_id=pad, stopping_criteria=[clock], **settings)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise RedrafterError(f"transformers' generate failed: {reason(error)}.") from error
    return output[:, longest:].tolist(), clock.times


def _until(text: list[int], ends: frozenset[int]) -> list[int]:
    """The text up to and including its first end token."""
    last = next((position for position, token in enumerate(text) if token in ends), len(text))
    return text[: last + 1]
