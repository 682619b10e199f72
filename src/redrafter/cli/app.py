"""The command-line application and the decorator that adds a command to it.

A command is one module of this package.  It declares a dataclass of options and a function that takes it; every field
becomes an option or an argument.  The package finds the module by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from redrafter import __version__

PANELS = ("Generate text", "Train a drafter", "Measure", "Drafter folders")
"""Groups of commands in `redrafter --help`, in order."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact, fast speculative decoding with a recurrent drafter: the same text as without a drafter, sooner. "
    "Start with `redrafter demo`.",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"redrafter {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.  Works at any position."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options of all commands."""


def command(panel: str, name: str | None = None) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Registers a function as a command; its parameter `options` is annotated with a dataclass.

    The fields of the dataclass are annotated as typer expects, with `Annotated`.  In `--help`, its own options precede
    those of its base classes; a class's options appear under the heading that it names in `PANEL`.
    """

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        options: Any = get_type_hints(function)["options"]
        parameters = list(_parameters(options))

        def run(**values: Any) -> None:
            function(options(**values))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register


def _parameters(options: Any) -> Iterator[inspect.Parameter]:
    """The parameters of a dataclass: its own fields, then those of its base classes."""
    defaults = {field.name: field.default for field in fields(options)}
    hints = get_type_hints(options, include_extras=True)
    for owner in options.__mro__[:-1]:
        for name in inspect.get_annotations(owner):
            if name not in defaults:
                continue
            kind, *metadata = get_args(hints[name])
            metadata = [copy(info) for info in metadata]  # several commands share an option
            for info in metadata:
                if isinstance(info, OptionInfo) and "PANEL" in vars(owner):
                    info.rich_help_panel = vars(owner)["PANEL"]
            default = defaults.pop(name)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=Annotated[(kind, *metadata)],
            )
