"""Checks before a training run starts, and the checkpoints on disk.

Does not know the trainer.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from redrafter.data.examples import Row
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.training.recipe import Recipe
from redrafter.utils.outputs import CHECKPOINTS, COMPLETE, ORDER

MAX_CHECKPOINTS = 3
"""Checkpoints that exist at a time: the best, the second last, and the last."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; partially written ones are ignored."""
    complete = (path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}"))
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[-1])


def check_resume(output: Path, order: dict[str, int | None], *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None.

    Raises RedrafterError if there is none to resume from, if the folder holds an unfinished run and `resume` is False,
    or if this run would see other rows than the unfinished one.
    """
    checkpoints = output / CHECKPOINTS
    latest = newest_checkpoint(checkpoints)
    if resume and latest is None:
        raise RedrafterError(f"There is no checkpoint to resume from in {checkpoints}.")
    if not resume and latest is not None:
        raise RedrafterError(f"{output} holds an unfinished run: pass --resume, or another --output.")
    if resume:
        check_order(checkpoints / ORDER, order)
    return latest


def check_objective(rows: list[Row], drafter: Head, recipe: Recipe) -> None:
    """Raises RedrafterError if the rows lack what the objective needs, or if FSDP would shard the drafter."""
    continued = any(row.continuations for row in rows)
    if continued and recipe.objective.of_distribution:
        raise RedrafterError("Rows with continuations have no distribution: train on them with cross-entropy only.")
    if continued and drafter.reads_text:
        raise RedrafterError(f"Rows with continuations have no hidden states, which {drafter.config.kind} needs.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise RedrafterError("accelerate's FSDP would shard the drafter: use --shard-target to shard the target.")


def check_sharded(drafter: Head, recipe: Recipe) -> None:
    """Raises RedrafterError if training needs logits that a sharded target cannot compute from hidden states."""
    problem = "This target's logits need the complete model, so a sharded one"
    if drafter.reads_text:
        raise RedrafterError(f"{problem} has no output head to train {drafter.config.kind} with.")
    if recipe.objective.of_distribution:
        raise RedrafterError(f"{problem} can be trained with cross-entropy only.")


def check_device(training: torch.device, model: torch.device) -> None:
    """Raises RedrafterError if a process trains on another device than its model is on."""
    if (training.type, training.index or 0) != (model.type, model.index or 0):
        raise RedrafterError(
            f"This process trains on {training}, but the model is on {model}: select a GPU with the environment "
            "variable CUDA_VISIBLE_DEVICES instead."
        )


def check_disk(checkpoints: Path, drafter: Head) -> None:
    """Raises RedrafterError if the disk has no room for the checkpoints that will exist at a time."""
    existing = next(folder for folder in (checkpoints, *checkpoints.resolve().parents) if folder.exists())
    missing = MAX_CHECKPOINTS - len(list(checkpoints.glob("checkpoint-*")))
    needed = missing * 3 * sum(one.nbytes for one in drafter.parameters())  # weights and two moments of AdamW
    free = shutil.disk_usage(existing).free
    if needed > free:
        size = f"{needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there"
        raise RedrafterError(f"The checkpoints in {checkpoints} take up to {size}: choose another --output.")


def order_of(rows: list[Row], recipe: Recipe, processes: int) -> dict[str, int | None]:
    """The values that determine which rows each step sees."""
    return {
        "number of rows": len(rows),
        "number of processes": processes,
        "--batch-size": recipe.batch_size,
        "--accumulation": recipe.accumulation,
        "--seed": recipe.seed,
        "--packing": recipe.packing,
    }


def check_order(path: Path, order: dict[str, int | None]) -> None:
    """Raises RedrafterError if the run in `path` saw its rows in another order."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, now in order.items():
        before = saved.get(name, saved.get(f"a {name} of", now))  # the key of older files
        if before != now:
            raise RedrafterError(f"The run was started with {name} {before}, not {now}: resume it with the same value.")
