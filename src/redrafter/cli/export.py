"""`redrafter export`: a drafter folder for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redrafter.cli.loading import OVERWRITE, claim
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_drafter_folder
from redrafter.utils.paths import check_drafter_path


def export(
    context: typer.Context,
    drafter: Annotated[str, typer.Argument(help="A drafter's folder or hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    form: Annotated[str, typer.Option("--format", help="apple: what apple/ml-recurrent-drafter reads.")] = "apple",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a drafter that the folder holds.")] = False,
) -> None:
    """Write a drafter as other software reads it; `--drafter` and `info` read such folders too."""
    if form != "apple":
        raise RedrafterError(f"--format {form} is not one of apple.")
    check_drafter_path(drafter)
    check_drafter_folder(output, overwrite=overwrite, inputs=[drafter], advice=OVERWRITE)
    claim(context, output)
    from rich.console import Console

    from redrafter.heads.recurrent import RecurrentDrafter
    from redrafter.integrations import apple

    loaded = RecurrentDrafter.from_pretrained(drafter)
    apple.export(loaded, output)
    beam_length = loaded.config.beam_length + 1
    Console(stderr=True, soft_wrap=True).print(
        f"Wrote {output}. Its --beam_length counts the guaranteed token: {beam_length} drafts what this one drafts."
    )
