"""How a drafter is trained: what a run of training is told, checked once.

Does not know the run.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from redrafter.errors import RedrafterError
from redrafter.training.loss import TOKENS, Objective

MEASUREMENTS = 6
"""Times that a run measures held-out rows, unless `save_steps` says otherwise."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the released script where the data is small enough for them.

    Raises RedrafterError where nothing could be learnt so.
    """

    epochs: float = 2.0
    max_steps: int = -1
    """Optimiser steps; overrides `epochs` where positive."""
    batch_size: int = 8
    """Rows, or groups of packed ones, that each process takes in at once."""
    learning_rate: float = 1e-3
    warmup: float = 0.1
    """Share of the steps, or of the time, followed by a cosine to zero."""
    save_steps: int | None = 500
    """Optimiser steps between measurements of the held-out rows, with a checkpoint; None: `MEASUREMENTS` of them."""
    save_seconds: float = 120.0
    """Seconds between checkpoints, whatever the steps."""
    seed: int = 0
    objective: Objective = TOKENS
    accumulation: int = 1
    """Batches for each optimiser step."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the drafter's products, its weights stay in float32; auto is bfloat16 on CUDA and float32 elsewhere."""
    packing: int | None = None
    """Pack short rows together, up to so many tokens."""
    window_share: float = 1.0
    """Of the places of a batch where drafting can begin, how many are learnt from, drawn anew at every step.

    A part makes steps cheaper where the loss takes the time, and teaches less in each.
    """
    report_to: tuple[str, ...] = ()
    """Loggers of transformers: tensorboard, wandb, trackio, …"""
    cache_states: Path | None = None
    """Folder in which the target's states are kept, computed once for all epochs and runs."""
    seconds: float | None = None
    """Wall-clock seconds of the whole run instead of `epochs`: training, measuring, and keeping states."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise RedrafterError(f"The learning rate must be positive, not {self.learning_rate:g}.")
        if self.seconds is not None and not self.seconds > 0:
            raise RedrafterError(f"The time to train must be positive, not {self.seconds:g} s.")
        if self.seconds is not None and self.max_steps > 0:
            raise RedrafterError("Training ends after a number of steps or after a time: give one of them.")
        if self.max_steps < 1 and self.epochs <= 0:
            raise RedrafterError(f"The epochs must be positive, not {self.epochs:g}.")
        if self.save_seconds < 0:
            raise RedrafterError(f"The time between checkpoints must not be negative, not {self.save_seconds:g} s.")
        if not 0 < self.window_share <= 1:
            raise RedrafterError(f"The share of windows must be above 0 and at most 1, not {self.window_share:g}.")

    def steps_of(self, groups: int) -> int:
        """Optimiser steps over so many rows, or groups of packed ones, unless the clock ends the run."""
        batches = math.ceil(groups / (self.batch_size * processes()))
        return self.max_steps if self.max_steps > 0 else math.ceil(math.ceil(batches / self.accumulation) * self.epochs)


def share_of_rate(progress: float, warmup: float) -> float:
    """What counts of the peak rate once this share of a run is over: linear up to `warmup`, then a cosine to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def processes() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))
