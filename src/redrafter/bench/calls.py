"""Complete calls, timed as their caller's clock shows them.

A call has one prompt and writes exactly as many tokens as it was asked for: end tokens are switched off, for drafted
decoding, for undrafted decoding and for transformers' own `generate`.  Knows nothing about rounds or reports.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from redrafter.bench.clock import seeded, untimed
from redrafter.engine.generate import stream
from redrafter.errors import RedrafterError, reason
from redrafter.proposers import Method


@dataclass(frozen=True)
class Call:
    """The times of one call, in seconds."""

    seconds: float
    """From the call to its return: checks, prompt, first steps, decoding and everything between them."""
    first: float
    """From the call to its first token."""
    starting: float
    """Of the first steps after it, in which a CUDA graph is captured or code is compiled; 0 where nothing is."""
    tokens: int
    """Written after those."""

    @property
    def decoding(self) -> float:
        """What is left: decoding alone, which wrote `tokens`."""
        return self.seconds - self.first - self.starting


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records when tokens arrive, step by step; the prompt, which a streamer receives first, is not recorded."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.arrived(value.numel())
        self._prompt = False

    def end(self) -> None:
        pass

    def arrived(self, tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)


def call(
    model: PreTrainedModel, drafter: Method | None, prompt: Sequence[int], new_tokens: int, **settings: Any
) -> Call:
    """One call of `redrafter.stream`, to its last event.  Raises RedrafterError if it writes too few tokens.

    A streamer of `redrafter.generate` would receive the tokens of a step one by one.
    """
    clock, begin = _Clock(), time.perf_counter()
    for event in stream(model, drafter, [prompt], max_new_tokens=new_tokens, eos_token_id=(), **settings):
        clock.arrived(len(event.tokens))
    return _timed(clock, begin, sum(clock.tokens), new_tokens, untimed(model.device))


def call_transformers(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, **settings: Any) -> Call:
    """One call of transformers' own `generate`, on CUDA with a static cache, for which transformers compiles its steps.

    Raises RedrafterError where transformers cannot, and if it writes fewer tokens than it should.
    """
    seed = settings.pop("seed", 0)
    settings["stop_strings"] = settings.get("stop_strings") or None  # an empty list needs a tokenizer there
    if model.device.type == "cuda":
        settings |= {"cache_implementation": "static"}
    with seeded(seed, model.device):
        clock, begin = _Clock(), time.perf_counter()
        ids = torch.tensor([prompt], device=model.device)
        settings |= {"max_new_tokens": new_tokens, "eos_token_id": None, "streamer": clock}
        try:
            found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise RedrafterError(f"transformers' generate fails: {reason(error)}.") from error
        written = len(found[0].tolist()) - len(prompt)
    return _timed(clock, begin, written, new_tokens, untimed(model.device))


def _timed(clock: _Clock, begin: float, written: int, wanted: int, skip: int) -> Call:
    end = time.perf_counter()
    if written != wanted:
        raise RedrafterError(
            f"A call wrote {written} of {wanted} tokens, so its time says nothing: remove what ends texts early from "
            "the model's generation_config."
        )
    first, *steps = clock.times
    skip = min(skip, len(steps))
    started = steps[skip - 1] if skip else first
    return Call(end - begin, first - begin, started - first, sum(clock.tokens[1 + skip :]))
