"""The reference of the command line is written from the commands' own signatures.

`docs/commands.md` is written by `python tests/cli/test_reference.py > docs/commands.md`.  typer, click and rich format
nothing of it, so that neither their versions nor a terminal can change it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from redrafter.cli import app

VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value that has no name of its own."""

REPEATED = ("once or more", "may be repeated")
"""How a help says so itself."""

HEAD = """\
# Commands

Written from the commands themselves by `tests/cli/test_reference.py`; do not edit. A test holds it against them.

Exit status: 0, 1 for a failed check, 2 with one sentence for anything that cannot be done. `--debug`, anywhere, shows
where an error was raised; `redrafter --version` says the version, and `redrafter COMMAND --help` what stands here.

| command | |
|---|---|
"""


def commands() -> dict[str, Callable]:
    """The functions behind all commands, by name."""
    return {one.name or one.callback.__name__: one.callback for one in app.registered_commands}


def parameters(command: Callable) -> Iterator[tuple[str, type, Any, OptionInfo | ArgumentInfo]]:
    """Name, type without None, default (`empty` where one must be told) and what typer is told, of each."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        told = next((one for one in get_args(hints[name]) if isinstance(one, OptionInfo | ArgumentInfo)), None)
        if told is not None:  # else it is typer's own context
            kind = get_args(hints[name])[0]
            if type(None) in get_args(kind):
                kind = get_args(kind)[0]
            yield name, kind, parameter.default, told


def written(name: str, kind: type, told: OptionInfo | ArgumentInfo) -> str:
    """How a parameter is told."""
    if isinstance(told, ArgumentInfo):
        return told.metavar or f"[{name.upper()}]"
    option = name.replace("_", "-")
    own = [one for one in (told.default, *(told.param_decls or ())) if isinstance(one, str)]  # typer takes either
    if kind is bool:
        return " / ".join(own or (f"--{option}", f"--no-{option}"))
    return f"{' / '.join(own or (f'--{option}',))} {told.metavar or VALUES[(*get_args(kind), kind)[0]]}"


def row(name: str, kind: type, default: Any, told: OptionInfo | ArgumentInfo) -> str:
    """A parameter's row: what the help says of its default goes before the value, which may stand for another."""
    text, _, said = " ".join(told.help.split()).partition(" \\[default: ")
    if get_args(kind) and isinstance(told, OptionInfo) and not any(word in text.lower() for word in REPEATED):
        text += " May be repeated." if text.endswith((".", "…")) else "; may be repeated"
    if said or default is inspect.Parameter.empty:
        value = said.removesuffix("]") or "required"
    elif kind is bool:
        value = f"`{written(name, kind, told).split(' / ')[0]}`" if default else ""
    else:
        value = "" if default is None else f"`{default}`"
    cells = (f"`{written(name, kind, told)}`", text.replace("\\[", "["), value)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def page() -> str:
    """The text of `docs/commands.md`."""
    text = HEAD
    for name, command in commands().items():
        text += f"| [`{name}`](#redrafter-{name}) | {inspect.getdoc(command).splitlines()[0]} |\n"
    for name, command in commands().items():
        text += f"\n## redrafter {name}\n\n{inspect.getdoc(command)}\n\n| option | | default |\n|---|---|---|\n"
        text += "".join(row(*one) for one in parameters(command))
    return text


def test_the_docs_are_the_commands():
    assert (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text() == page()


if __name__ == "__main__":
    print(page(), end="")
