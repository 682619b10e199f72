"""`redrafter export`: converts a drafter folder for other software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.utils.outputs import check_drafter_folder, locked
from redrafter.utils.paths import check_drafter_path


@dataclass(kw_only=True)
class ExportOptions:
    """Options of `redrafter export`."""

    drafter: Annotated[str, typer.Argument(help="Drafter: folder or Hub id.")]
    output: Annotated[Path, typer.Option(help="Folder to write to.")]
    form: Annotated[
        Literal["apple"], typer.Option("--format", help="apple: the format of apple/ml-recurrent-drafter.")
    ] = "apple"
    overwrite: opt.Overwrite = False


@command("Drafter folders")
def export(options: ExportOptions) -> None:
    """Convert a drafter to another project's format.  All commands read the result too."""
    check_drafter_path(options.drafter)
    inputs = [options.drafter]
    check_drafter_folder(options.output, overwrite=options.overwrite, inputs=inputs, advice=opt.OVERWRITE)
    with locked(options.output):
        from rich.console import Console

        from redrafter.heads.recurrent import RecurrentDrafter
        from redrafter.integrations import apple

        drafter = RecurrentDrafter.from_pretrained(options.drafter)
        apple.export(drafter, options.output)
        Console(stderr=True, soft_wrap=True).print(
            f"Wrote {options.output}. Apple's --beam_length includes the guaranteed token: pass "
            f"{drafter.config.beam_length + 1} there for drafts of {drafter.config.beam_length} tokens."
        )
