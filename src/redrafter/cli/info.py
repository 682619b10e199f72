"""`redrafter info`: what a drafter folder is."""

from __future__ import annotations

from typing import Annotated

import typer

from redrafter.cli.loading import Device, Dtype
from redrafter.errors import RedrafterError


def info(
    path: Annotated[str | None, typer.Argument(help="A drafter's folder or hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="A model: how its steps would be decoded on this machine.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Say what a drafter folder is, its size and its target; with --model, which path a model takes."""
    if path is None and model is None:
        raise RedrafterError("Name a drafter, or a model by --model.")
    if path is not None:
        _show(_drafter(path))
    if model is not None:
        _show(_model(model, dtype, device))


def _show(lines: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in lines.items():
        table.add_row(name, value)
    Console().print(table)


def _model(model: str, dtype: str, device: str) -> dict[str, str]:
    """What a few tokens of decoding show."""
    from redrafter.cli.loading import load_model
    from redrafter.decoding import path_of

    loaded, _ = load_model(model, dtype, device)
    return {"model": f"{model} ({type(loaded).__name__})", **path_of(loaded)}


def _drafter(path: str) -> dict[str, str]:
    from redrafter import hub
    from redrafter.proposers.loading import load_head

    drafter = load_head(path)
    config = drafter.config
    return {
        "drafter": path,
        "target": f"{config.target or 'not named'}, revision {config.target_revision or 'not named'}",
        "target's shape": f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "head": config.head_in_words,
        "context": config.context_in_words,
        "drafts by default": config.shape_in_words,
        **{f"from batch {shape.batch} on": shape.in_words for shape in config.shapes},
        **({"tuned on": config.tuned_on} if config.tuned_on else {}),
        "parameters": f"{hub.count_parameters(drafter):,} in {str(drafter.dtype).removeprefix('torch.')}",
        "on disk": f"{hub.size_on_disk(hub.fetch(path)) / 1e6:.1f} MB",
    }
