"""Training rows: data files to token ids and a mask of the tokens to learn, alone or packed.

Promises that a bad row is named by file and place, and that rows packed together do not meet.  Does not know the
target's weights or the drafter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from redrafter.data.conversations import tokenize_chat
from redrafter.data.files import Skip, read_records
from redrafter.data.prompts import check_ids
from redrafter.data.rows import Chat, Text, parse_row
from redrafter.errors import RedrafterError


@dataclass(frozen=True)
class Row:
    """One training sequence; `trained[i]` says whether token i is to be learnt.

    `continuations[i]`, where there are some, is what the target itself writes after token i, greedily (the paper's
    local distillation), -1 after its end: the drafter then learns those instead of the tokens that follow.
    """

    input_ids: list[int]
    trained: list[bool]
    continuations: list[list[int]] | None = None

    def cut(self, length: int) -> Row:
        """The first `length` tokens."""
        more = None if self.continuations is None else self.continuations[:length]
        return Row(self.input_ids[:length], self.trained[:length], more)

    @property
    def learnt(self) -> int:
        """Tokens to learn that have a context: the first of a row has none."""
        return sum(self.trained[1:])

    def before_learnt(self, reach: int) -> list[bool]:
        """Whether one of the `reach` tokens after each one is to be learnt."""
        found = [False] * len(self.trained)
        distance = reach + 1  # to the next one that is learnt
        for i in reversed(range(len(self.trained))):
            found[i] = distance <= reach
            distance = 1 if self.trained[i] else distance + 1
        return found


def read_rows(
    sources: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    skip: Skip | None = None,
) -> list[Row]:
    """The training rows of the first `limit` rows of the sources (`files.read_records`), cut to `max_length` tokens.

    A row holds `input_ids` and `loss_mask` (and perhaps `continuations`), as `redrafter distill` writes them; or a
    chat, of which the assistant's answers are learned; or a plain prompt and its completion, of which the latter is
    learned; or `text` alone, of which all is (`rows.parse_row`).  `template_kwargs` as there; `vocab_size` is that of
    the model.  A row that cannot be read is reported to `skip`, or without it raises RedrafterError, as do sources of
    which not one row has a token to learn.
    """
    rows: list[Row] = []
    for where, record in islice(read_records(sources, skip), limit):
        try:
            own = tokenized_rows(record, tokenizer, where, template_kwargs=template_kwargs, vocab_size=vocab_size)
        except RedrafterError as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        rows += own if max_length is None else [row.cut(max_length) for row in own]
    if not any(any(row.trained[2:]) for row in rows):
        raise RedrafterError("The data holds no token to learn.")
    return rows


def tokenized(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Row:
    """The only training row of a row of data.  Raises RedrafterError where there are several (`tokenized_rows`)."""
    rows = tokenized_rows(record, tokenizer, where, template_kwargs=template_kwargs, vocab_size=vocab_size)
    if len(rows) > 1:
        raise RedrafterError(
            f"{where}: the chat template renders earlier turns in another way once others follow, so this row becomes "
            f"{len(rows)} training rows."
        )
    return rows[0]


def tokenized_rows(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> list[Row]:
    """The training rows of a row of data, of the formats that `read_rows` takes.

    A chat becomes several where the chat template changes earlier turns (`conversations.tokenize_chat`).  `vocab_size`
    is the model's, by default the tokenizer's.  Raises RedrafterError.
    """
    vocab_size = vocab_size or len(tokenizer)
    if "input_ids" in record:
        return [_as_told(record, vocab_size, where)]
    row = parse_row(record, where, template_kwargs=template_kwargs)
    if isinstance(row, Chat) and row.only_user:
        raise RedrafterError(f'{where}: "turns" hold no answers to learn; distill writes them.')
    if isinstance(row, Chat):
        rows = [Row(ids, learned) for ids, learned in tokenize_chat(row, tokenizer, where)]
    else:
        rows = [_plain(row, tokenizer, where)]
    for one in rows:
        check_ids(one.input_ids, vocab_size, where)
    return rows


def _plain(row: Text, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    """Plain text, of which what follows the prompt is learned."""
    if row.completion is None:
        raise RedrafterError(f'{where}: the row has a "prompt" and no "completion" or "text" to learn.')
    prompt = row.prompt or ""
    ids, end = list(tokenizer(prompt + row.completion).input_ids), tokenizer.eos_token_id
    if row.ends and end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    known = list(tokenizer(prompt).input_ids) if prompt else []
    same = next((i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
    return Row(ids, [i >= same for i in range(len(ids))])


def split(rows: list[Row], held_out: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on, in their order, and `held_out` others, chosen by the seed; all of them teach something.

    A row without a token to learn, of which nothing but the prompt is left, say, would count in a batch for nothing.
    Raises RedrafterError where none would be left to train on.
    """
    rows = [row for row in rows if row.learnt]
    chosen = set(random.Random(seed).sample(range(len(rows)), min(held_out, len(rows))))
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    if not kept:
        raise RedrafterError(f"With {held_out} rows held out, none of the {len(rows)} with a token to learn is left.")
    return kept, [rows[number] for number in sorted(chosen)]


def pack(rows: Iterable[Row], length: int) -> list[list[Row]]:
    """Rows put together, none divided, into groups of at most `length` tokens: best fit, longest first.

    A row longer than that is a group of its own.
    """
    groups: list[list[Row]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # groups by the tokens that they can still take
    most = 0
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        left = next((left for left in range(size, most + 1) if room[left]), None)
        if left is None:
            groups.append([])
            place, left = len(groups) - 1, max(length, size)
        else:
            place = room[left].pop()
        groups[place].append(row)
        room[left - size].append(place)
        most = max(most, left - size)
    return groups


def collate(groups: Sequence[Row | list[Row]], *, states: Callable[[Row], Tensor] | None = None) -> dict[str, Tensor]:
    """A batch padded right, each entry a row or several that share one: [B, P] each.

    `input_ids`, `segments` (long: 1, 2, … for the rows of an entry in turn, 0 for padding), `trained` (bool; never the
    first token of a row, which has no context), and where rows have them `continuations` (long) [B, P, depth], -1 where
    there are none.  With `states`, which gives those of a row [tokens, F], `hidden` [B, P, F] holds them.
    """
    entries = [[group] if isinstance(group, Row) else group for group in groups]
    size = max(sum(len(row.input_ids) for row in rows) for rows in entries)
    shape = (len(entries), size)
    ids, segments = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    trained = torch.zeros(shape, dtype=torch.bool)
    depth = max((len(c) for rows in entries for row in rows for c in row.continuations or []), default=0)
    continuations = torch.full((*shape, depth), -1)
    for entry, rows in enumerate(entries):
        begin = 0
        for number, row in enumerate(rows, start=1):
            place = slice(begin, begin + len(row.input_ids))
            ids[entry, place] = torch.tensor(row.input_ids)
            segments[entry, place] = number
            trained[entry, place] = torch.tensor(row.trained)
            trained[entry, begin] = False
            if row.continuations:
                continuations[entry, place] = torch.tensor(row.continuations)
            begin = place.stop
    batch = {"input_ids": ids, "segments": segments, "trained": trained}
    if states is not None:
        batch["hidden"] = pad_sequence([torch.cat([states(row) for row in rows]) for rows in entries], batch_first=True)
    return batch | ({"continuations": continuations} if depth else {})


def most_frequent(rows: list[Row], count: int) -> Tensor:
    """The `count` ids that are learnt most often, as a draft vocabulary [count]; ties go to the smaller id.

    Raises RedrafterError where the rows have fewer kinds of tokens to learn.
    """
    counts = _counts(rows)
    kinds = int((counts > 0).sum())
    if kinds < count:
        raise RedrafterError(
            f"The data has {kinds} kinds of tokens to learn, fewer than a draft vocabulary of {count}."
        )
    return counts.argsort(descending=True, stable=True)[:count]


def kinds_for(rows: list[Row], share: float) -> int:
    """How many of the most frequent tokens make up this share of the tokens to learn."""
    counts = _counts(rows).sort(descending=True).values
    return int((counts.cumsum(0) < share * counts.sum()).sum()) + 1


def coverage(rows: list[Row], vocabulary: Tensor) -> float:
    """The share of the tokens to learn that a draft vocabulary [count] holds."""
    counts = _counts(rows)
    known = vocabulary.cpu()
    return float(counts[known[known < len(counts)]].sum() / counts.sum().clamp(min=1))


def _counts(rows: list[Row]) -> Tensor:
    """How often each id is to be learnt, [largest id + 1]."""
    learnt = [i for row in rows for i, trained in zip(row.input_ids, row.trained, strict=True) if trained]
    return torch.tensor(learnt).bincount()


def _as_told(record: dict[str, Any], vocabulary: int, where: str) -> Row:
    ids, mask, more = record["input_ids"], record.get("loss_mask"), record.get("continuations")
    if not _are_ids(ids, vocabulary):
        raise RedrafterError(f'{where}: "input_ids" must be whole numbers from 0 to {vocabulary - 1}.')
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise RedrafterError(f'{where}: "input_ids" needs a "loss_mask" of 0 and 1, one for each.')
    if more is not None and not (
        isinstance(more, list)
        and len(more) == len(ids)
        and all(_are_ids(m, vocabulary, least=-1) and len(m) == len(more[0]) > 1 for m in more)
    ):
        raise RedrafterError(f'{where}: "continuations" must be lists of two ids or more, as long as each other.')
    return Row(ids, [bool(m) for m in mask], more)


def _are_ids(ids: Any, vocabulary: int, least: int = 0) -> bool:
    return isinstance(ids, list) and all(type(i) is int and least <= i < vocabulary for i in ids)
