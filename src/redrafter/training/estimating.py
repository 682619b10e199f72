"""What a run of training will take, by its first batches.

Does not know the trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redrafter.data.examples import Row, collate, pack
from redrafter.heads.base import Head
from redrafter.targets.target import Target
from redrafter.training.recipe import Recipe, processes
from redrafter.training.sharding import bytes_here
from redrafter.training.unrolled import Unrolled

BATCHES = 3
"""Batches that are timed at most; the fastest counts, since the first one warms up."""

LONG = 2.0
"""Seconds of a batch after which no further one is timed: warming up is a small part of it."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take, by its first batches."""

    steps: int
    seconds: float
    """Of all steps, the target run in each; without loading, saving and looks at held-out rows."""
    weights: int
    """Bytes of the target, and of the drafter with its gradients and AdamW's two moments."""
    states: int | None
    """Bytes on disk of the target's states, where they are kept."""
    peak: int | None
    """Bytes allocated at most on a CUDA device; the drafter's moments are counted in."""


def estimate(model: PreTrainedModel, drafter: Head, rows: list[Row], recipe: Recipe) -> Estimate:
    """Runs the loss and its gradients for the first batches, without a step of the optimiser."""
    groups: list[Any] = list(rows) if recipe.packing is None else pack(rows, recipe.packing)
    steps = recipe.steps_of(len(groups))
    module = Unrolled(drafter, Target(model, drafter.layers), recipe.objective, recipe.window_share)
    device = drafter.device
    trained = sum(p.numel() * p.element_size() for p in drafter.parameters())
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
        None if recipe.cache_states is None else module.kept_states(recipe.cache_states, rows).size,
        torch.cuda.max_memory_allocated(device) + 2 * trained if on_gpu else None,
    )


def step_seconds(
    module: Unrolled,
    groups: Sequence[Any],
    recipe: Recipe,
    collated: Callable[[Sequence[Any]], dict[str, Tensor]] = collate,
) -> float:
    """Seconds of one optimiser step, by the loss and its gradients for the first batches.

    Neither weights nor random generators are changed.
    """
    drafter = module.drafter
    device, precision = drafter.device, precision_of(drafter, recipe)
    times: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for begin in range(0, min(len(groups), BATCHES * recipe.batch_size), recipe.batch_size):
            started = time.perf_counter()
            batch = {
                name: part.to(device) for name, part in collated(groups[begin : begin + recipe.batch_size]).items()
            }
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                loss = module(**batch)["loss"]
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - started)
            if times[-1] > LONG and processes() == 1:  # several processes must run a divided target equally often
                break
    drafter.zero_grad(set_to_none=True)
    return recipe.accumulation * min(times)


def precision_of(drafter: Head, recipe: Recipe) -> str:
    """The dtype of the drafter's products."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if drafter.device.type == "cuda" else "float32"
