"""A training run: validate, build, fit, publish.

Guarantees that an interrupted run resumes from its last complete checkpoint, that the published weights are those with
the longest accepted drafts on held-out rows, and that the drafter folder is written completely or not at all.  Does not
know commands.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from redrafter.data.examples import Row, collate, pack
from redrafter.errors import RedrafterError, reason
from redrafter.heads.base import Head
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import method_of
from redrafter.targets.target import Target
from redrafter.training import clock
from redrafter.training.callbacks import ProgressDisplay, ResumeOverrides, SaveSchedule
from redrafter.training.card import TrainingResult, card
from redrafter.training.checkpointing import (
    MEASUREMENT_SHARE,
    CheckpointingTrainer,
    held_out_acceptance,
    training_arguments,
)
from redrafter.training.checks import (
    check_device,
    check_disk,
    check_objective,
    check_resume,
    check_sharded,
    order_of,
    step_of,
)
from redrafter.training.estimating import step_seconds
from redrafter.training.fitting import fit
from redrafter.training.recipe import MEASUREMENTS, Recipe, is_first_process, processes
from redrafter.training.sharding import is_sharded
from redrafter.training.states import Report
from redrafter.training.unrolled import Unrolled
from redrafter.utils import interrupt
from redrafter.utils.atomic import write_atomically
from redrafter.utils.memory import within_memory
from redrafter.utils.outputs import CHECKPOINTS, ORDER, check_drafter_folder


@dataclass
class _TrainingJob:
    """The arguments of `run`, and the clock when it began."""

    target: Target
    drafter: Head
    rows: list[Row]
    output: Path
    recipe: Recipe
    held_out: list[Row]
    report: Report | None
    began: float
    measuring: float = 0.0
    """Seconds of one measurement of the held-out rows."""

    @property
    def checkpoints(self) -> Path:
        return self.output / CHECKPOINTS

    @cached_property
    def groups(self) -> list[Any]:
        """The rows, packed if the recipe says so."""
        return list(self.rows) if self.recipe.packing is None else pack(self.rows, self.recipe.packing)


def run(
    model: PreTrainedModel,
    drafter: Head,
    rows: list[Row],
    output: Path,
    recipe: Recipe,
    *,
    held_out: list[Row] | None = None,
    fewer_held_out: bool = False,
    sources: list[str] | None = None,
    licence: str | None = None,
    report: Report | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool,
) -> TrainingResult:
    """Trains `drafter` in place and writes it to `output`.

    Checkpoints and the files of loggers are in `output/checkpoints` until the drafter is written.  With `held_out` rows
    the published weights are those of the checkpoint with the longest accepted drafts on them.  `fewer_held_out`: if
    the run ends by time, use only as many of them as there is time for.  `sources` and `licence` describe the data in
    the model card.  `report` receives messages about the expected time.  `callbacks` are added to the Trainer. With
    `torchrun` or `accelerate launch` the processes share the batches and the first one writes.

    Raises RedrafterError if `output` holds something that must not be replaced, if there is nothing to resume, or if
    the loss stops being finite; Interrupted after a signal (`interrupt.interruptible`), after saving a checkpoint.
    """
    began = clock.now()
    latest = _validate(model, drafter, rows, output, recipe, resume=resume)
    target = Target(model, drafter.layers)
    if is_sharded(model) and not target.head_alone:
        check_sharded(drafter, recipe)
    job = _TrainingJob(target, drafter, rows, output, recipe, held_out or [], report, began)
    check_disk(job.checkpoints, drafter)
    remedy = f"lower --batch-size (now {recipe.batch_size}), --max-length or --beam-width"
    with within_memory(drafter.device, remedy):
        trainer = _build(job, callbacks, fewer_held_out=fewer_held_out, resume=resume)
        result = _fit(job, trainer, latest)
    return _publish(job, trainer, result, sources or [], licence)


def _validate(
    model: PreTrainedModel, drafter: Head, rows: list[Row], output: Path, recipe: Recipe, *, resume: bool
) -> Path | None:
    """The checkpoint to resume from, or None.  Raises RedrafterError for a run that cannot start."""
    if is_first_process():
        check_drafter_folder(output, own=[recipe.cache_states])
    latest = check_resume(output, order_of(rows, recipe, processes()), resume=resume)
    check_objective(rows, drafter, recipe)
    return latest


def _build(
    job: _TrainingJob, callbacks: Sequence[TrainerCallback], *, fewer_held_out: bool, resume: bool
) -> CheckpointingTrainer:
    """The Trainer, with measured held-out rows and cached states."""
    recipe, drafter, checkpoints = job.recipe, job.drafter, job.checkpoints
    module = Unrolled(drafter, job.target, recipe.objective, recipe.window_share)
    if job.held_out:
        _measure_time(job, module, fewer=fewer_held_out)
    trainer = _trainer(job, module, callbacks)
    check_device(trainer.args.device, drafter.device)
    if recipe.cache_states is not None:
        states = module.cached_states(recipe.cache_states, job.rows)
        process, together = trainer.args.process_index, is_sharded(job.target.model)
        states.compute(job.report or str, process=process, processes=trainer.args.world_size, together=together)
        trainer.data_collator = partial(collate, states=states)
    if not resume and trainer.is_world_process_zero():
        order = order_of(job.rows, recipe, processes())
        write_atomically(checkpoints / ORDER, json.dumps(order).encode())
    return trainer


def _measure_time(job: _TrainingJob, module: Unrolled, *, fewer: bool) -> None:
    """Times a batch of the longest held-out rows, which also shows before the first step whether they fit in memory.

    With `fewer`, drops held-out rows that there is no time to measure.
    """
    recipe, rows = job.recipe, job.held_out
    method = method_of(job.drafter)
    method.proposer(job.target, method.shape(0))  # reports a shape that it cannot draft
    longest = sorted(rows, key=lambda row: -len(row.input_ids))[: recipe.batch_size]
    began = clock.now()
    held_out_acceptance(module, longest, recipe.batch_size)
    took = clock.now() - began
    job.measuring = took * sum(len(row.input_ids) for row in rows) / sum(len(row.input_ids) for row in longest)
    if fewer and recipe.seconds is not None and job.measuring > MEASUREMENT_SHARE * recipe.seconds:
        most = max(1, len(rows) // recipe.batch_size)
        every = int(min(job.measuring / (MEASUREMENT_SHARE * recipe.seconds) + 1, most))
        job.held_out, job.measuring = rows[::every], job.measuring / every


def _trainer(job: _TrainingJob, module: Unrolled, callbacks: Sequence[TrainerCallback]) -> CheckpointingTrainer:
    """The Trainer before its first step.  Raises RedrafterError for an unavailable precision or logger."""
    measured = bool(job.held_out)
    try:
        trainer = CheckpointingTrainer(
            model=module,
            args=training_arguments(job.drafter, job.recipe, job.checkpoints, measured=measured),
            train_dataset=job.groups,
            eval_dataset=job.held_out or None,
            data_collator=collate,
            callbacks=[ResumeOverrides()],
        )
    except (ValueError, RuntimeError) as error:
        raise RedrafterError(f"This machine cannot train with these options: {reason(error)}.") from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in (SaveSchedule(job.recipe, measured=measured, affordable=trainer.affordable), *callbacks):
        trainer.add_callback(callback)
    trainer.held_out = job.held_out
    trainer.seconds, trainer.measuring = job.recipe.seconds, job.measuring
    trainer.measurements_at_end = 3 if isinstance(job.drafter, MedusaHeads) else 1  # fitting the tree, and another one
    return trainer


def _fit(job: _TrainingJob, trainer: CheckpointingTrainer, latest: Path | None) -> Any:
    """Trains and returns the Trainer's output; after a signal saves a checkpoint and raises Interrupted."""
    if job.report is not None:
        job.report(_expected_time(job, trainer, latest))
    objective, length, seconds = job.recipe.objective, job.drafter.config.beam_length, job.recipe.seconds
    if seconds is not None:
        trainer.seconds = max(0.0, seconds - (clock.now() - job.began)) or seconds / 100
    try:
        with ExitStack() as stack, interrupt.deferred():
            display = ProgressDisplay(stack, lambda loss: f"loss {objective.describe_loss(loss, length)}")
            trainer.add_callback(display)
            return trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    except interrupt.Interrupted as error:
        if not error.forced:  # a forced one may come in the middle of a step
            with interrupt.deferred():
                trainer.save_now()
        raise


def _expected_time(job: _TrainingJob, trainer: CheckpointingTrainer, latest: Path | None) -> str:
    """How long the run, or the rest of it after a checkpoint, will take."""
    recipe, measuring = job.recipe, job.measuring
    if recipe.seconds is not None:
        rows = f"; measuring {len(job.held_out)} held-out rows takes about {measuring:,.0f} s of it"
        return f"Expected time: {recipe.seconds / 60:g} minutes{rows if job.held_out else ''}."
    groups = job.groups
    step = step_seconds(trainer.model, groups, recipe, trainer.data_collator)
    total, done = recipe.steps_of(len(groups)), 0 if latest is None else step_of(latest)
    every, steps = recipe.save_steps or max(1, total // MEASUREMENTS), max(0, total - done)
    times = -(-steps // every) if job.held_out else 0
    parts = f"{steps:,} steps of {step:,.2g} s, {times} measurements of {measuring:,.2g} s"
    return f"Expected time: about {format_duration(steps * step + times * measuring)} ({parts})."


def format_duration(seconds: float) -> str:
    """A rounded duration with its unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _publish(
    job: _TrainingJob, trainer: CheckpointingTrainer, output: Any, sources: list[str], licence: str | None
) -> TrainingResult:
    """Writes the drafter folder and removes the checkpoints."""
    drafter, target, state = job.drafter, job.target, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    measured = trainer.measurements()
    kept = state.best_global_step or state.global_step
    acceptance = next((one.acceptance for one in measured if one.step == kept), None)
    if isinstance(drafter, MedusaHeads):
        fit(drafter, target, job.rows, job.held_out)
        acceptance = None  # measured with another tree
    if acceptance is None and job.held_out:
        acceptance = held_out_acceptance(trainer.model, job.held_out, job.recipe.batch_size)
    drafter.eval().to(target.model.dtype)
    result = TrainingResult(
        job.rows,
        job.recipe,
        float(losses[-1] if losses else output.training_loss),
        state.global_step,
        acceptance,
        sources,
        licence,
        epochs=state.epoch,
        seconds=output.metrics["train_runtime"],
        measured=measured,
    )
    if trainer.is_world_process_zero():
        drafter.save_pretrained(job.output, card=card(drafter, result))
        for folder in job.checkpoints.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # files of loggers stay
            (job.checkpoints / ORDER).unlink()
            job.checkpoints.rmdir()
    trainer.accelerator.wait_for_everyone()
    return result
