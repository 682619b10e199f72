"""Prompts by category, read from data files.

Guarantees that a sample is the same each time.  Does not know what is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.data.prompts import prompt_ids, read_prompts
from redrafter.errors import RedrafterError

ALL = "all"
"""The name of all categories together."""


@dataclass(frozen=True)
class Tasks:
    """Token ids of the prompts of each category."""

    prompts: Mapping[str, list[list[int]]]
    of: Mapping[str, int]
    """Number of prompts of each category in the data, before sampling."""
    too_long: int
    """Number of prompts that were excluded because they do not fit into the model's context."""

    @property
    def mixed(self) -> list[list[int]]:
        """All prompts, alternating between the categories."""
        rounds = chain.from_iterable(zip_longest(*self.prompts.values()))
        return [prompt for prompt in rounds if prompt is not None]

    def repeated(self, count: int) -> list[list[int]]:
        """The first `count` of `mixed`, which is repeated if it is shorter."""
        return list(islice(cycle(self.mixed), count))

    @property
    def digest(self) -> str:
        """Hash of all prompts and their order."""
        return hashlib.sha256(json.dumps(dict(self.prompts)).encode()).hexdigest()[:16]


def read(sources: Sequence[str | Path], key: str) -> list[tuple[str, dict[str, Any]]]:
    """All rows, each with its location; if no row of a file has `key`, the file's name is the category of its rows.

    Raises RedrafterError if a file has no rows.
    """
    rows = []
    for source in sources:
        rows_of_file = read_prompts(source)
        if not any(key in record for _, record in rows_of_file):
            name = Path(source).name.split(".")[0]
            rows_of_file = [(where, record | {key: name}) for where, record in rows_of_file]
        rows += rows_of_file
    return rows


def by_category(
    records: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "category",
    count: int | None = None,
    max_tokens: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Tasks:
    """Groups prompts by the value of `key`, at most `count` per category, evenly spaced over the category's rows.

    Prompts of more than `max_tokens` tokens are excluded; `template_kwargs` and `vocab_size` as in `prompt_ids`.
    Raises RedrafterError for a row without a prompt or category, and if no prompt is left.
    """
    prompts: dict[str, list[list[int]]] = {}
    too_long = 0
    for where, record in records:
        if key not in record:
            raise RedrafterError(f'{where}: the row has no "{key}", but other rows do.')
        name = str(record[key])
        if name == ALL:
            raise RedrafterError(f'{where}: the {key} "{ALL}" is reserved for all categories together; rename it.')
        ids = prompt_ids(record, tokenizer, where, template_kwargs=template_kwargs, vocab_size=vocab_size)
        category = prompts.setdefault(name, [])
        if max_tokens is not None and len(ids) > max_tokens:
            too_long += 1
        else:
            category.append(ids)
    kept = {name: category for name, category in prompts.items() if category}
    if not kept:
        raise RedrafterError(f"All {too_long} prompts are too long for the model's context and the new tokens.")
    sizes = {name: len(category) for name, category in kept.items()}
    return Tasks({name: _sample(category, count) for name, category in kept.items()}, sizes, too_long)


def _sample(rows: list[list[int]], count: int | None) -> list[list[int]]:
    if count is None or count >= len(rows):
        return rows
    return [rows[number * len(rows) // count] for number in range(count)]


def file_names(sources: Iterable[str | Path]) -> list[str]:
    """The names of files without their folders."""
    return [Path(source).name for source in sources]
