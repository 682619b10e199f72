"""`redrafter info`: what a drafter folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli.loading import AnyTarget, Device, Dtype
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.heads.base import Head


def info(
    path: Annotated[str | None, typer.Argument(help="A drafter's folder or hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="A model: how its steps would be decoded on this machine.")] = None,
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Say what a drafter folder is, its size and its target; with --model, which path a model takes.

    Given both, exit status 2 where the drafter is another model's.
    """
    if path is None and model is None:
        raise RedrafterError("Name a drafter, or a model by --model.")
    if any_target and (path is None or model is None):
        raise RedrafterError("--any-target is for a drafter and a --model.")
    check_model_path(model)
    check_drafter_path(path)

    from redrafter.cli.loading import load_model
    from redrafter.engine.generate import describe_backend
    from redrafter.proposers.loading import load_head
    from redrafter.targets.target import Target

    drafter = None if path is None else load_head(path)
    loaded = None if model is None else load_model(model, dtype, device)[0]
    if drafter is not None:
        _show(_drafter(str(path), drafter))
    if loaded is not None:
        _show({"model": f"{model} ({type(loaded).__name__})", **describe_backend(loaded)})
    if drafter is not None and loaded is not None:
        drafter.any_target = any_target
        drafter.check_target(Target(loaded))


def _show(lines: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in lines.items():
        table.add_row(name, value)
    Console().print(table)


def _drafter(path: str, drafter: Head) -> dict[str, str]:
    from redrafter.utils import hub

    config = drafter.config
    return {
        "drafter": path,
        "target": f"{config.target or 'not named'}, revision {config.target_revision or 'not named'}",
        "target's shape": f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "head": config.head_description,
        "context": config.context_description,
        "drafts by default": config.shape_description,
        **{f"from batch {shape.batch} on": shape.description for shape in config.shapes},
        **({"tuned on": config.tuned_on} if config.tuned_on else {}),
        "parameters": f"{hub.count_parameters(drafter):,} in {str(drafter.dtype).removeprefix('torch.')}",
        "on disk": f"{hub.size_on_disk(hub.fetch(path)) / 1e6:.1f} MB",
    }
