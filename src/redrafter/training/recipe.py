"""Hyperparameters of a training run, validated once.

Does not know the run.  Imports nothing heavy, so that commands can report invalid values at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from redrafter.errors import RedrafterError
from redrafter.training.objective import TOKENS, Objective

MEASUREMENTS = 6
"""Measurements of held-out rows per run, unless `save_steps` is set."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are those of the released script.

    Raises RedrafterError for values that are out of range or contradict each other.
    """

    epochs: float = 2.0
    max_steps: int = -1
    """Optimiser steps; overrides `epochs` if positive."""
    batch_size: int = 8
    """Rows, or groups of packed rows, per process and batch."""
    learning_rate: float = 1e-3
    warmup: float = 0.1
    """Fraction of the run with a linear warm-up; a cosine to zero follows."""
    save_steps: int | None = 500
    """Optimiser steps between measurements of the held-out rows, with a checkpoint; None: `MEASUREMENTS` per run."""
    save_seconds: float = 120.0
    """Maximum seconds between checkpoints."""
    seed: int = 0
    objective: Objective = TOKENS
    accumulation: int = 1
    """Batches per optimiser step."""
    precision: str = "auto"
    """dtype of the drafter's matrix products: auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16.

    Its weights stay in float32.
    """
    packing: int | None = None
    """Pack short rows together, up to this number of tokens."""
    window_share: float = 1.0
    """Random fraction of a batch's windows that a step learns from.

    A smaller one makes steps cheaper if the loss dominates their time.
    """
    report_to: tuple[str, ...] = ()
    """Loggers of transformers: tensorboard, wandb, trackio, …"""
    cache_states: Path | None = None
    """Folder that keeps the target's hidden states for all epochs and runs."""
    seconds: float | None = None
    """Wall-clock seconds of the run, instead of `epochs`: training, measuring and computing states."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise RedrafterError(f"The learning rate must be positive, not {self.learning_rate:g}.")
        if self.seconds is not None and not self.seconds > 0:
            raise RedrafterError(f"The time to train must be positive, not {self.seconds:g} s.")
        if self.seconds is not None and self.max_steps > 0:
            raise RedrafterError("A run ends after a number of steps or after a time: set one of them.")
        if self.max_steps < 1 and self.epochs <= 0:
            raise RedrafterError(f"The epochs must be positive, not {self.epochs:g}.")
        if self.save_seconds < 0:
            raise RedrafterError(f"The time between checkpoints must not be negative, not {self.save_seconds:g} s.")
        if not 0 < self.window_share <= 1:
            raise RedrafterError(f"The share of windows must be above 0 and at most 1, not {self.window_share:g}.")

    def steps_of(self, groups: int) -> int:
        """Optimiser steps over a number of rows or groups of packed rows, if `seconds` is not set."""
        batches = math.ceil(groups / (self.batch_size * processes()))
        return self.max_steps if self.max_steps > 0 else math.ceil(math.ceil(batches / self.accumulation) * self.epochs)


def rate_factor(progress: float, warmup: float) -> float:
    """Factor of the peak learning rate at a fraction of the run: linear up to `warmup`, then a cosine to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def processes() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process writes files; known before torch.distributed is initialised."""
    return os.environ.get("RANK", "0") == "0"
