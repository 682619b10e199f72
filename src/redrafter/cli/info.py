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
    shape = f"{config.beam_width} beams of {config.beam_length} tokens"
    if config.node_budget:
        shape += f", the {config.node_budget} most probable nodes"
    table = Table(show_header=False, box=None)
    for name, value in {
        "drafter": path,
        "target": f"{config.target or 'not named'}, revision {config.target_revision or 'not named'}",
        "target's shape": f"vocabulary {config.vocab_size:,}, hidden size {config.hidden_size:,}",
        "head": config.head_in_words,
        "context": config.context_in_words,
        "drafts by default": shape,
        "parameters": f"{hub.count_parameters(drafter):,} in {str(drafter.dtype).removeprefix('torch.')}",
        "on disk": f"{hub.size_on_disk(hub.fetch(path)) / 1e6:.1f} MB",
    }.items():
        table.add_row(name, value)
    Console().print(table)
