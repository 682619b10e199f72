"""`redrafter data`: shows what a training run would learn from a file."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_model_path

if TYPE_CHECKING:
    from redrafter.data.examples import Row


@dataclass(kw_only=True)
class DataOptions:
    """Options of `redrafter data`."""

    files: Annotated[list[str], typer.Argument(help=opt.SOURCES, metavar="FILES...")]
    model: Annotated[str, typer.Option(help="Target model: folder or Hub id.  Only its tokenizer is loaded.")]
    max_length: Annotated[int, typer.Option(min=3, help="Rows are cut to this number of tokens.")] = 1024
    row: Annotated[int, typer.Option(min=1, help="Number of the row to show.")] = 1
    template: opt.Template = None
    template_kwargs: opt.TemplateKwargs = None
    bad_rows: opt.BadRows = "stop"


@command("Train a drafter")
def data(options: DataOptions) -> None:
    """Show the number and lengths of training rows, and one row with the tokens to learn in colour."""
    check_model_path(options.model)
    from rich.console import Console
    from rich.text import Text

    from redrafter.cli.loading import config_value, load_tokenizer
    from redrafter.cli.parsing import skipping, template_variables
    from redrafter.cli.tables import description
    from redrafter.data.examples import read_rows

    variables = template_variables(options.template_kwargs)
    tokenizer = load_tokenizer(options.model, options.template, variables)
    vocab_size = config_value(options.model, "vocab_size")
    with skipping(options.bad_rows) as skip:
        rows = read_rows(options.files, tokenizer, template_kwargs=variables, vocab_size=vocab_size, skip=skip)
    if options.row > len(rows):
        raise RedrafterError(f"--row {options.row}: the data has {len(rows)} rows.")
    console = Console(soft_wrap=True)
    console.print(description(_summary(rows, options.max_length), style="bold"))

    shown, text = rows[options.row - 1].cut(options.max_length), Text()
    for trained, tokens in groupby(zip(shown.trained, shown.input_ids, strict=True), key=itemgetter(0)):
        part = tokenizer.decode([token for _, token in tokens])
        text.append(part, style="bold green" if trained else "dim")
    console.print(f"\nRow {options.row}, [bold green]tokens to learn[/] and [dim]context[/]:\n")
    console.print(text)


def _summary(rows: list[Row], max_length: int) -> dict[str, str]:
    """Counts and lengths."""
    cut = [row.cut(max_length) for row in rows]
    learned = {i for row in cut for i, trained in zip(row.input_ids, row.trained, strict=True) if trained}
    lengths = sorted(len(row.input_ids) for row in rows)
    median, percentile = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    return {
        "rows": f"{len(rows):,}",
        "tokens": f"{sum(len(row.input_ids) for row in cut):,}",
        "tokens to learn": f"{sum(row.learnt for row in cut):,}, {len(learned):,} different ones",
        "rows without tokens to learn": f"{sum(not row.learnt for row in cut):,}",
        "lengths": f"{lengths[0]:,} to {lengths[-1]:,}, median {median:,}, 95 % up to {percentile:,}",
        f"cut to {max_length:,}": f"{sum(length > max_length for length in lengths):,} rows",
    }
