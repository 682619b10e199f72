"""transformers' Trainer with checkpoints that are complete and finite, or absent.

Guarantees that a checkpoint is marked only when all of it is written, and that neither it nor the loss holds NaN or
infinity.  Does not know how a run is set up.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainingArguments

from redrafter.data.examples import Row
from redrafter.errors import RedrafterError, reason
from redrafter.evaluation.acceptance import Acceptance, acceptance
from redrafter.heads.base import Head
from redrafter.proposers import method_of
from redrafter.training import clock
from redrafter.training.checks import MAX_CHECKPOINTS, newest_checkpoint
from redrafter.training.clock import TimedSchedule
from redrafter.training.estimating import precision_of
from redrafter.training.outcome import Measurement
from redrafter.training.recipe import Recipe
from redrafter.training.unrolled import Unrolled
from redrafter.utils import interrupt
from redrafter.utils.outputs import COMPLETE

UNLIMITED_STEPS = 10**9
"""Steps of a run that ends by time, and between events that `SaveSchedule` decides instead of the Trainer."""

METRIC = "acceptance_length"
"""Metric of the best checkpoint: 1 + accepted tokens per draft, on held-out rows."""

MEASUREMENT_SHARE = 0.04
"""Fraction of a run's time that one measurement of held-out rows may take, unless their number is given."""


class CheckpointingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that measures acceptance, stops on a non-finite loss and never keeps a partial checkpoint."""

    held_out: list[Row]
    seconds: float | None = None
    """Time to train, or None if the number of steps ends the run."""
    measuring = 0.0
    """Seconds of one measurement of the held-out rows."""
    measurements_at_end = 1
    saved_step = 0
    """Step of this process's last checkpoint."""
    nonfinite_step: Tensor | None = None
    """First step with a non-finite loss, or 0; on the device, so that no step waits for it."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule, or one that ends by time."""
        if self.seconds is None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup = self.args.warmup_steps  # a fraction
        self.lr_scheduler = TimedSchedule(optimizer, self.seconds, warmup, self._reserve())
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch; remembers the first loss that is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.nonfinite_step is None:
            self.nonfinite_step = torch.zeros((), dtype=torch.long, device=loss.device)
        step = torch.full_like(self.nonfinite_step, self.state.global_step + 1)
        self.nonfinite_step = torch.where((self.nonfinite_step == 0) & ~loss.isfinite(), step, self.nonfinite_step)
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs after checking that all losses are finite."""
        self._check_losses()
        super().log(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Measures acceptance on the held-out rows.  A signal interrupts it immediately."""
        began = clock.now()
        module, batch_size = self.accelerator.unwrap_model(self.model), self.args.per_device_train_batch_size
        with interrupt.at_once() if self.args.world_size == 1 else contextlib.nullcontext():
            measured = held_out_acceptance(module, self.held_out, batch_size)
        self.measuring = clock.now() - began
        if isinstance(self.lr_scheduler, TimedSchedule):
            self.lr_scheduler.reserve = self._reserve()
        metrics = Measurement(self.state.global_step, measured).metrics(metric_key_prefix)
        self.log(metrics)
        control = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def measurements(self) -> list[Measurement]:
        """All measurements of the run, including those before it was resumed."""
        return Measurement.from_log(self.state.log_history)

    def save_now(self) -> None:
        """Saves a checkpoint of the last step, unless there is one."""
        if self.state.global_step not in (0, self.saved_step):
            self._save_checkpoint(self.model, trial=None)

    def affordable(self) -> bool:
        """Whether there is time for a measurement before the end of the run."""
        return self.seconds is None or self.measuring <= 1.5 * MEASUREMENT_SHARE * self.seconds

    def _reserve(self) -> float:
        """Seconds reserved for what follows the last step, at most half of all."""
        assert self.seconds is not None
        return min(self.measuring * self.measurements_at_end, self.seconds / 2)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_losses()
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            self._fail(self.state.global_step, "The weights are not finite after")  # gradients of any process
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as "unexpected pos"
            full = shutil.disk_usage(self.args.output_dir).free < 2**16
            shutil.rmtree(folder, ignore_errors=True)
            cause = "no space is left on the device" if full else reason(error)
            raise RedrafterError(f"The checkpoint {folder} could not be written: {cause}.") from error
        if self.is_world_process_zero():
            (folder / COMPLETE).touch()
        self.saved_step = self.state.global_step

    def _check_losses(self) -> None:
        if self.nonfinite_step is not None and (step := int(self.nonfinite_step)):
            self._fail(step, "The loss is not finite at")

    def _fail(self, step: int, problem: str) -> NoReturn:
        last = newest_checkpoint(Path(self.args.output_dir))
        kept = f"{last.name} is the last good checkpoint" if last else "there is no earlier checkpoint"
        raise RedrafterError(f"{problem} step {step}; {kept}. Lower the learning rate.")


def held_out_acceptance(module: Unrolled, rows: list[Row], batch_size: int = 8) -> Acceptance:
    """Teacher-forced acceptance of a drafter in training, at every window of held-out rows."""
    drafter, (target,) = module.drafter, module.target
    method = method_of(drafter)
    proposer = method.proposer(target, method.shape(0).with_lookup(False))
    assert proposer is not None
    training = drafter.training
    drafter.eval()
    try:
        return acceptance(target, proposer, rows, batch_size=batch_size)
    finally:
        drafter.train(training)


def training_arguments(drafter: Head, recipe: Recipe, checkpoints: Path, *, measured: bool) -> TrainingArguments:
    """transformers' arguments for a recipe; `measured` if rows are held out."""
    precision = precision_of(drafter, recipe)
    steps = UNLIMITED_STEPS if recipe.save_steps is None else recipe.save_steps  # `SaveSchedule` decides too
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": steps}
    if measured:
        saving |= {"eval_strategy": "steps", "eval_steps": steps}
        saving |= {"load_best_model_at_end": True, "metric_for_best_model": METRIC, "greater_is_better": True}
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps if recipe.seconds is None else UNLIMITED_STEPS,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        use_cpu=drafter.device.type == "cpu",
        logging_steps=50,
        logging_nan_inf_filter=False,
        save_total_limit=MAX_CHECKPOINTS - 1,
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=drafter.device.type == "cuda",
        label_names=[],
        report_to=list(recipe.report_to),
        disable_tqdm=False,  # whatever transformers' log level
        **saving,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process that sees several GPUs would replicate the drafter
    return arguments
