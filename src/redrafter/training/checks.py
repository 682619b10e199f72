"""What a run of training refuses before it computes anything, and its checkpoints on disk.

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

KEPT = 3
"""Checkpoints that exist at one time, at most: the best, the one before the last, and the last."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; half-written ones are passed over."""
    whole = (path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}"))
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.split("-")[-1])


def check_start(output: Path, order: dict[str, int | None], *, resume: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises RedrafterError if there is none to resume from, if the folder holds an unfinished run and this one does not
    resume it, or if the run would go on after rows that it has not seen.
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
    """Raises RedrafterError if the rows cannot teach what the objective needs, or if FSDP would divide the drafter."""
    if any(row.continuations for row in rows) and recipe.objective.of_distribution:
        raise RedrafterError("Rows with continuations know no distribution: train on them with cross-entropy alone.")
    if any(row.continuations for row in rows) and drafter.reads_text:
        raise RedrafterError(f"Rows with continuations have no states along them, which {drafter.config.kind} learns.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise RedrafterError("FSDP of accelerate would divide the drafter: use --shard-target to divide the target.")


def check_divided(drafter: Head, recipe: Recipe) -> None:
    """Raises RedrafterError if this is learnt from logits that a divided target cannot make from states."""
    if drafter.reads_text:
        raise RedrafterError("The whole model makes this target's logits: divided, it has no output head to train on.")
    if recipe.objective.of_distribution:
        raise RedrafterError("The whole model makes this target's logits: divided, train it with cross-entropy alone.")


def check_place(taken: torch.device, device: torch.device) -> None:
    """Raises RedrafterError where a process trains on another device than its model is on."""
    if (taken.type, taken.index or 0) != (device.type, device.index or 0):
        raise RedrafterError(
            f"This process trains on {taken}, and the model is on {device}: choose a GPU by the environment's "
            "CUDA_VISIBLE_DEVICES instead."
        )


def check_disk(checkpoints: Path, drafter: Head) -> None:
    """Raises RedrafterError where the checkpoints to be written before the first is removed would not fit."""
    there = next(folder for folder in (checkpoints, *checkpoints.resolve().parents) if folder.exists())
    more = KEPT - len(list(checkpoints.glob("checkpoint-*")))
    needed = more * 3 * sum(one.nbytes for one in drafter.parameters())  # AdamW keeps two moments
    free = shutil.disk_usage(there).free
    if needed > free:
        told = f"{needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there"
        raise RedrafterError(f"The checkpoints in {checkpoints} take up to {told}.")


def order_of(rows: list[Row], recipe: Recipe, processes: int) -> dict[str, int | None]:
    """What decides which rows each step sees, by the options' names."""
    return {
        "a number of rows of": len(rows),
        "a number of processes of": processes,
        "--batch-size": recipe.batch_size,
        "--accumulation": recipe.accumulation,
        "--seed": recipe.seed,
        "--packing": recipe.packing,
    }


def check_order(path: Path, order: dict[str, int | None]) -> None:
    """Raises RedrafterError where a run would go on after rows that it has not seen."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, ours in order.items():
        if (theirs := before.get(name, ours)) != ours:
            raise RedrafterError(f"The run was begun with {name} {theirs}, not {ours}: go on as it was begun.")
