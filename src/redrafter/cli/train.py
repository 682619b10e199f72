"""`redrafter train`: a drafter for a model, from rows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redrafter.cli.loading import Device, Dtype, Model


def train(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="JSONL rows of `messages`, `prompt` and `text`, or `text`.")],
    output: Annotated[Path, typer.Option(help="Folder to write the drafter to.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[DATA]...", help="More files of data.")] = None,
    beam_length: Annotated[int, typer.Option(min=1, help="Tokens to draft, the guaranteed one not counted.")] = 4,
    exit_dim: Annotated[int | None, typer.Option(min=1, help="Width of the head.  [default: 2 x hidden size]")] = None,
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks of the head.")] = 2,
    rnn: Annotated[bool, typer.Option(help="The recurrence, or a running sum of embeddings.")] = True,
    draft_vocabulary: Annotated[
        int | None, typer.Option(min=1, help="Draft only the N most frequent tokens of the data.  [default: all]")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times to see the data.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps, instead of epochs where positive.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW; warm-up, then cosine to zero.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a row at most.")] = 1024,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a drafter that the folder holds.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train a drafter for a model; the model itself is not changed."""
    from rich.console import Console

    from redrafter import hub
    from redrafter.errors import RedrafterError

    if (output / hub.CONFIG).exists() and not overwrite:
        raise RedrafterError(f"{output} already holds a drafter: pass --overwrite, or another --output.")

    import torch

    from redrafter.cli.loading import load_model
    from redrafter.drafter import RecurrentDrafter
    from redrafter.target import Target
    from redrafter.training.data import most_frequent, read_rows
    from redrafter.training.trainer import Recipe, newest_checkpoint, run

    recipe = Recipe(epochs, max_steps, batch_size, learning_rate, save_steps=save_steps, seed=seed)
    console = Console(stderr=True, soft_wrap=True)
    target, tokenizer = load_model(model, dtype, device)
    limit = Target(target).context_length or max_length
    rows = read_rows([*data, *(more or [])], tokenizer, max_length=min(max_length, limit))
    torch.manual_seed(seed)
    drafter = RecurrentDrafter.for_target(
        target,
        exit_dim=exit_dim,
        num_draft_layers=blocks,
        rnn=rnn,
        beam_length=beam_length,
        draft_vocabulary=None if draft_vocabulary is None else most_frequent(rows, draft_vocabulary),
    )
    learnt = sum(sum(row.trained) for row in rows)
    console.print(f"{len(rows):,} rows, {learnt:,} tokens to learn; {hub.count_parameters(drafter):,} parameters.")
    try:
        loss = run(target, drafter, rows, output, recipe, resume=resume)
    except KeyboardInterrupt:
        again = newest_checkpoint(output / "checkpoints")
        advice = f"run it again with --resume to go on from {again.name}" if again else "no checkpoint was written yet"
        raise RedrafterError(f"Interrupted; {advice}.") from None
    console.print(f"Loss {loss:.3f}. Wrote {output}.")
