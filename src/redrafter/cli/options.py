"""Commands whose options are the fields of dataclasses.

Each option is declared once: as a field `name: Annotated[type, typer.Option(...)] = default`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

import typer


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Decorates a function whose parameters are a `typer.Context` and dataclasses of options.

    The result is a function for `typer.Typer.command` with one parameter per field.  A field that several dataclasses
    share is one option.
    """
    groups = {name: group for name, group in get_type_hints(run).items() if name not in ("context", "return")}
    options: dict[str, inspect.Parameter] = {}
    for group in groups.values():
        types = get_type_hints(group, include_extras=True)
        options |= {field.name: _parameter(field, types[field.name]) for field in fields(group)}

    def call(context: typer.Context, **values: Any) -> None:
        run(
            context,
            **{name: kind(**{one.name: values[one.name] for one in fields(kind)}) for name, kind in groups.items()},
        )

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = inspect.Signature([context, *options.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in (context, *options.values())}
    call.__name__, call.__doc__ = run.__name__, run.__doc__
    return call


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
