"""Callbacks of a training run: progress display, measurements, checkpoints, and the end.

Does not know what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from redrafter.training.clock import TimedSchedule
from redrafter.training.recipe import MEASUREMENTS, Recipe
from redrafter.utils import interrupt
from redrafter.utils.progress import Progress


class SaveSchedule(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether to measure held-out rows, save a checkpoint, and stop.

    The last step is measured too: the Trainer saves it but does not measure it.  A signal raises Interrupted here,
    where weights, optimiser and step count are consistent.  The first process decides for all.
    """

    def __init__(self, recipe: Recipe, *, measured: bool, affordable: Callable[[], bool]):
        """`affordable` returns whether there is time for a measurement before the last one."""
        self._recipe, self._measured, self._affordable = recipe, measured, affordable
        self._progress, self._saved_at = 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Starts from the progress of the checkpoint, if any."""
        self._progress, self._saved_at = progress_of(state, lr_scheduler), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Sets what the Trainer does before the next step."""
        progress = progress_of(state, lr_scheduler)
        due, signal, affordable = broadcast_object_list(
            [time.monotonic() - self._saved_at >= self._recipe.save_seconds, interrupt.pending(), self._affordable()]
        )
        if signal is not None:
            interrupt.stop(signal)
        control.should_save |= due
        passed = int(progress * MEASUREMENTS) > int(self._progress * MEASUREMENTS)
        if self._measured and self._recipe.save_steps is None and passed and affordable:
            control.should_evaluate = control.should_save = True
        if progress >= 1:  # saved, because the best checkpoint is chosen among saved ones
            control.should_training_stop = control.should_save = True
            control.should_evaluate = self._measured
        self._progress = progress

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restarts the time to the next checkpoint."""
        self._saved_at = time.monotonic()


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """Shows progress in steps, or in seconds with a TimedSchedule, with the last loss and new measurements."""

    def __init__(self, stack: ExitStack, describe_loss: Callable[[float], str]):
        """The display ends when `stack` is closed."""
        self._stack, self._describe_loss, self._loss = stack, describe_loss, ""
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Starts the display in the first process."""
        if not state.is_world_process_zero:
            return
        timed = isinstance(lr_scheduler, TimedSchedule)

        def details() -> str:
            return ", ".join(filter(None, [f"step {state.global_step:,}" if timed else "", self._loss]))

        unit, total = ("s", lr_scheduler.seconds) if timed else ("steps", state.max_steps)
        done = lr_scheduler.spent if timed else state.global_step
        self._progress = Progress(unit, total, done=done, details=details, rate=not timed, always=True)
        self._stack.enter_context(self._progress)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Updates the display."""
        if self._progress is not None:
            timed = isinstance(lr_scheduler, TimedSchedule)
            self._progress.update(min(lr_scheduler.spent, lr_scheduler.seconds) if timed else state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remembers the loss."""
        if logs and "loss" in logs:
            self._loss = self._describe_loss(float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Prints a measurement."""
        if self._progress is not None and metrics:
            length = next(value for name, value in metrics.items() if name.endswith("acceptance_length"))
            self._progress.print(f"Step {state.global_step:,}: {length:.2f} tokens per step on held-out rows.")


class ResumeOverrides(TrainerCallback):  # type: ignore[misc]
    """Applies this run's checkpoint interval and learning rate instead of those saved in the checkpoint."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Overrides the values of the checkpoint."""
        state.compute_steps(args, state.max_steps)
        saved, rates = lr_scheduler.base_lrs[0], [args.learning_rate] * len(lr_scheduler.base_lrs)
        if lr_scheduler.base_lrs != rates:
            lr_scheduler.base_lrs = rates
            for group in optimizer.param_groups:
                group["lr"] *= args.learning_rate / saved


def progress_of(state: Any, scheduler: Any) -> float:
    """Finished fraction of the run."""
    return scheduler.progress if isinstance(scheduler, TimedSchedule) else state.global_step / state.max_steps
