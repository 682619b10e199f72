"""What happens between two steps of a training run: progress, measurements, checkpoints, and the end.

Does not know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from redrafter.training.clock import ByTheClock
from redrafter.training.recipe import MEASUREMENTS, Recipe
from redrafter.utils import interrupt
from redrafter.utils.progress import Progress


class Schedule(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether to measure held-out rows, to save a checkpoint, and to stop.

    The last step is measured too: Trainer saves it, but measures only before.  A signal raises Interrupted here, where
    the weights, the optimiser and the step count agree.  With several processes the first one decides.
    """

    def __init__(self, recipe: Recipe, *, measured: bool, affordable: Callable[[], bool]):
        """`affordable` says whether a measurement before the last one is worth its time."""
        self._recipe, self._measured, self._affordable = recipe, measured, affordable
        self._before, self._saved = 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Goes on from the progress of a run that is resumed."""
        self._before, self._saved = progress_of(state, lr_scheduler), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Sets what the Trainer does before the next step."""
        now = progress_of(state, lr_scheduler)
        due, signal, affordable = agreed(
            time.monotonic() - self._saved >= self._recipe.save_seconds, interrupt.pending(), self._affordable()
        )
        if signal is not None:
            interrupt.stop(signal)
        control.should_save |= due
        passed = int(now * MEASUREMENTS) > int(self._before * MEASUREMENTS)
        if self._measured and self._recipe.save_steps is None and passed and affordable:
            control.should_evaluate = control.should_save = True
        if now >= 1:
            control.should_training_stop = control.should_save = True  # the best is sought among what was saved
            control.should_evaluate = self._measured
        self._before = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The time to the next checkpoint begins."""
        self._saved = time.monotonic()


class Watched(TrainerCallback):  # type: ignore[misc]
    """Shows progress in steps, or in seconds if the clock ends the run; with the last loss, as `words` says it."""

    def __init__(self, until: ExitStack, words: Callable[[float], str]):
        self._until, self._words, self._loss = until, words, ""
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Shows the progress until the stack is left."""
        if not state.is_world_process_zero:
            return
        clock = isinstance(lr_scheduler, ByTheClock)

        def details() -> str:
            return ", ".join(filter(None, [f"step {state.global_step:,}" if clock else "", self._loss]))

        unit, total, done = ("s", lr_scheduler.seconds, lr_scheduler.spent) if clock else ("steps", state.max_steps, 0)
        done = done if clock else state.global_step
        self._progress = Progress(unit, total, done=done, details=details, rate=not clock, always=True)
        self._until.enter_context(self._progress)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Updates it."""
        if self._progress is not None:
            clock = isinstance(lr_scheduler, ByTheClock)
            self._progress.update(min(lr_scheduler.spent, lr_scheduler.seconds) if clock else state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remembers the loss."""
        if logs and "loss" in logs:
            self._loss = self._words(float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Prints what was measured."""
        if self._progress is not None and metrics:
            length = next(value for name, value in metrics.items() if name.endswith("acceptance_length"))
            self._progress.print(f"Step {state.global_step:,}: {length:.2f} tokens per step on held-out rows.")


class AsTold(TrainerCallback):  # type: ignore[misc]
    """A run that goes on heeds what it is told now, where its checkpoint says otherwise: when to save, and the rate."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Overrides the checkpoint's."""
        state.compute_steps(args, state.max_steps)
        before, rates = lr_scheduler.base_lrs[0], [args.learning_rate] * len(lr_scheduler.base_lrs)
        if lr_scheduler.base_lrs != rates:
            lr_scheduler.base_lrs = rates
            for group in optimizer.param_groups:
                group["lr"] *= args.learning_rate / before


def progress_of(state: Any, scheduler: Any) -> float:
    """Share of the run that is over."""
    return scheduler.progress if isinstance(scheduler, ByTheClock) else state.global_step / state.max_steps


def agreed(*decisions: Any) -> list[Any]:
    """The same on all processes: what the first one says."""
    return broadcast_object_list(list(decisions))  # type: ignore[no-any-return]
