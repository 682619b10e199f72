"""Prompts by category, as rows of data files give them.

Promises a sample that is the same each time.  Does not know what is measured on it.
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
    """Token ids of the prompts of every category, and what they were taken from."""

    prompts: Mapping[str, list[list[int]]]
    of: Mapping[str, int]
    """Prompts of each category in the data."""
    too_long: int
    """Prompts left out, for the model has no room for them and for what is to be written."""

    @property
    def mixed(self) -> list[list[int]]:
        """One of each category in turn."""
        turns = chain.from_iterable(zip_longest(*self.prompts.values()))
        return [prompt for prompt in turns if prompt is not None]

    def repeated(self, count: int) -> list[list[int]]:
        """So many of those, again from the first where they are too few."""
        return list(islice(cycle(self.mixed), count))

    @property
    def digest(self) -> str:
        """Of all prompts and their order."""
        return hashlib.sha256(json.dumps(dict(self.prompts)).encode()).hexdigest()[:16]


def read(sources: Sequence[str | Path], key: str) -> list[tuple[str, dict[str, Any]]]:
    """All rows with their places; where no row of a file has the `key`, its name is their category.

    Raises RedrafterError where a file has no row.
    """
    found = []
    for source in sources:
        own = read_prompts(source)
        if not any(key in record for _, record in own):
            name = Path(source).name.split(".")[0]
            own = [(where, record | {key: name}) for where, record in own]
        found += own
    return found


def by_category(
    records: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "category",
    count: int | None = None,
    room: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Tasks:
    """Prompts of rows by the value of their `key`; `count` of each at most, evenly spaced over the category's rows.

    `room`: tokens that a prompt may have; `template_kwargs` and `vocab_size` as in `prompts.prompt_ids`.  Raises
    RedrafterError for a row that has no prompt or no such key, and where no row is left.
    """
    found: dict[str, list[list[int]]] = {}
    too_long = 0
    for where, record in records:
        if key not in record:
            raise RedrafterError(f'{where}: the row has no "{key}", which others have.')
        name = str(record[key])
        if name == ALL:
            raise RedrafterError(f'{where}: the {key} "{ALL}" stands for all of them together; name it otherwise.')
        ids = prompt_ids(record, tokenizer, where, template_kwargs=template_kwargs, vocab_size=vocab_size)
        own = found.setdefault(name, [])
        if room is not None and len(ids) > room:
            too_long += 1
        else:
            own.append(ids)
    if not any(found.values()):
        raise RedrafterError(f"All {too_long} prompts are too long for the model and for what is to be written.")
    kept = {name: own for name, own in found.items() if own}
    return Tasks(
        {name: _spread(own, count) for name, own in kept.items()}, {n: len(p) for n, p in kept.items()}, too_long
    )


def _spread(rows: list[list[int]], count: int | None) -> list[list[int]]:
    if count is None or count >= len(rows):
        return rows
    return [rows[number * len(rows) // count] for number in range(count)]


def file_names(sources: Iterable[str | Path]) -> list[str]:
    """The names of data files without their folders, for a reader."""
    return [Path(one).name for one in sources]
