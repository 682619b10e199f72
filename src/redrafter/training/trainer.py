"""The training run: a frozen target, transformers' Trainer, and a drafter folder at the end.

Promises that an interrupted run resumes from its last complete checkpoint, that the weights kept are those whose drafts
of held-out rows were accepted farthest, and that the drafter folder is written whole or not at all.  Does not know
commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from redrafter.data.examples import Row, collate, pack
from redrafter.errors import RedrafterError, reason
from redrafter.evaluation.acceptance import Acceptance, acceptance
from redrafter.heads.base import Head
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import method_of
from redrafter.targets.target import Target
from redrafter.training.callbacks import AsTold, Schedule, Watched
from redrafter.training.card import Run, card
from redrafter.training.checks import (
    KEPT,
    check_disk,
    check_divided,
    check_objective,
    check_place,
    check_start,
    newest_checkpoint,
    order_of,
    step_of,
)
from redrafter.training.clock import ByTheClock
from redrafter.training.estimating import precision_of, step_seconds
from redrafter.training.fitting import fit
from redrafter.training.outcome import Measurement
from redrafter.training.recipe import MEASUREMENTS, Recipe, processes
from redrafter.training.sharding import is_sharded
from redrafter.training.states import Tell
from redrafter.training.unrolled import Unrolled
from redrafter.utils import interrupt
from redrafter.utils.memory import within_memory
from redrafter.utils.outputs import CHECKPOINTS, COMPLETE, ORDER, check_drafter_folder

ENDLESS = 10**9
"""Steps of a run that the clock ends, and between what transformers is not to decide."""

METRIC = "acceptance_length"
"""What the best checkpoint is chosen by: 1 + accepted tokens of a draft, on held-out rows."""

MEASURING = 0.04
"""Share of a run's time that one measurement of held-out rows may take, unless the user says how many there are."""


class Checkpointing(Trainer):  # type: ignore[misc]
    """A Trainer that marks each checkpoint once all of it is written, and leaves none half-written nor sick."""

    held_out: list[Row]
    seconds: float | None = None
    """Of training, where the clock ends it."""
    measuring = 0.0
    """Seconds that a measurement of the held-out rows takes."""
    measurements_at_end = 1
    saved_step = 0
    """The last step of which there is a checkpoint, as each process knows for itself."""
    sick: Tensor | None = None
    """The first step whose loss was not finite; it stays on the device until someone must know."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, or by the clock."""
        if self.seconds is not None:
            warmup = self.args.warmup_steps  # a share
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = ByTheClock(optimizer, self.seconds, warmup, self._reserve())
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch; remembers a loss that is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.sick is None:
            self.sick = torch.zeros((), dtype=torch.long, device=loss.device)
        step = torch.full_like(self.sick, self.state.global_step + 1)
        self.sick = torch.where((self.sick == 0) & ~loss.isfinite(), step, self.sick)
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, once the losses are known to be sound."""
        self._refuse_sick()
        super().log(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Acceptance on the held-out rows, in place of a loss.  A signal interrupts it at once."""
        began = time.perf_counter()
        module, batch_size = self.accelerator.unwrap_model(self.model), self.args.per_device_train_batch_size
        with interrupt.at_once() if self.args.world_size == 1 else contextlib.nullcontext():
            found = held_out_acceptance(module, self.held_out, batch_size)
        self.measuring = time.perf_counter() - began
        if isinstance(self.lr_scheduler, ByTheClock):
            self.lr_scheduler.reserve = self._reserve()
        metrics = Measurement(self.state.global_step, found).metrics(metric_key_prefix)
        self.log(metrics)
        control = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def measurements(self) -> list[Measurement]:
        """All of the run, those before it was resumed too."""
        return Measurement.of_log(self.state.log_history)

    def save_now(self) -> None:
        """A checkpoint of the last step, unless there is one."""
        if self.state.global_step not in (0, self.saved_step):
            self._save_checkpoint(self.model, trial=None)

    def affordable(self) -> bool:
        """Whether a measurement before the end of the run is worth its time."""
        return self.seconds is None or self.measuring <= 1.5 * MEASURING * self.seconds

    def _reserve(self) -> float:
        """Seconds to keep for what follows the last step; half of all at most, so that something is learnt."""
        assert self.seconds is not None
        return min(self.measuring * self.measurements_at_end, self.seconds / 2)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_sick()
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            self._refuse(self.state.global_step, "The weights are not finite after")  # by gradients, of any process
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says "unexpected pos" of a full disk
            full = shutil.disk_usage(self.args.output_dir).free < 2**16
            shutil.rmtree(folder, ignore_errors=True)
            cause = "no space is left on the device" if full else reason(error)
            raise RedrafterError(f"The checkpoint {folder} could not be written: {cause}.") from error
        if self.is_world_process_zero():
            (folder / COMPLETE).touch()
        self.saved_step = self.state.global_step

    def _refuse_sick(self) -> None:
        if self.sick is not None and (step := int(self.sick)):
            self._refuse(step, "The loss is not finite at")

    def _refuse(self, step: int, what: str) -> NoReturn:
        last = newest_checkpoint(Path(self.args.output_dir))
        kept = f"{last.name} is the last good checkpoint" if last else "no checkpoint was written before"
        raise RedrafterError(f"{what} step {step}; {kept}. Lower the learning rate.")


def held_out_acceptance(module: Unrolled, rows: list[Row], batch_size: int = 8) -> Acceptance:
    """How far the drafts of a drafter in training follow held-out rows, at every place of them."""
    drafter, (target,) = module.drafter, module.target
    method = method_of(drafter)
    proposer = method.proposer(target, method.shape(0))
    assert proposer is not None
    training = drafter.training
    drafter.eval()
    try:
        return acceptance(target, proposer, rows, batch_size=batch_size)
    finally:
        drafter.train(training)


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
    tell: Tell | None = None,
    resume: bool,
) -> Run:
    """Trains `drafter` in place and writes it to `output`; returns what its card tells of the run.

    Checkpoints live in `output/checkpoints` until the drafter is written, beside what loggers write.  With rows
    `held_out` the weights written are those of the checkpoint with the longest accepted drafts there.  If the clock
    ends the run, `fewer_held_out` lets it measure only as many of them as there is time for.  `sources` and `licence`
    are what the card says of the data; `tell` receives sentences about what will be done and how long it takes.
    Started by `torchrun` or `accelerate launch`, the processes share the batches and the first one writes.

    Raises RedrafterError where `output` holds something that this run would replace, where there is nothing to resume,
    or where the loss stops being finite; `Interrupted` after a signal (`interrupt.interruptible`), with a checkpoint of
    the last step written.
    """
    began = time.perf_counter()
    if os.environ.get("RANK", "0") == "0":
        check_drafter_folder(output, own=[recipe.cache_states])
    checkpoints = output / CHECKPOINTS
    order = order_of(rows, recipe, processes())
    latest = check_start(output, order, resume=resume)
    check_objective(rows, drafter, recipe)
    target = Target(model, drafter.layers)
    if is_sharded(model) and not target.head_alone:
        check_divided(drafter, recipe)
    check_disk(checkpoints, drafter)
    module = Unrolled(drafter, target, recipe.objective, recipe.window_share)
    remedy = f"lower --batch-size (now {recipe.batch_size}), --max-length or --beam-width"
    held_out, measuring = held_out or [], 0.0
    if held_out:  # the longest ones as they will be measured, before hours of training could be lost by it
        method = method_of(drafter)
        method.proposer(target, method.shape(0))
        with within_memory(drafter.device, remedy):
            measuring = _seconds_of_measurement(module, held_out, recipe)
    if fewer_held_out and recipe.seconds is not None and measuring > MEASURING * recipe.seconds:
        every = int(min(measuring / (MEASURING * recipe.seconds) + 1, max(1, len(held_out) // recipe.batch_size)))
        held_out, measuring = held_out[::every], measuring / every
    groups: list[Any] = list(rows) if recipe.packing is None else pack(rows, recipe.packing)
    trainer = _trainer(module, groups, held_out, recipe, checkpoints)
    check_place(trainer.args.device, drafter.device)
    if recipe.cache_states is not None:
        states = module.kept_states(recipe.cache_states, rows)
        process, together = trainer.args.process_index, is_sharded(target.model)
        states.compute(tell or str, process=process, processes=trainer.args.world_size, together=together)
        trainer.data_collator = partial(collate, states=states)
    if not resume and trainer.is_world_process_zero():
        (checkpoints / ORDER).write_text(json.dumps(order), encoding="utf-8")
    with within_memory(drafter.device, remedy):
        if tell is not None:
            tell(_expected(trainer, module, groups, recipe, measuring, latest))
        trainer.measuring = measuring
        if recipe.seconds is not None:
            trainer.seconds = max(0.0, recipe.seconds - (time.perf_counter() - began)) or recipe.seconds / 100
        result = _fitted(trainer, recipe, latest)
    return _published(trainer, drafter, target, rows, output, recipe, result, sources or [], licence)


def _seconds_of_measurement(module: Unrolled, held_out: list[Row], recipe: Recipe) -> float:
    """Seconds that measuring all rows takes, by a batch of the longest ones."""
    longest = sorted(held_out, key=lambda row: -len(row.input_ids))[: recipe.batch_size]
    began = time.perf_counter()
    held_out_acceptance(module, longest, recipe.batch_size)
    took = time.perf_counter() - began
    return took * sum(len(row.input_ids) for row in held_out) / sum(len(row.input_ids) for row in longest)


def _trainer(
    module: Unrolled, groups: list[Any], held_out: list[Row], recipe: Recipe, checkpoints: Path
) -> Checkpointing:
    """The Trainer, before its first step.  Raises RedrafterError for a precision or a logger that is not there."""
    try:
        trainer = Checkpointing(
            model=module,
            args=_arguments(module.drafter, recipe, checkpoints, measured=bool(held_out)),
            train_dataset=groups,
            eval_dataset=held_out or None,
            data_collator=collate,
            callbacks=[AsTold()],
        )
    except (ValueError, RuntimeError) as error:
        raise RedrafterError(f"This cannot be trained so: {reason(error)}.") from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Schedule(recipe, measured=bool(held_out), affordable=trainer.affordable))
    trainer.held_out = held_out
    trainer.seconds = recipe.seconds
    trainer.measurements_at_end = 3 if isinstance(module.drafter, MedusaHeads) else 1  # a tree is fitted and measured
    return trainer


def _expected(
    trainer: Checkpointing, module: Unrolled, groups: list[Any], recipe: Recipe, measuring: float, latest: Path | None
) -> str:
    """How long the run will take, or the rest of it after a checkpoint."""
    if recipe.seconds is not None:
        rows = f"; measuring {len(trainer.held_out)} held-out rows takes about {measuring:,.0f} s of it"
        return f"Expected time: {recipe.seconds / 60:g} minutes{rows if trainer.held_out else ''}."
    step = step_seconds(module, groups, recipe, trainer.data_collator)
    whole, done = recipe.steps_of(len(groups)), 0 if latest is None else step_of(latest)
    every, steps = recipe.save_steps or max(1, whole // MEASUREMENTS), max(0, whole - done)
    times = -(-steps // every) if trainer.held_out else 0
    seconds = steps * step + times * measuring
    parts = f"{steps:,} steps of {step:,.2g} s, {times} measurements of {measuring:,.2g} s"
    return f"Expected time: about {in_words(seconds)} ({parts})."


def in_words(seconds: float) -> str:
    """A duration, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _fitted(trainer: Checkpointing, recipe: Recipe, latest: Path | None) -> Any:
    """Trains, and returns what the Trainer says of it; after a signal saves a checkpoint and raises Interrupted."""
    objective, length = recipe.objective, trainer.model.drafter.config.beam_length
    try:
        with ExitStack() as until, interrupt.deferred():
            trainer.add_callback(Watched(until, lambda loss: f"loss {objective.in_words(loss, length)}"))
            return trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    except interrupt.Interrupted as error:
        if not error.forced:  # else it may have come in the middle of a step
            with interrupt.deferred():
                trainer.save_now()
        raise


def _published(
    trainer: Checkpointing,
    drafter: Head,
    target: Target,
    rows: list[Row],
    output: Path,
    recipe: Recipe,
    result: Any,
    sources: list[str],
    licence: str | None,
) -> Run:
    """Writes the drafter to its folder and removes the checkpoints."""
    checkpoints = Path(trainer.args.output_dir)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = float(logged[-1] if logged else result.training_loss)
    measured = trainer.measurements()
    kept = trainer.state.best_global_step or trainer.state.global_step
    found = next((one.found for one in measured if one.step == kept), None)
    if isinstance(drafter, MedusaHeads):
        fit(drafter, target, rows, trainer.held_out)
        found = None  # another tree, so it must be measured again
    if found is None and trainer.held_out:
        found = held_out_acceptance(trainer.model, trainer.held_out, recipe.batch_size)
    drafter.eval().to(target.model.dtype)
    ended = Run(
        rows,
        recipe,
        loss,
        trainer.state.global_step,
        found,
        sources,
        licence,
        epochs=trainer.state.epoch,
        seconds=result.metrics["train_runtime"],
        measured=measured,
    )
    if trainer.is_world_process_zero():
        drafter.save_pretrained(output, card=card(drafter, ended))
        for folder in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a logger's files stay
            (checkpoints / ORDER).unlink()
            checkpoints.rmdir()
    trainer.accelerator.wait_for_everyone()
    return ended


def _arguments(drafter: Head, recipe: Recipe, checkpoints: Path, *, measured: bool) -> TrainingArguments:
    on_gpu = drafter.device.type == "cuda"
    precision = precision_of(drafter, recipe)
    steps = ENDLESS if recipe.save_steps is None else recipe.save_steps  # `Schedule` decides too
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": steps}
    if measured:
        every |= {"eval_strategy": "steps", "eval_steps": steps}
        every |= {"load_best_model_at_end": True, "metric_for_best_model": METRIC, "greater_is_better": True}
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps if recipe.seconds is None else ENDLESS,
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
        save_total_limit=KEPT - 1,
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        label_names=[],
        report_to=list(recipe.report_to),
        disable_tqdm=False,  # whatever the level of transformers' log
        **every,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or a process that sees several would copy the drafter to all of them
    return arguments
