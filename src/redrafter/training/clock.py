"""A run of training that ends by the clock: its rate and its end.

Promises that a run which was interrupted has the rest of its time left, and that processes end together.  Does not
know what is trained.
"""

from __future__ import annotations

import math
import time
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from redrafter.training.recipe import share_of_rate


class ByTheClock(LRScheduler):
    """The rate after the time that is spent; of several processes the first one's clock counts.

    `seconds` is the time to train, `reserve` how much of it is kept for the measurement at the end.
    """

    def __init__(self, optimizer: Optimizer, seconds: float, warmup: float, reserve: float = 0.0):
        """The clock starts now."""
        self.seconds, self.warmup, self.reserve, self.spent = seconds, warmup, reserve, 0.0
        self.shortest = math.inf  # step so far, in seconds
        self._seen = time.perf_counter()
        super().__init__(optimizer)

    @property
    def progress(self) -> float:
        """Share of the time that was spent when the last step ended; 1 if there is no time for another step."""
        left = self.seconds - self.reserve - self.spent
        if left <= 0 or left < self.shortest < math.inf:
            return 1.0
        return self.spent / (self.spent + left)

    def get_lr(self) -> list[float | Tensor]:
        """Looks at the clock; the rate of each group from now on."""
        now = time.perf_counter()
        took = now - self._seen
        self.spent, self.reserve, took = broadcast_object_list([self.spent + took, self.reserve, took])
        if self.last_epoch > 0:  # not the first look, before any step
            self.shortest = min(self.shortest, took)
        self._seen = now
        share = share_of_rate(self.progress, self.warmup)
        return [float(base) * share for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The time spent in a run that was interrupted, of what there is now; what passed since does not count."""
        told = {"seconds": self.seconds, "warmup": self.warmup, "reserve": self.reserve}
        super().load_state_dict(state_dict | told)
        self._seen = time.perf_counter()
