"""`redrafter info`: what a drafter folder is."""

from __future__ import annotations

from typing import Annotated

import typer


def info(path: Annotated[str, typer.Argument(help="A drafter's folder or hub id.")]) -> None:
    """Say what a drafter folder is, its size and its target."""
    from rich.console import Console
    from rich.table import Table

    from redrafter import hub
    from redrafter.drafter import RecurrentDrafter

    drafter = RecurrentDrafter.from_pretrained(path)
    config = drafter.config
    table = Table(show_header=False, box=None)
    for name, value in {
        "drafter": path,
        "target": f"{config.target or 'not named'}, revision {config.target_revision or 'not named'}",
        "target's shape": f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "head": config.head_in_words,
        "context": config.context_in_words,
        "drafts by default": config.default_shape.in_words,
        **{f"from batch {shape.batch} on": shape.in_words for shape in config.shapes},
        **({"tuned on": config.tuned_on} if config.tuned_on else {}),
        "parameters": f"{hub.count_parameters(drafter):,} in {str(drafter.dtype).removeprefix('torch.')}",
        "on disk": f"{hub.size_on_disk(hub.fetch(path)) / 1e6:.1f} MB",
    }.items():
        table.add_row(name, value)
    Console().print(table)
