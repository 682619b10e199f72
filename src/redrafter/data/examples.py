"""Training rows: token ids with a mask of the tokens to learn, read from data files and collated to batches.

Errors name the file and position of a bad row.  Packed rows stay separate segments.  Does not know the target's weights
or the drafter.
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
    """One training sequence; `trained[i]` tells whether token i is learned.

    `continuations[i]`, if present, are the tokens that the target generates greedily after token i (the paper's local
    distillation), padded with -1.  The drafter then learns those instead of the tokens that follow in the row.
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
        """Number of tokens to learn, without the first token of the row, which has no context."""
        return sum(self.trained[1:])

    def before_learnt(self, reach: int) -> list[bool]:
        """For each token, whether one of the `reach` tokens after it is learned."""
        flags = [False] * len(self.trained)
        distance = reach + 1  # to the next token that is learned
        for i in reversed(range(len(self.trained))):
            flags[i] = distance <= reach
            distance = 1 if self.trained[i] else distance + 1
        return flags


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
    """Training rows from the first `limit` rows of the sources (`files.read_records`), cut to `max_length` tokens.

    A row holds one of: `input_ids`, `loss_mask` and optional `continuations`, as `redrafter distill` writes them; a
    chat, whose assistant messages are learned; a plain prompt and its completion, which is learned; `text`, which is
    learned completely (`rows.parse_row`).  `template_kwargs` as there; `vocab_size` is the model's.  A bad row is
    reported to `skip`; without `skip` it raises RedrafterError.  Also raises it if no row has a token to learn.
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


def tokenized_rows(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> list[Row]:
    """The training rows of one row of data, in a format of `read_rows`.

    A chat becomes several rows if the chat template changes earlier messages (`conversations.tokenize_chat`).
    `vocab_size` is the model's, by default the tokenizer's.  Raises RedrafterError.
    """
    vocab_size = vocab_size or len(tokenizer)
    if "input_ids" in record:
        return [_token_row(record, vocab_size, where)]
    row = parse_row(record, where, template_kwargs=template_kwargs)
    if isinstance(row, Chat) and row.only_user:
        raise RedrafterError(f'{where}: "turns" holds no answers to learn: generate them with distill.')
    if isinstance(row, Chat):
        rows = [Row(ids, learned) for ids, learned in tokenize_chat(row, tokenizer, where)]
    else:
        rows = [_text_row(row, tokenizer, where)]
    for one in rows:
        check_ids(one.input_ids, vocab_size, where)
    return rows


def _text_row(row: Text, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    """Plain text; what follows the prompt is learned."""
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
    """Splits rows into those to train on, in order, and `held_out` random others.

    Drops rows without a token to learn, such as a row that was cut inside its prompt.  Raises RedrafterError if no row
    is left to train on.
    """
    rows = [row for row in rows if row.learnt]
    chosen = set(random.Random(seed).sample(range(len(rows)), min(held_out, len(rows))))
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    if not kept:
        raise RedrafterError(
            f"With {held_out} rows held out, none of the {len(rows)} with a token to learn is left to train on."
        )
    return kept, [rows[number] for number in sorted(chosen)]


def pack(rows: Iterable[Row], length: int) -> list[list[Row]]:
    """Packs complete rows into groups of at most `length` tokens: best fit, longest first.

    A longer row gets a group to itself.
    """
    groups: list[list[Row]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # groups by the number of tokens that still fit
    most = 0
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        left = next((left for left in range(size, most + 1) if room[left]), None)
        if left is None:
            groups.append([])
            index, left = len(groups) - 1, max(length, size)
        else:
            index = room[left].pop()
        groups[index].append(row)
        room[left - size].append(index)
        most = max(most, left - size)
    return groups


def collate(groups: Sequence[Row | list[Row]], *, states: Callable[[Row], Tensor] | None = None) -> dict[str, Tensor]:
    """Collates rows, or groups of packed rows, to a right-padded batch of B entries and P positions.

    `input_ids` (long) [B, P]; `segments` (long) [B, P]: 1, 2, … for the rows of an entry, 0 for padding; `trained`
    (bool) [B, P]: never the first token of a row, which has no context; if rows have them, `continuations` (long)
    [B, P, depth], padded with -1.  With `states`, which returns a row's hidden states [tokens, F], `hidden` [B, P, F].
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
            span = slice(begin, begin + len(row.input_ids))
            ids[entry, span] = torch.tensor(row.input_ids)
            segments[entry, span] = number
            trained[entry, span] = torch.tensor(row.trained)
            trained[entry, begin] = False
            if row.continuations:
                continuations[entry, span] = torch.tensor(row.continuations)
            begin = span.stop
    batch = {"input_ids": ids, "segments": segments, "trained": trained}
    if states is not None:
        batch["hidden"] = pad_sequence([torch.cat([states(row) for row in rows]) for rows in entries], batch_first=True)
    return batch | ({"continuations": continuations} if depth else {})


def most_frequent(rows: list[Row], count: int) -> Tensor:
    """The draft vocabulary [count]: the tokens that are learned most often; ties go to the smaller id.

    Raises RedrafterError if the rows have fewer different tokens to learn.
    """
    counts = _counts(rows)
    different = int((counts > 0).sum())
    if different < count:
        raise RedrafterError(
            f"The data has {different} different tokens to learn, fewer than a draft vocabulary of {count}: choose a "
            "smaller one."
        )
    return counts.argsort(descending=True, stable=True)[:count]


def vocabulary_size_for(rows: list[Row], share: float) -> int:
    """The size of the smallest draft vocabulary that covers this share of the tokens to learn."""
    counts = _counts(rows).sort(descending=True).values
    return int((counts.cumsum(0) < share * counts.sum()).sum()) + 1


def coverage(rows: list[Row], vocabulary: Tensor) -> float:
    """The share of the tokens to learn that a draft vocabulary [count] contains."""
    counts = _counts(rows)
    known = vocabulary.cpu()
    return float(counts[known[known < len(counts)]].sum() / counts.sum().clamp(min=1))


def _counts(rows: list[Row]) -> Tensor:
    """How often each token is learned, [largest id + 1]."""
    learned = [i for row in rows for i, trained in zip(row.input_ids, row.trained, strict=True) if trained]
    return torch.tensor(learned).bincount()


def _token_row(record: dict[str, Any], vocabulary: int, where: str) -> Row:
    """A row that `distill` wrote."""
    ids, mask, more = record["input_ids"], record.get("loss_mask"), record.get("continuations")
    if not _are_ids(ids, vocabulary):
        raise RedrafterError(f'{where}: "input_ids" must be whole numbers from 0 to {vocabulary - 1}.')
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise RedrafterError(f'{where}: "input_ids" needs a "loss_mask" of the same length that holds 0 and 1.')
    if more is not None and not (
        isinstance(more, list)
        and len(more) == len(ids)
        and all(_are_ids(m, vocabulary, least=-1) and len(m) == len(more[0]) > 1 for m in more)
    ):
        raise RedrafterError(f'{where}: "continuations" must be lists of at least two ids, all of the same length.')
    return Row(ids, [bool(m) for m in mask], more)


def _are_ids(ids: Any, vocabulary: int, least: int = 0) -> bool:
    return isinstance(ids, list) and all(type(i) is int and least <= i < vocabulary for i in ids)
