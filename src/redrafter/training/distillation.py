"""Work on rows of data files that goes on where it was killed; and the paper's own: true text, continued everywhere.

Promises that every row is read and checked before any is worked on, that rows are written in their order and saved as
they finish, and that what comes of a row depends on its own number alone: not on batches, drafters or interruptions.
Does not know how answers are written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redrafter.data.examples import Row, collate, tokenized_rows
from redrafter.data.files import Skip, read_records
from redrafter.decoding.settings import ONE_TEXT, resolve
from redrafter.engine.inputs import end_tokens
from redrafter.engine.results import Event
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target
from redrafter.training.continuations import CHUNK, continuations
from redrafter.training.journal import Journal
from redrafter.utils.interrupt import deferred

LOGITS = 2**28
"""Logits of the target that a run over true text makes at most, unless one row has more: 1 GB in float32."""


SAVE_SECONDS = 30.0
"""Seconds between two checkpoints, by default."""


@dataclass(frozen=True)
class Prompt:
    """A row of the sources, counted from 0; `digest` is one of all rows up to it.

    `part` is the data of the `Part` that an interrupted run saved of it, or None.
    """

    number: int
    where: str
    record: dict[str, Any]
    digest: str
    part: Any = None


@dataclass(frozen=True)
class Done:
    """All rows of one prompt, and its counts: `rows`, `answers`, `tokens`, `steps` and answers `cut` short."""

    prompt: Prompt
    rows: list[dict[str, Any]]
    counts: Counter[str]


@dataclass(frozen=True)
class Part:
    """The finished answers of a prompt that needs more: JSON from which the work can continue.

    It replaces earlier parts of the prompt.  `share` is how much of the prompt is finished, from 0 to 1.
    """

    prompt: Prompt
    data: Any
    share: float


@dataclass
class Tally:
    """What has been written since the start, to be looked at while it grows; `tick` is called as it grows."""

    tokens: int = 0
    steps: int = 0
    tick: Callable[[], object] = lambda: None

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, counted."""
        for event in events:
            self.tokens += len(event.tokens)
            self.steps += 1
            self.tick()
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
    work: Callable[[Iterator[Prompt]], Iterator[Done | Part]],
    *,
    limit: int | None = None,
    save_seconds: float = SAVE_SECONDS,
    save_rows: int | None = None,
    tally: Tally | None = None,
) -> Iterator[float]:
    """Works on the rows that the journal lacks; yields how many of all are finished each time that changes.

    `work` may finish prompts in any order.  Finished rows are written in the order of the sources; those that wait for
    an earlier one, and parts, are saved in the journal's note.  Both are saved every `save_seconds`, after each
    `save_rows` prompts, and when an exception, such as an interrupt, ends the work.

    Raises RedrafterError as `work` does, naming what is kept.
    """
    kept = _Kept(journal, found, save_seconds=save_seconds, save_rows=save_rows)
    if tally is not None:
        tally.tick = kept.save_if_due
    journal.open()
    shown = 0.0
    try:
        try:
            for one in work(kept.missing(read(sources, limit=limit, skip=lambda sentence: None))):
                kept.take(one)
                kept.save_if_due()
                shown = kept.finished
                yield shown
        finally:  # also after an interrupt
            with deferred():
                kept.save()
        with deferred():
            journal.checkpoint([], done=found.total, source=found.digest, counts=Counter())
        if shown < found.total:  # bad rows at the end, or rows that an earlier run had finished
            yield float(found.total)
    except RedrafterError as error:
        kept_rows = f"What came of {saved(journal):,} of {found.total:,} rows is kept"
        raise RedrafterError(f"{error} {kept_rows}, and the same command goes on there.") from error
    finally:
        journal.close()


def saved(journal: Journal) -> int:
    """Prompts of which all rows are on the disk."""
    return journal.done + sum("rows" in result for result in journal.ahead.values())


@dataclass
class _Kept:
    """What is finished and not yet written, by the number of the prompt: rows with counts, or the data of a part."""

    journal: Journal
    survey: Survey
    save_seconds: float
    save_rows: int | None
    ready: set[int] = field(default_factory=set)
    """Prompts of which all rows are there."""
    shares: dict[int, float] = field(default_factory=dict)
    """How much of each prompt is finished."""

    def __post_init__(self) -> None:
        self._results: dict[int, dict[str, Any]] = dict(self.journal.ahead)
        self._saved, self._since = time.monotonic(), 0

    @property
    def finished(self) -> float:
        """Prompts, parts counted as fractions; of what an earlier run kept, only what has been read again."""
        return self.journal.done + sum(self.shares.values(), 0.0)

    def missing(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Prompts to work on, with the parts of an earlier run.  Results of other prompts are dropped."""
        begin = self.journal.done
        for prompt in prompts:
            if prompt.number < begin or prompt.number in self.survey.bad:
                continue
            result = self._results.get(prompt.number, {})
            if result and result["digest"] != prompt.digest:  # the source has changed from here on
                del self._results[prompt.number]
                result = {}
            if "rows" in result:
                self.ready.add(prompt.number)
                self.shares[prompt.number] = 1.0
            else:
                yield replace(prompt, part=result.get("part"))

    def take(self, one: Done | Part) -> None:
        """Keeps a result in memory."""
        number, result = one.prompt.number, dict[str, Any](digest=one.prompt.digest)
        if isinstance(one, Part):
            self._results[number] = result | {"part": one.data}
            self.shares[number] = one.share
        else:
            self._results[number] = result | {"rows": one.rows, "counts": one.counts}
            self.ready.add(number)
            self.shares[number] = 1.0
            self._since += 1

    def save_if_due(self) -> None:
        """Saves when the time has passed, or enough prompts are finished."""
        if time.monotonic() - self._saved >= self.save_seconds or self._since >= (self.save_rows or self._since + 1):
            with deferred():  # an interrupt waits until everything is on the disk
                self.save()

    def save(self) -> None:
        """Writes the rows whose turn has come, and a note of the others."""
        self._saved, self._since = time.monotonic(), 0
        number, done, source = self.journal.done, self.journal.done, self.journal.source
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        while number in self.ready or number in self.survey.bad:
            if number in self.ready:
                result = self._results[number]
                rows += result["rows"]
                counts += Counter(result["counts"])
                done, source = number + 1, result["digest"]
            number += 1
        ahead = {number: result for number, result in self._results.items() if number >= done}
        if done == self.journal.done and ahead == self.journal.ahead:
            return
        self.journal.checkpoint(rows, done=done, source=source, counts=counts, ahead=dict(ahead))
        self._results = ahead
        self.shares = {number: share for number, share in self.shares.items() if number >= done}


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
    about equal length, so their prompts finish in another order.
    """
    tally = tally or Tally()
    target = Target(model)
    limit = least(limit, target.context_length)
    ends = end_tokens(resolve(target.model, None, dict(ONE_TEXT)))
    while part := list(islice(prompts, chunk)):
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
        members: dict[int, list[int]] = {}  # of each prompt: its rows
        for index, (prompt, _) in enumerate(own):
            members.setdefault(prompt.number, []).append(index)
        made: dict[int, dict[str, Any]] = {}
        tokens: Counter[int] = Counter()
        for index, row in continued(target, [row for _, row in own], depth=depth, ends=ends, batch_size=batch_size):
            prompt, _ = own[index]
            assert row.continuations is not None
            written = sum(token >= 0 for one in row.continuations for token in one)
            tally.tokens += written
            tokens[prompt.number] += written
            made[index] = {
                **named(prompt),
                "input_ids": row.input_ids,
                "loss_mask": [int(trained) for trained in row.trained],
                "continuations": row.continuations,
            }
            if all(member in made for member in members[prompt.number]):
                rows = [made[member] for member in members[prompt.number]]
                yield Done(prompt, rows, Counter(rows=len(rows), tokens=tokens[prompt.number]))


def continued(
    target: Target, rows: list[Row], *, depth: int, ends: frozenset[int], batch_size: int
) -> Iterator[tuple[int, Row]]:
    """The same rows, each with its index, with what the target writes after each of their tokens.

    They run in batches of about equal length, shortest first, and come in that order.
    """
    for batch in _of_like_length(rows, batch_size, target.vocab_size):
        ids = collate([rows[index] for index in batch])["input_ids"].to(target.device)
        more = continuations(target, ids, depth=depth, ends=ends).tolist()
        for index, own in zip(batch, more, strict=True):
            yield index, replace(rows[index], continuations=own[: len(rows[index].input_ids)])


def _of_like_length(rows: list[Row], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Places of rows, shortest first, in batches whose logits fit into LOGITS."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    while order:
        longest = len(rows[order[:batch_size][-1]].input_ids)
        size = min(batch_size, max(1, LOGITS // (min(longest, CHUNK) * vocabulary)))
        yield order[:size]
        order = order[size:]
