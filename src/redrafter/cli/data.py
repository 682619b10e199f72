"""`redrafter data`: what a training run would learn, before it does."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Annotated

import typer

from redrafter.cli.loading import BadRows, Sources, Template, TemplateKwargs
from redrafter.utils.paths import check_model_path


def data(
    files: Annotated[list[str], typer.Argument(help=Sources, metavar="FILES...")],
    model: Annotated[str, typer.Option(help="The target, of which the tokenizer alone is loaded.")],
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a row at most.")] = 1024,
    row: Annotated[int, typer.Option(min=1, help="The row to show.")] = 1,
    template: Template = None,
    template_kwargs: TemplateKwargs = None,
    bad_rows: BadRows = "stop",
) -> None:
    """Show rows, lengths and, in colour, the tokens that would be learnt."""
    check_model_path(model)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from redrafter.cli.loading import config_value, load_tokenizer, skipping, template_variables
    from redrafter.data.examples import read_rows
    from redrafter.errors import RedrafterError

    variables = template_variables(template_kwargs)
    tokenizer = load_tokenizer(model, template, variables)
    with skipping(bad_rows) as skip:
        rows = read_rows(
            files,
            tokenizer,
            template_kwargs=variables,
            vocab_size=config_value(model, "vocab_size"),
            skip=skip,
        )
    if row > len(rows):
        raise RedrafterError(f"--row {row}: the data has {len(rows)} rows.")
    lengths = sorted(len(one.input_ids) for one in rows)
    kept = [one.cut(max_length) for one in rows]
    learnt = sum(one.learnt for one in kept)
    kinds = {i for one in kept for i, trained in zip(one.input_ids, one.trained, strict=True) if trained}

    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_row("rows", f"{len(rows):,}")
    table.add_row("tokens", f"{sum(len(one.input_ids) for one in kept):,}")
    table.add_row("tokens to learn", f"{learnt:,}, of {len(kinds):,} kinds")
    table.add_row("rows without any", f"{sum(not one.learnt for one in kept):,}")
    middle = f"{lengths[len(lengths) // 2]:,}, 95 % up to {lengths[len(lengths) * 95 // 100]:,}"
    table.add_row("lengths", f"{lengths[0]:,} to {lengths[-1]:,}, median {middle}")
    table.add_row(f"cut to {max_length:,}", f"{sum(n > max_length for n in lengths):,} rows")
    console.print(table)

    shown = Text()
    tokens = zip(kept[row - 1].trained, kept[row - 1].input_ids, strict=True)
    for trained, stretch in groupby(tokens, key=itemgetter(0)):
        text = tokenizer.decode([token for _, token in stretch])
        shown.append(text, style="bold green" if trained else "dim")
    console.print(f"\nRow {row}, [bold green]what is learnt[/] [dim]and what is only read[/]:\n")
    console.print(shown)
