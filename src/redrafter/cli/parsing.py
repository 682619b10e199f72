"""Option values that typer does not parse itself: settings, lists of numbers, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from redrafter.errors import RedrafterError

MAX_NAMED_ROWS = 10
"""Number of skipped rows whose errors are printed; the others are only counted."""

_ONE_TEXT = "a command writes one text per prompt; repeat the prompt, or use distill with several --temperature"
_TEXT_ONLY = "a command writes text only; redrafter.generate in Python returns scores"
_UNSUPPORTED_SETTINGS = {
    "num_return_sequences": _ONE_TEXT,
    "output_scores": _TEXT_ONLY,
    "output_logits": _TEXT_ONLY,
    "return_dict_in_generate": _TEXT_ONLY,
    "max_length": "use --max-new-tokens",
}
"""Settings that `--set` rejects, with advice."""


def read_settings(pairs: list[str] | None, **options: Any) -> dict[str, Any]:
    """The options that are not None, and the `NAME=VALUE` pairs of `--set`; a value that is not JSON is text.

    Raises RedrafterError for a name that is not a setting or that has an option of its own.
    """
    from redrafter.decoding.settings import FIELDS

    settings = {name: value for name, value in options.items() if value is not None}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise RedrafterError(f"--set takes NAME=VALUE, not {pair}.")
        if name in options:
            raise RedrafterError(f"--set {name}: use --{name.replace('_', '-')}.")
        if name in _UNSUPPORTED_SETTINGS:
            raise RedrafterError(f"--set {name}: {_UNSUPPORTED_SETTINGS[name]}.")
        if name not in (*FIELDS, "presence_penalty", "frequency_penalty"):
            raise RedrafterError(f"--set: {name} is not a generation setting; docs/settings.md lists them.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
        if settings[name] is None:
            raise RedrafterError(f"--set {name}: null has no effect; give the value that turns the setting off.")
    return settings


def template_variables(text: str | None) -> dict[str, Any]:
    """The variables in `--template-kwargs`.  Raises RedrafterError if it is not a JSON object."""
    from redrafter.data.rows import read_template_kwargs

    return {} if text is None else read_template_kwargs(text, "--template-kwargs")


def whole_numbers(text: str, option: str) -> list[int]:
    """A list such as 1,4,10, sorted and without repetitions.  Raises RedrafterError."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise RedrafterError(f"{option} takes whole numbers from 1, such as 1,4,10, not {text!r}.")
    return sorted({int(word) for word in words})


def numbers(text: str, option: str) -> list[float]:
    """A list such as 0,0.7,1, sorted and without repetitions.  Raises RedrafterError."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values or not all(0 <= value < float("inf") for value in values):
        raise RedrafterError(f"{option} takes numbers from 0, such as 0,0.7,1, not {text!r}.")
    return sorted(set(values))


@contextmanager
def skipping(bad_rows: str) -> Iterator[Callable[[str], None] | None]:
    """Yields the callback for `--bad-rows skip`, None for `stop`; prints how many rows were skipped at the end."""
    count = 0

    def skip(message: str) -> None:
        nonlocal count
        count += 1
        if count <= MAX_NAMED_ROWS:
            typer.echo(f"skipped: {message}", err=True)

    yield None if bad_rows == "stop" else skip
    if count:
        more = f"; only the first {MAX_NAMED_ROWS} are listed" if count > MAX_NAMED_ROWS else ""
        typer.echo(f"{count:,} bad rows were skipped{more}.", err=True)
