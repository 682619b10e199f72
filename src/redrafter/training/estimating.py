"""Estimates of a training run's time and memory from its first batches.

Does not know the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redrafter.data.examples import Row, collate, pack
from redrafter.heads.base import Head
from redrafter.targets.target import Target
from redrafter.training import clock
from redrafter.training.recipe import Recipe, processes
from redrafter.training.sharding import bytes_here
from redrafter.training.unrolled import Unrolled

TIMED_BATCHES = 3
"""Maximum number of timed batches; the fastest counts, because the first one includes warm-up."""

SLOW_BATCH_SECONDS = 2.0
"""Duration of a batch after which no further one is timed: warm-up is then a small part of it."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a training run."""

    steps: int
    seconds: float
    """Of all steps, without loading, saving and measuring held-out rows."""
    weights: int
    """Bytes of the target, and of the drafter with its gradients and AdamW's moments."""
    states: int | None
    """Bytes on disk of the target's hidden states, if they are cached."""
    peak: int | None
    """Peak bytes allocated on a CUDA device, with the drafter's moments."""


def estimate(model: PreTrainedModel, drafter: Head, rows: list[Row], recipe: Recipe) -> Estimate:
    """Runs the loss and its gradients for the first batches, without an optimiser step."""
    groups: list[Any] = list(rows) if recipe.packing is None else pack(rows, recipe.packing)
    steps = recipe.steps_of(len(groups))
    module = Unrolled(drafter, Target(model, drafter.layers), recipe.objective, recipe.window_share)
    device = drafter.device
    trained = sum(p.nbytes for p in drafter.parameters())
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step = step_seconds(module, groups, recipe)
    if recipe.seconds is not None:
        steps = math.ceil(recipe.seconds / step)
    return Estimate(
        steps,
        steps * step,
        bytes_here(model) + 4 * trained,
        None if recipe.cache_states is None else module.cached_states(recipe.cache_states, rows).size,
        torch.cuda.max_memory_allocated(device) + 2 * trained if on_gpu else None,
    )


def step_seconds(
    module: Unrolled,
    groups: Sequence[Any],
    recipe: Recipe,
    collator: Callable[[Sequence[Any]], dict[str, Tensor]] = collate,
) -> float:
    """Seconds of one optimiser step, from the loss and gradients of the first batches.

    Changes neither weights nor random generators.
    """
    drafter = module.drafter
    device, precision = drafter.device, precision_of(drafter, recipe)
    times: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for begin in range(0, min(len(groups), TIMED_BATCHES * recipe.batch_size), recipe.batch_size):
            started = clock.now()
            collated = collator(groups[begin : begin + recipe.batch_size])
            batch = {name: part.to(device) for name, part in collated.items()}
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                loss = module(**batch)["loss"]
            loss.backward()
            loss.item()  # waits for the device
            times.append(clock.now() - started)
            if times[-1] > SLOW_BATCH_SECONDS and processes() == 1:  # all must run a sharded target equally often
                break
    drafter.zero_grad(set_to_none=True)
    return recipe.accumulation * min(times)


def precision_of(drafter: Head, recipe: Recipe) -> str:
    """The dtype of the drafter's matrix products."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if drafter.device.type == "cuda" else "float32"
