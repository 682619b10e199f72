"""`redrafter export`: converts a drafter folder for other software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_drafter_folder, locked
from redrafter.utils.paths import check_drafter_path

NO_SPECULATORS = (
    "The speculators format cannot describe a recurrent drafter: its kinds of drafters (in vLLM 0.33 eagle3, peagle, "
    'dflash, dflash2 and dspark) consist of transformer layers. Serve the folder as it is, with "method": "redrafter" '
    "in vLLM's speculative config (docs/vllm.md)."
)
"""Kinds: `vllm/transformers_utils/configs/speculators/algos.py` of vLLM, and
https://docs.vllm.ai/projects/speculators/en/latest/reference/speculators/"""


@dataclass(kw_only=True)
class ExportOptions:
    """Options of `redrafter export`."""

    drafter: Annotated[str, typer.Argument(help="Drafter: folder or Hub id.")]
    output: Annotated[Path, typer.Option(help="Folder to write to.")]
    form: Annotated[
        Literal["apple", "speculators"],
        typer.Option(
            "--format",
            help="apple: the format of apple/ml-recurrent-drafter. speculators: that of vllm-project/speculators, "
            "which cannot describe recurrent drafters; the error says what to do instead.",
        ),
    ] = "apple"
    overwrite: opt.Overwrite = False


@command("Drafter folders")
def export(options: ExportOptions) -> None:
    """Convert a drafter to another project's format.  All commands read the result too."""
    check_drafter_path(options.drafter)
    if options.form == "speculators":
        raise RedrafterError(NO_SPECULATORS)
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
