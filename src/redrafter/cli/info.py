"""`redrafter info`: describes a drafter folder, and how a model runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.heads.base import Head


@dataclass(kw_only=True)
class InfoOptions(opt.LoadingOptions):
    """Options of `redrafter info`."""

    path: Annotated[str | None, typer.Argument(help="Drafter: folder or Hub id.")] = None
    model: Annotated[
        str | None, typer.Option(help="Target model: shows which optimizations it runs with, and why not others.")
    ] = None


@command("Drafter folders")
def info(options: InfoOptions) -> None:
    """Describe a drafter, a model, or both: sizes, defaults, and which optimizations run on this machine.

    With both, exit status 2 if the drafter was trained for another model.
    """
    if options.path is None and options.model is None:
        raise RedrafterError("Give a drafter, a --model or both.")
    if options.any_target and (options.path is None or options.model is None):
        raise RedrafterError("--any-target needs a drafter and a --model.")
    check_model_path(options.model)
    check_drafter_path(options.path)

    from rich.console import Console

    from redrafter.cli.loading import load_model
    from redrafter.cli.tables import description
    from redrafter.engine.generate import describe_backend
    from redrafter.proposers.loading import load_head
    from redrafter.targets.target import Target

    head = None if options.path is None else load_head(options.path)
    model = (
        None
        if options.model is None
        else load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)[0]
    )
    console = Console()
    if head is not None:
        console.print(description(_describe(str(options.path), head)))
    if model is not None:
        lines = {"model": f"{options.model} ({type(model).__name__})", **describe_backend(model)}
        console.print(description(lines))
    if head is not None and model is not None:
        head.any_target = options.any_target
        head.check_target(Target(model))


def _describe(path: str, head: Head) -> dict[str, str]:
    from redrafter.utils import hub

    config = head.config
    return {
        "drafter": path,
        "target": f"{config.target or 'unknown'}, revision {config.target_revision or 'unknown'}",
        "target's shape": f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "head": config.head_description,
        "context": config.context_description,
        "default drafts": config.shape_description,
        **({"on a CPU": config.cpu_shape.description} if config.cpu_shape else {}),
        "lookup": "continuations found in the text join the drafts (--no-lookup switches this off)",
        **{f"from batch {shape.batch} on": shape.description for shape in config.shapes},
        **({"tuned on": config.tuned_on} if config.tuned_on else {}),
        "parameters": f"{hub.count_parameters(head):,} in {str(head.dtype).removeprefix('torch.')}",
        "on disk": f"{hub.size_on_disk(hub.fetch(path)) / 1e6:.1f} MB",
    }
