"""The training run: a frozen target, transformers' Trainer, and a drafter folder at the end.

Promises that an interrupted run resumes from its last complete checkpoint, that the weights kept are those whose drafts
of held-out rows were accepted farthest, and that the drafter folder is written whole or not at all.  Does not know
commands.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from redrafter.errors import RedrafterError, reason
from redrafter.head import Head
from redrafter.medusa import MedusaHeads
from redrafter.memory import within_memory
from redrafter.outputs import CHECKPOINTS, COMPLETE, ORDER, check_drafter_folder
from redrafter.target import Target
from redrafter.training.card import Run, card
from redrafter.training.clock import ByTheClock, SecondsBar
from redrafter.training.data import Row, collate, pack
from redrafter.training.evaluation import Acceptance, acceptance
from redrafter.training.fitting import fit
from redrafter.training.loss import TOKENS, Objective, unrolled_loss
from redrafter.training.recipe import Recipe
from redrafter.training.sharding import bytes_here, is_sharded
from redrafter.training.states import States, Tell

KEPT = 3
"""Checkpoints that exist at one time, at most: the best, the one before the last, and the last."""

ENDLESS = 10**9
"""Steps of a run that the clock ends."""

METRIC = "acceptance_length"
"""What the best checkpoint is chosen by: 1 + accepted tokens of a draft, on held-out rows."""


class Unrolled(nn.Module):
    """The drafter as a module that maps a batch to its loss; the target is held outside, so it is never saved."""

    def __init__(self, drafter: Head, target: Target, objective: Objective = TOKENS, window_share: float = 1.0):
        """Raises RedrafterError for a drafter in 8 bits."""
        drafter.check_whole("trained")
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.window_share = window_share
        self.target = (target,)  # a tuple, so that its weights are not taken for this module's

    def hidden_states(self, input_ids: Int[Tensor, "B P"], segments: Int[Tensor, "B P"]) -> Float[Tensor, "B P F"]:
        """What the drafter is given of the target, which is not trained."""
        (target,) = self.target
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            return target.hidden_states(input_ids, segments)

    def kept_states(self, folder: Path, rows: list[Row]) -> States:
        """Where those of the rows lie on disk, or will."""
        reach = max(len(row.input_ids) for row in rows) if self.drafter.reads_text else self.drafter.positions
        return States(folder, self.target[0], self.hidden_states, rows, reach=reach)

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor,
        trained: Tensor,
        continuations: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss under the key that the Trainer looks for; `hidden` are the target's states, where they are known."""
        (target,) = self.target
        if hidden is None:
            hidden = self.hidden_states(input_ids, segments)

        def embed(tokens: Tensor) -> Tensor:
            embedding: Tensor = target.embed(tokens)
            return embedding.detach()

        def head(states: Tensor) -> Tensor:
            with torch.autocast(target.device.type, enabled=False):
                return target.logits(states[..., -target.hidden_size :])

        loss = unrolled_loss(
            self.drafter,
            embed,
            hidden,
            input_ids,
            trained,
            length=self.drafter.config.beam_length,
            objective=self.objective,
            head=head,
            continuations=continuations,
            segments=segments,
            share=self.window_share,
        )
        return {"loss": loss}


class _MeasuredAtTheEnd(TrainerCallback):  # type: ignore[misc]
    """The last step is measured too: Trainer saves it, but may look at the held-out rows only before.

    Where the clock says which one that is, it is this that ends the run.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        measured = args.eval_strategy != "no"
        if isinstance(lr_scheduler, ByTheClock) and lr_scheduler.progress >= 1:
            control.should_training_stop = control.should_save = True  # the best is sought among what was saved
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_evaluate = measured


class _AsTold(TrainerCallback):  # type: ignore[misc]
    """A run that goes on heeds what it is told now, where its checkpoint says otherwise: when to save, and the rate."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        before, rates = lr_scheduler.base_lrs[0], [args.learning_rate] * len(lr_scheduler.base_lrs)
        if lr_scheduler.base_lrs != rates:
            lr_scheduler.base_lrs = rates
            for group in optimizer.param_groups:
                group["lr"] *= args.learning_rate / before


class Checkpointing(Trainer):  # type: ignore[misc]
    """A Trainer that marks each checkpoint once all of it is written, and leaves none half-written nor sick."""

    held_out: list[Row]
    seconds: float | None = None
    """Of training, where the clock ends it."""
    sick: Tensor | None = None
    """The first step whose loss was not finite; it stays on the device until someone must know."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, or by the clock."""
        if self.seconds is not None:
            warmup = self.args.warmup_steps  # a share
            self.lr_scheduler = ByTheClock(self.optimizer if optimizer is None else optimizer, self.seconds, warmup)
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
        """Acceptance on the held-out rows, in place of a loss."""
        module, batch_size = self.accelerator.unwrap_model(self.model), self.args.per_device_train_batch_size
        found = held_out_acceptance(module, self.held_out, batch_size)
        metrics = {f"{metric_key_prefix}_{METRIC}": found.mean_acceptance_length}
        metrics |= {f"{metric_key_prefix}_accepted_{i}": rate for i, rate in enumerate(found.rates, start=1)}
        self.log(metrics)
        control = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

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
    proposer = drafter.proposer(target, *drafter.drafting(0))
    assert proposer is not None
    training = drafter.training
    drafter.eval()
    try:
        return acceptance(target, proposer, rows, batch_size=batch_size)
    finally:
        drafter.train(training)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; half-written ones are passed over."""
    whole = (path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}"))
    return max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)


def run(
    model: PreTrainedModel,
    drafter: Head,
    rows: list[Row],
    output: Path,
    recipe: Recipe,
    *,
    held_out: list[Row] | None = None,
    sources: list[str] | None = None,
    licence: str | None = None,
    tell: Tell = lambda _: None,
    resume: bool,
) -> Run:
    """Trains `drafter` in place and writes it to `output`; returns what its card tells of the run.

    Checkpoints live in `output/checkpoints` until the drafter is written, beside what loggers write.  With rows
    `held_out` the weights written are those of the checkpoint with the longest accepted drafts there.  `sources` and
    `licence` are what the card says of the data; `tell` hears of states that are kept, before they are computed.
    Started by `torchrun` or `accelerate launch`, the processes share the batches and the first one writes.
    Raises RedrafterError where `output` holds something that this run would replace, where there is nothing to resume,
    or where the loss stops being finite.
    """
    if os.environ.get("RANK", "0") == "0":
        check_drafter_folder(output, own=[recipe.cache_states])
    checkpoints = output / CHECKPOINTS
    latest = newest_checkpoint(checkpoints)
    if resume and latest is None:
        raise RedrafterError(f"There is no checkpoint to resume from in {checkpoints}.")
    if not resume and latest is not None:
        raise RedrafterError(f"{output} holds an unfinished run: pass --resume, or another --output.")
    order = _order(rows, recipe)
    if resume:
        _refuse_another_order(checkpoints / ORDER, order)
    if any(row.continuations for row in rows) and recipe.objective.of_distribution:
        raise RedrafterError("Rows with continuations know no distribution: train on them with cross-entropy alone.")
    if any(row.continuations for row in rows) and drafter.reads_text:
        raise RedrafterError(f"Rows with continuations have no states along them, which {drafter.config.kind} learns.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise RedrafterError("FSDP of accelerate would divide the drafter: use --shard-target to divide the target.")
    target = Target(model, drafter.layers)
    if is_sharded(model) and not target.head_alone:
        if drafter.reads_text:
            raise RedrafterError(
                "The whole model makes this target's logits: divided, it has no output head to train on."
            )
        if recipe.objective.of_distribution:
            raise RedrafterError(
                "The whole model makes this target's logits: divided, train it with cross-entropy alone."
            )
    _check_disk(checkpoints, drafter)
    module = Unrolled(drafter, target, recipe.objective, recipe.window_share)
    remedy = f"lower --batch-size (now {recipe.batch_size}), --max-length or --beam-width"
    if held_out:  # the longest ones as they will be measured, before hours of training could be lost by it
        drafter.check(target, *drafter.drafting(0))
        longest = sorted(held_out, key=lambda row: -len(row.input_ids))[: recipe.batch_size]
        with within_memory(drafter.device, remedy):
            held_out_acceptance(module, longest, recipe.batch_size)
    try:
        trainer = Checkpointing(
            model=module,
            args=_arguments(drafter, recipe, checkpoints, measured=bool(held_out)),
            train_dataset=rows if recipe.packing is None else pack(rows, recipe.packing),
            eval_dataset=held_out or None,
            data_collator=collate,
            callbacks=[_AsTold(), _MeasuredAtTheEnd()],
        )
    except (ValueError, RuntimeError) as error:  # a precision or a logger that is not to be had here
        raise RedrafterError(f"This cannot be trained so: {reason(error)}.") from error
    _check_place(trainer.args.device, drafter.device)
    trainer.held_out = held_out or []
    trainer.seconds = recipe.seconds
    if recipe.seconds is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SecondsBar)
    if recipe.cache_states is not None:
        states = module.kept_states(recipe.cache_states, rows)
        process, processes = trainer.args.process_index, trainer.args.world_size
        states.compute(tell, process=process, processes=processes, together=is_sharded(target.model))
        trainer.data_collator = partial(collate, states=states)
    if not resume and trainer.is_world_process_zero():
        (checkpoints / ORDER).write_text(json.dumps(order), encoding="utf-8")
    with within_memory(drafter.device, remedy):
        result = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = float(logged[-1] if logged else result.training_loss)
    if isinstance(drafter, MedusaHeads):
        fit(drafter, target, rows, held_out or [])
    found = held_out_acceptance(trainer.model, held_out, recipe.batch_size) if held_out else None
    drafter.eval().to(model.dtype)
    ended = Run(
        rows,
        recipe,
        loss,
        trainer.state.global_step,
        found,
        sources or [],
        licence,
        epochs=trainer.state.epoch,
        seconds=result.metrics["train_runtime"],
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


def _check_place(taken: torch.device, device: torch.device) -> None:
    """Raises RedrafterError where a process trains on another device than its model is on."""
    if (taken.type, taken.index or 0) != (device.type, device.index or 0):
        raise RedrafterError(
            f"This process trains on {taken}, and the model is on {device}: choose a GPU by the environment's "
            "CUDA_VISIBLE_DEVICES instead."
        )


def _check_disk(checkpoints: Path, drafter: Head) -> None:
    """Raises RedrafterError where the checkpoints to be written before the first is removed would not fit."""
    there = next(folder for folder in (checkpoints, *checkpoints.resolve().parents) if folder.exists())
    more = KEPT - len(list(checkpoints.glob("checkpoint-*")))
    needed = more * 3 * sum(one.nbytes for one in drafter.parameters())  # AdamW keeps two moments
    free = shutil.disk_usage(there).free
    if needed > free:
        told = f"{needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there"
        raise RedrafterError(f"The checkpoints in {checkpoints} take up to {told}.")


def _order(rows: list[Row], recipe: Recipe) -> dict[str, int | None]:
    """What decides which rows each step sees, by the options' names."""
    return {
        "a number of rows of": len(rows),
        "a number of processes of": _processes(),
        "--batch-size": recipe.batch_size,
        "--accumulation": recipe.accumulation,
        "--seed": recipe.seed,
        "--packing": recipe.packing,
    }


def _refuse_another_order(path: Path, order: dict[str, int | None]) -> None:
    """Raises RedrafterError where a run would go on after rows that it has not seen."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, ours in order.items():
        if (theirs := before.get(name, ours)) != ours:
            raise RedrafterError(f"The run was begun with {name} {theirs}, not {ours}: go on as it was begun.")


@dataclass(frozen=True)
class Estimate:
    """What a run would take, by its first batches."""

    steps: int
    seconds: float
    """Of all steps, the target run in each; without loading, saving and looks at held-out rows."""
    weights: int
    """Bytes of the target, and of the drafter with its gradients and AdamW's two moments."""
    states: int | None
    """Bytes on disk of the target's states, where they are kept."""
    peak: int | None
    """Bytes allocated at most on a CUDA device; the drafter's moments are counted in."""


def estimate(model: PreTrainedModel, drafter: Head, rows: list[Row], recipe: Recipe) -> Estimate:
    """Runs the loss and its gradients for the first batches, without a step of the optimiser."""
    groups: list[Any] = list(rows) if recipe.packing is None else pack(rows, recipe.packing)
    batches = math.ceil(len(groups) / (recipe.batch_size * _processes()))
    steps = math.ceil(math.ceil(batches / recipe.accumulation) * recipe.epochs)
    steps = recipe.max_steps if recipe.max_steps > 0 else steps
    module = Unrolled(drafter, Target(model, drafter.layers), recipe.objective, recipe.window_share)
    precision, device = _precision(drafter, recipe), drafter.device
    trained = sum(p.numel() * p.element_size() for p in drafter.parameters())
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for begin in range(0, min(len(groups), 3 * recipe.batch_size), recipe.batch_size):
        started = time.perf_counter()
        batch = {name: part.to(device) for name, part in collate(groups[begin : begin + recipe.batch_size]).items()}
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            loss = module(**batch)["loss"]
        loss.backward()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    drafter.zero_grad(set_to_none=True)
    step = recipe.accumulation * min(times)
    if recipe.seconds is not None:
        steps = math.ceil(recipe.seconds / step)
    return Estimate(
        steps,
        steps * step,
        bytes_here(model) + 4 * trained,
        None if recipe.cache_states is None else module.kept_states(recipe.cache_states, rows).size,
        torch.cuda.max_memory_allocated(device) + 2 * trained if on_gpu else None,
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _precision(drafter: Head, recipe: Recipe) -> str:
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if drafter.device.type == "cuda" else "float32"


def _arguments(drafter: Head, recipe: Recipe, checkpoints: Path, *, measured: bool) -> TrainingArguments:
    on_gpu = drafter.device.type == "cuda"
    precision = _precision(drafter, recipe)
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": recipe.save_steps}
    if measured:
        every |= {"eval_strategy": "steps", "eval_steps": recipe.save_steps}
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
