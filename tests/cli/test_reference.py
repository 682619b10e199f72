"""`docs/commands.md` is generated from the signatures of the commands.

`python tests/cli/test_reference.py > docs/commands.md` writes it.  It does not use the help of typer and rich, so the
page depends neither on their versions nor on a terminal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from redrafter.cli import app

VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""Placeholders for values."""

REPEATED = ("once or more", "may be repeated")
"""Words by which a help text says that an option may be repeated."""

HEAD = """\
# Commands

Generated from the commands by `tests/cli/test_reference.py`; do not edit. A test compares the two.

Exit status: 0 for success, 1 for a failed check, 2 for an error, which is printed as one sentence. `--debug`, at any
position, shows the traceback of an error. `redrafter --version` prints the version, and `redrafter COMMAND --help` the
options of one command.

| command | |
|---|---|
"""


def commands() -> dict[str, Callable]:
    """The functions behind all commands, by name."""
    return {one.name or one.callback.__name__: one.callback for one in app.registered_commands}


def parameters(command: Callable) -> Iterator[tuple[str, type, Any, OptionInfo | ArgumentInfo]]:
    """Name, type without None, default (`empty` if required) and typer's info of every parameter."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        info = next((one for one in get_args(hints[name]) if isinstance(one, OptionInfo | ArgumentInfo)), None)
        if info is not None:  # None for typer's context
            kind = get_args(hints[name])[0]
            if type(None) in get_args(kind):
                kind = get_args(kind)[0]
            yield name, kind, parameter.default, info


def usage(name: str, kind: type, info: OptionInfo | ArgumentInfo) -> str:
    """How a parameter is written on the command line."""
    if isinstance(info, ArgumentInfo):
        return info.metavar or f"[{name.upper()}]"
    option = name.replace("_", "-")
    own = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]  # typer accepts either
    if kind is bool:
        return " / ".join(own or (f"--{option}", f"--no-{option}"))
    return f"{' / '.join(own or (f'--{option}',))} {info.metavar or placeholder(kind)}"


def placeholder(kind: Any) -> str:
    """The choices of a closed set, or a word for the values of a type."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(one.value for one in kind)
    return VALUES[(*get_args(kind), kind)[0]]


def row(name: str, kind: type, default: Any, info: OptionInfo | ArgumentInfo) -> str:
    """A parameter's row of the table; a default that the help text names takes precedence."""
    text, _, said = " ".join(info.help.split()).partition(" \\[default: ")
    if get_origin(kind) is list and isinstance(info, OptionInfo) and not any(word in text.lower() for word in REPEATED):
        text += " May be repeated." if text.endswith((".", "…")) else "; may be repeated"
    if said or default is inspect.Parameter.empty:
        value = said.removesuffix("]") or "required"
    elif kind is bool:
        value = f"`{usage(name, kind, info).split(' / ')[0]}`" if default else ""
    else:
        value = "" if default is None else f"`{default.value if isinstance(default, Enum) else default}`"
    cells = (f"`{usage(name, kind, info)}`", text.replace("\\[", "["), value)
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


def test_the_docs_list_all_commands_and_options():
    assert (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text() == page()


if __name__ == "__main__":
    print(page(), end="")
