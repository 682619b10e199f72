"""A learning-rate schedule that ends after a wall-clock time.

Guarantees that a resumed run uses the time that is left, and that all processes end at the same step.  Does not know
what is trained.
"""

from __future__ import annotations

import math
import time
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from redrafter.training.recipe import rate_factor


def now() -> float:
    """Seconds of a monotonic clock: the only clock of a training run, so that tests can replace it."""
    return time.perf_counter()


class TimedSchedule(LRScheduler):
    """Sets the learning rate from the time spent; the first process's clock decides for all.

    `seconds`: time to train.  `reserve`: part of it that is kept for measurements after the last step.
    """

    def __init__(self, optimizer: Optimizer, seconds: float, warmup: float, reserve: float = 0.0):
        """Starts the clock."""
        self.seconds, self.warmup, self.reserve, self.spent = seconds, warmup, reserve, 0.0
        self.shortest = math.inf  # shortest step so far, in seconds
        self._seen = now()
        super().__init__(optimizer)

    @property
    def progress(self) -> float:
        """Fraction of the time spent when the last step ended; 1 if no time for another step is left."""
        left = self.seconds - self.reserve - self.spent
        if left <= 0 or left < self.shortest < math.inf:
            return 1.0
        return self.spent / (self.spent + left)

    def get_lr(self) -> list[float | Tensor]:
        """Reads the clock and returns the learning rate of each parameter group."""
        current = now()
        took = current - self._seen
        self.spent, self.reserve, took = broadcast_object_list([self.spent + took, self.reserve, took])
        if self.last_epoch > 0:  # the first call is before any step
            self.shortest = min(self.shortest, took)
        self._seen = current
        factor = rate_factor(self.progress, self.warmup)
        return [float(base) * factor for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the time spent; keeps this run's settings, and ignores the time since the checkpoint."""
        settings = {"seconds": self.seconds, "warmup": self.warmup, "reserve": self.reserve}
        super().load_state_dict(state_dict | settings)
        self._seen = now()
