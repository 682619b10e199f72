"""Work on rows of data files that goes on where it was killed; and the paper's own: true text, continued everywhere.

Promises that every row is read and checked before any is worked on, that rows are kept in their order, and that what
comes of a row depends on its own number alone: not on batches, drafters or interruptions.  Does not know how answers
are written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redrafter.errors import RedrafterError
from redrafter.files import Skip, read_records
from redrafter.request import ends_of
from redrafter.results import Event
from redrafter.settings import ONE_TEXT, resolve
from redrafter.target import Target
from redrafter.training.continuations import CHUNK, continuations
from redrafter.training.data import Row, collate, tokenized_rows
from redrafter.training.journal import Journal

LOGITS = 2**28
"""Logits of the target that a run over true text makes at most, unless one row has more: 1 GB in float32."""


@dataclass(frozen=True)
class Prompt:
    """A row of the sources, counted from 0; `digest` is one of all rows up to it."""

    number: int
    where: str
    record: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Done:
    """What came of the prompts up to `last`, and how many `tokens`, `steps`, `answers` and answers `cut` short it was.

    All of it is kept at once, or none.
    """

    last: Prompt
    rows: list[dict[str, Any]]
    counts: Counter[str]


@dataclass
class Tally:
    """What has been written since the start, to be looked at while it grows."""

    tokens: int = 0
    steps: int = 0

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, counted."""
        for event in events:
            self.tokens += len(event.tokens)
            self.steps += 1
            yield event


def least(*limits: int | None) -> int | None:
    """The smallest of those that are told."""
    return min((limit for limit in limits if limit is not None), default=None)


def named(prompt: Prompt, temperature: float | None = None) -> dict[str, Any]:
    """Which row of the sources it was, counted from 1, and what it calls itself."""
    names: dict[str, Any] = {"row": prompt.number + 1}
    if "id" in prompt.record:
        names["id"] = prompt.record["id"]
    return names if temperature is None else {**names, "temperature": float(temperature)}


def read(sources: Iterable[str | Path], *, limit: int | None = None, skip: Skip | None = None) -> Iterator[Prompt]:
    """The first `limit` rows of the sources."""
    digest = hashlib.sha256()
    for number, (where, record) in enumerate(islice(read_records(sources, skip), limit)):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        yield Prompt(number, where, record, digest.hexdigest())


@dataclass(frozen=True)
class Survey:
    """What a first look at all rows found."""

    total: int
    bad: frozenset[int]
    digest: str
    """Of all rows."""


def survey(
    sources: Iterable[str | Path],
    check: Callable[[Prompt], object],
    journal: Journal,
    *,
    limit: int | None = None,
    skip: Skip | None = None,
) -> Survey:
    """Reads every row before any is worked on, and checks those that the journal lacks.

    A row for which `check` raises RedrafterError is told to `skip`, or without it the error is raised; so is one where
    there is no row at all, or where the journal is about others.
    """
    total, bad, digest, passed = 0, set(), "", ""
    for prompt in read(sources, limit=limit, skip=skip):
        total, digest = total + 1, prompt.digest
        passed = digest if total == journal.done else passed
        try:
            if prompt.number >= journal.done:
                check(prompt)
        except RedrafterError as error:
            if skip is None:
                raise
            skip(str(error))
            bad.add(prompt.number)
    if total == len(bad):
        raise RedrafterError(f"{', '.join(map(str, sources))} holds no row to work on.")
    if passed != journal.source:
        raise RedrafterError(
            f"{journal.path} holds what came of {journal.done:,} other rows: give the same, perhaps with more after "
            "them, name another file, or pass --overwrite."
        )
    return Survey(total, frozenset(bad), digest)


def distil(
    sources: Iterable[str | Path],
    found: Survey,
    journal: Journal,
    work: Callable[[Iterator[Prompt]], Iterator[Done]],
    *,
    limit: int | None = None,
) -> Iterator[int]:
    """Works on the rows that the journal lacks and keeps what comes of them; yields how many of all are done.

    Raises RedrafterError as `work` does, naming what is kept.
    """
    rest = (
        prompt
        for prompt in read(sources, limit=limit, skip=lambda sentence: None)
        if prompt.number >= journal.done and prompt.number not in found.bad
    )
    journal.open()
    try:
        for done in work(rest):
            journal.checkpoint(done.rows, done=done.last.number + 1, source=done.last.digest, counts=done.counts)
            yield journal.done
        journal.checkpoint([], done=found.total, source=found.digest, counts=Counter())
    except RedrafterError as error:
        kept = f"What came of {journal.done:,} of {found.total:,} rows is kept, and the same command goes on there."
        raise RedrafterError(f"{error} {kept}") from error
    finally:
        journal.close()


def by_continuation(
    prompts: Iterator[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    depth: int,
    chunk: int,
    batch_size: int,
    limit: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    tally: Tally | None = None,
) -> Iterator[Done]:
    """True text with the `depth` tokens that the target writes after each of its tokens, greedily (paper, section 4).

    Rows are those of `data.tokenized_rows`, cut to `limit` and the model's context; those of a chunk run in batches of
    about equal length.
    """
    tally = tally or Tally()
    target = Target(model)
    limit = least(limit, target.context_length)
    ends = ends_of(resolve(target.model, None, dict(ONE_TEXT)))
    while part := list(islice(prompts, chunk)):
        before = tally.tokens
        own = [
            (prompt, row if limit is None else row.cut(limit))
            for prompt in part
            for row in tokenized_rows(
                prompt.record,
                tokenizer,
                prompt.where,
                template_kwargs=template_kwargs,
                vocab_size=target.vocab_size,
            )
        ]
        more = continued(target, [row for _, row in own], depth=depth, ends=ends, batch_size=batch_size, tally=tally)
        made = [
            {
                **named(prompt),
                "input_ids": row.input_ids,
                "loss_mask": [int(trained) for trained in row.trained],
                "continuations": row.continuations,
            }
            for (prompt, _), row in zip(own, more, strict=True)
        ]
        yield Done(part[-1], made, Counter(rows=len(made), tokens=tally.tokens - before))


def continued(
    target: Target,
    rows: list[Row],
    *,
    depth: int,
    ends: frozenset[int],
    batch_size: int,
    tally: Tally | None = None,
) -> list[Row]:
    """The same rows with what the target writes after each of their tokens, in batches of about equal length."""
    tally = tally or Tally()
    found: dict[int, list[list[int]]] = {}
    for batch in _of_like_length(rows, batch_size, target.vocab_size):
        ids = collate([rows[index] for index in batch])["input_ids"].to(target.device)
        more = continuations(target, ids, depth=depth, ends=ends).tolist()
        found |= {index: own[: len(rows[index].input_ids)] for index, own in zip(batch, more, strict=True)}
        tally.tokens += sum(token >= 0 for index in batch for own in found[index] for token in own)
    return [replace(row, continuations=found[index]) for index, row in enumerate(rows)]


def _of_like_length(rows: list[Row], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Places of rows, shortest first, in batches whose logits fit into LOGITS."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    while order:
        longest = len(rows[order[:batch_size][-1]].input_ids)
        size = min(batch_size, max(1, LOGITS // (min(longest, CHUNK) * vocabulary)))
        yield order[:size]
        order = order[size:]
