"""The loop of `distill`: works on rows of data files and saves the results so that an interrupted run can resume.

Guarantees that all rows are read and checked before any work starts, that results are written in the order of the
sources and saved as they complete, and that the result of a row depends on its number only, not on batches, drafters or
interruptions.  Does not know how results are produced.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from redrafter.data.files import Skip, read_records
from redrafter.engine.results import Event
from redrafter.errors import RedrafterError
from redrafter.utils.interrupt import deferred
from redrafter.utils.journal import Journal

SAVE_SECONDS = 30.0
"""Default number of seconds between checkpoints."""


@dataclass(frozen=True)
class Prompt:
    """A row of the sources, numbered from 0; `digest` is a hash of all rows up to and including this one.

    `partial` is the data of the `PartialPrompt` that an interrupted run saved, or None.
    """

    number: int
    where: str
    record: dict[str, Any]
    digest: str
    partial: Any = None


@dataclass(frozen=True)
class CompletedPrompt:
    """All rows of one prompt, and its counts: `rows`, `answers`, `tokens`, `steps`, and answers `cut` at the limit."""

    prompt: Prompt
    rows: list[dict[str, Any]]
    counts: Counter[str]


@dataclass(frozen=True)
class PartialPrompt:
    """A prompt with some of its answers: JSON `data` from which the work can continue.  Replaces earlier ones.

    `share` is the finished fraction of the prompt, from 0 to 1.
    """

    prompt: Prompt
    data: Any
    share: float


@dataclass
class DistillProgress:
    """Tokens and decoding steps since the start; `tick` is called whenever they grow."""

    tokens: int = 0
    steps: int = 0
    tick: Callable[[], object] = lambda: None

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """Counts the events and passes them on."""
        for event in events:
            self.tokens += len(event.tokens)
            self.steps += 1
            self.tick()
            yield event


Work = Callable[[Iterator[Prompt]], Iterator[CompletedPrompt | PartialPrompt]]
"""Produces the results of prompts, in any order."""


def smallest(*limits: int | None) -> int | None:
    """The smallest of the limits that are not None; None if there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def row_labels(prompt: Prompt, temperature: float | None = None) -> dict[str, Any]:
    """Fields that identify the source row of a result: its number from 1, its `id`, and the temperature."""
    labels: dict[str, Any] = {"row": prompt.number + 1}
    if "id" in prompt.record:
        labels["id"] = prompt.record["id"]
    return labels if temperature is None else {**labels, "temperature": float(temperature)}


def read(sources: Iterable[str | Path], *, limit: int | None = None, skip: Skip | None = None) -> Iterator[Prompt]:
    """The first `limit` rows of the sources."""
    digest = hashlib.sha256()
    for number, (where, record) in enumerate(islice(read_records(sources, skip), limit)):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        yield Prompt(number, where, record, digest.hexdigest())


@dataclass(frozen=True)
class Survey:
    """Result of the first pass over all rows: their number, the invalid ones, and a hash of all."""

    total: int
    bad: frozenset[int]
    digest: str


def survey(
    sources: Iterable[str | Path],
    check: Callable[[Prompt], object],
    journal: Journal,
    *,
    limit: int | None = None,
    skip: Skip | None = None,
) -> Survey:
    """Reads all rows and checks those that the journal lacks.

    If `check` raises RedrafterError for a row, `skip` receives the message; without `skip` the error is raised.  Raises
    RedrafterError if there is no valid row, or if the journal was made from other rows.
    """
    total, bad, digest, finished = 0, set(), "", ""
    for prompt in read(sources, limit=limit, skip=skip):
        total, digest = total + 1, prompt.digest
        finished = digest if total == journal.done else finished
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
    if finished != journal.source:
        raise RedrafterError(
            f"{journal.path} holds the results of {journal.done:,} other rows: pass the same rows (more may follow "
            "them), name another file, or pass --overwrite."
        )
    return Survey(total, frozenset(bad), digest)


def distil(
    sources: Iterable[str | Path],
    survey: Survey,
    journal: Journal,
    work: Work,
    *,
    limit: int | None = None,
    save_seconds: float = SAVE_SECONDS,
    save_rows: int | None = None,
    progress: DistillProgress | None = None,
) -> Iterator[float]:
    """Works on the rows that the journal lacks; yields the number of finished rows each time it changes.

    Results are written in the order of the sources.  Results that wait for an earlier one, and partial ones, are saved
    in the journal's note.  Both happen every `save_seconds`, after every `save_rows` completed prompts, and when an
    exception (such as an interrupt) ends the work.

    Raises the RedrafterError of `work`, with the number of rows that are saved.
    """
    results = _Results(journal, survey, save_seconds, save_rows)
    if progress is not None:
        progress.tick = results.save_if_due
    journal.open()
    shown = 0.0
    try:
        try:
            for one in work(results.missing(read(sources, limit=limit, skip=lambda message: None))):
                results.add(one)
                results.save_if_due()
                shown = results.finished
                yield shown
        finally:  # also after an interrupt
            with deferred():
                results.save()
        with deferred():
            journal.checkpoint([], done=survey.total, source=survey.digest, counts=Counter())
        if shown < survey.total:  # the last rows are invalid, or an earlier run completed them
            yield float(survey.total)
    except RedrafterError as error:
        raise RedrafterError(
            f"{error} The results of {saved(journal):,} of {survey.total:,} rows are saved; run the same command again "
            "to continue."
        ) from error
    finally:
        journal.close()


def saved(journal: Journal) -> int:
    """Number of prompts whose rows are all on disk."""
    return journal.done + sum("rows" in result for result in journal.ahead.values())


class _Results:
    """Results that are not written yet, by prompt number: rows with counts, or the data of a partial prompt."""

    def __init__(self, journal: Journal, survey: Survey, save_seconds: float, save_rows: int | None):
        self._journal, self._survey = journal, survey
        self._save_seconds, self._save_rows = save_seconds, save_rows
        self._complete: set[int] = set()
        self._shares: dict[int, float] = {}  # finished fraction of each prompt
        self._results: dict[int, dict[str, Any]] = dict(journal.ahead)
        self._saved_at, self._since_save = time.monotonic(), 0

    @property
    def finished(self) -> float:
        """Number of finished prompts, partial ones as fractions.  Excludes saved results not read again yet."""
        return self._journal.done + sum(self._shares.values(), 0.0)

    def missing(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The prompts to work on, with the partial data of an earlier run.  Drops results of changed rows."""
        for prompt in prompts:
            if prompt.number < self._journal.done or prompt.number in self._survey.bad:
                continue
            result = self._results.get(prompt.number, {})
            if result and result["digest"] != prompt.digest:
                del self._results[prompt.number]
                result = {}
            if "rows" in result:
                self._complete.add(prompt.number)
                self._shares[prompt.number] = 1.0
            else:
                yield replace(prompt, partial=result.get("part"))

    def add(self, one: CompletedPrompt | PartialPrompt) -> None:
        """Keeps a result in memory."""
        number, result = one.prompt.number, dict[str, Any](digest=one.prompt.digest)
        if isinstance(one, PartialPrompt):
            self._results[number] = result | {"part": one.data}
            self._shares[number] = one.share
        else:
            self._results[number] = result | {"rows": one.rows, "counts": one.counts}
            self._complete.add(number)
            self._shares[number] = 1.0
            self._since_save += 1

    def save_if_due(self) -> None:
        """Saves if enough time has passed or enough prompts are complete."""
        enough = self._save_rows is not None and self._since_save >= self._save_rows
        if enough or time.monotonic() - self._saved_at >= self._save_seconds:
            with deferred():  # an interrupt waits until everything is on disk
                self.save()

    def save(self) -> None:
        """Appends the rows that no earlier prompt holds back, and saves the other results in the note."""
        self._saved_at, self._since_save = time.monotonic(), 0
        number, done, source = self._journal.done, self._journal.done, self._journal.source
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        while number in self._complete or number in self._survey.bad:
            if number in self._complete:
                result = self._results[number]
                rows += result["rows"]
                counts += Counter(result["counts"])
                done, source = number + 1, result["digest"]
            number += 1
        ahead = {number: result for number, result in self._results.items() if number >= done}
        if done == self._journal.done and ahead == self._journal.ahead:
            return
        self._journal.checkpoint(rows, done=done, source=source, counts=counts, ahead=dict(ahead))
        self._results = ahead
        self._shares = {number: share for number, share in self._shares.items() if number >= done}
