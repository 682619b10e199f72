"""A run of training that ends by the clock: its rate, its end and its bar.

Promises that a run which was interrupted has the rest of its time left, and that processes end together.  Does not
know what is trained.
"""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers.trainer_callback import ProgressCallback

from redrafter.training.recipe import share_of_rate


class ByTheClock(LRScheduler):
    """The rate after the time that is spent; of several processes the first one's clock counts."""

    def __init__(self, optimizer: Optimizer, seconds: float, warmup: float):
        """The clock starts now."""
        self.seconds, self.warmup, self.spent = seconds, warmup, 0.0
        self._seen = time.perf_counter()
        super().__init__(optimizer)

    @property
    def progress(self) -> float:
        """Share of the time that was spent when the last step ended."""
        return self.spent / self.seconds

    def get_lr(self) -> list[float | Tensor]:
        """Looks at the clock; the rate of each group from now on."""
        now = time.perf_counter()
        (self.spent,) = broadcast_object_list([self.spent + now - self._seen])
        self._seen = now
        share = share_of_rate(self.progress, self.warmup)
        return [float(base) * share for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The time spent in a run that was interrupted, of what there is now; what passed since does not count."""
        told = {"seconds": self.seconds, "warmup": self.warmup}
        super().load_state_dict(state_dict | told)
        self._seen = time.perf_counter()


class SecondsBar(ProgressCallback):  # type: ignore[misc]
    """Progress in seconds, where nobody knows how many steps there will be."""

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Draws the bar."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=round(lr_scheduler.seconds), unit="s", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Whole seconds alone are drawn."""
        if state.is_world_process_zero:
            self.training_bar.update(round(lr_scheduler.spent) - self.training_bar.n)
