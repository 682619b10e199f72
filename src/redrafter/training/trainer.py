"""The training run: a frozen target, transformers' Trainer, and a drafter folder at the end.

Promises that an interrupted run resumes from its last complete checkpoint, and that the drafter folder is written whole
or not at all.  Does not know commands.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from redrafter import hub
from redrafter.drafter import RecurrentDrafter
from redrafter.errors import RedrafterError
from redrafter.target import Target
from redrafter.training.data import Row, collate
from redrafter.training.loss import TOKENS, Objective, unrolled_loss

COMPLETE = "complete"
"""Empty file that marks a checkpoint as whole; it is written after all else."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the released script where the data is small enough for them.

    Raises RedrafterError where nothing could be learnt so.
    """

    epochs: float = 2.0
    max_steps: int = -1
    """Optimiser steps; overrides `epochs` where positive."""
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.1
    """Share of the steps, followed by a cosine to zero."""
    save_steps: int = 500
    seed: int = 0
    objective: Objective = TOKENS

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise RedrafterError(f"The learning rate must be positive, not {self.learning_rate:g}.")
        if self.max_steps < 1 and self.epochs <= 0:
            raise RedrafterError(f"The epochs must be positive, not {self.epochs:g}.")


class Unrolled(nn.Module):
    """The drafter as a module that maps a batch to its loss; the target is held outside, so it is never saved."""

    def __init__(self, drafter: RecurrentDrafter, target: Target, objective: Objective = TOKENS):
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.target = (target,)  # a tuple, so that its weights are not taken for this module's

    def forward(
        self, input_ids: Tensor, segments: Tensor, trained: Tensor, continuations: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss under the key that the Trainer looks for."""
        (target,) = self.target
        with torch.no_grad(), target.evaluating(), torch.autocast(target.device.type, enabled=False):
            hidden = target.hidden_states(input_ids, segments)

        def embed(tokens: Tensor) -> Tensor:
            embedding: Tensor = target.embed(tokens)
            return embedding.detach()

        def head(states: Tensor) -> Tensor:
            with target.evaluating(), torch.autocast(target.device.type, enabled=False):
                return target.logits(states)

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
        )
        return {"loss": loss}


class Checkpointing(Trainer):  # type: ignore[misc]
    """A Trainer that marks each checkpoint once all of it is written, and leaves none half-written."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says "unexpected pos" of a full disk
            full = shutil.disk_usage(self.args.output_dir).free < 2**16
            shutil.rmtree(folder, ignore_errors=True)
            reason = "no space is left on the device" if full else str(error).splitlines()[0].rstrip(".")
            raise RedrafterError(f"The checkpoint {folder} could not be written: {reason}.") from error
        if self.is_world_process_zero():
            (folder / COMPLETE).touch()


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; half-written ones are passed over."""
    whole = (path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}"))
    return max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)


def run(
    model: PreTrainedModel, drafter: RecurrentDrafter, rows: list[Row], output: Path, recipe: Recipe, *, resume: bool
) -> float:
    """Trains `drafter` in place and writes it to `output`; returns the last loss it logged.

    Checkpoints live in `output/checkpoints` until the drafter is written.  Raises RedrafterError where `output` holds
    something that this run would replace, or where there is nothing to resume.
    """
    checkpoints = output / "checkpoints"
    latest = newest_checkpoint(checkpoints)
    if resume and latest is None:
        raise RedrafterError(f"There is no checkpoint to resume from in {checkpoints}.")
    if not resume and latest is not None:
        raise RedrafterError(f"{output} holds an unfinished run: pass --resume, or another --output.")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=drafter.device.type == "cuda",
        use_cpu=drafter.device.type == "cpu",
        logging_steps=50,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=drafter.device.type == "cuda",
        label_names=[],
        report_to=[],
        disable_tqdm=False,  # whatever the level of transformers' log
    )
    trainer = Checkpointing(
        model=Unrolled(drafter, Target(model), recipe.objective),
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
    )
    result = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = float(logged[-1] if logged else result.training_loss)
    drafter.eval().to(model.dtype)
    drafter.save_pretrained(output, card=_card(drafter, rows, recipe, loss))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return loss


def _card(drafter: RecurrentDrafter, rows: list[Row], recipe: Recipe, loss: float) -> str:
    config = drafter.config
    tokens = sum(sum(row.trained) for row in rows)
    base = f"base_model: {config.target}\n" if config.target else ""
    return (
        f"---\nlibrary_name: redrafter\n{base}tags:\n- speculative-decoding\n- custom_generate\n---\n\n"
        f"# A recurrent drafter for {config.target or 'an unnamed model'}\n\n"
        f"Trained by redrafter on {len(rows):,} rows with {tokens:,} tokens to learn, teacher-forced over "
        f"{config.beam_length} draft positions: batch {recipe.batch_size}, learning rate {recipe.learning_rate:g}, "
        f"last loss {loss:.3f} nats, summed over positions. {hub.count_parameters(drafter):,} parameters.\n\n"
        "Use it with `redrafter generate --model MODEL --drafter THIS_FOLDER --prompt TEXT`, or in transformers with "
        "`model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)`.\n"
    )
