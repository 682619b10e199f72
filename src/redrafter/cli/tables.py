"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_figures(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = ()) -> None:
    """Prints a table of figures, right-aligned except in the columns `left`.  An empty row draws a line.

    The table is not fitted to the terminal: in a narrow one, lines wrap instead of losing digits.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    Console(highlight=False, width=1000).print(table)


def description(lines: dict[str, str], *, style: str | None = None) -> Table:
    """A table of names and their values."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style=style)
    for name, value in lines.items():
        table.add_row(name, value)
    return table
