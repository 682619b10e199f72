"""The units of a benchmark, the order in which they are measured, and the file that keeps their records.

Guarantees that compared methods are measured right after each other, in an order that rotates from round to round, and
that an interrupted run resumes with the first missing unit.  Does not know how a unit is measured.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.tasks import ALL
from redrafter.errors import RedrafterError
from redrafter.utils.journal import Journal

Kind = Literal["calls", "decode", "together", "parts", "texts"]
Record = dict[str, Any]

UNCOUPLED = "uncoupled"
FLAT = "flat beams"
_OLD_SUFFIXES = {", without the draws' noise": f", {UNCOUPLED}", ", unfolded": f", {FLAT}"}
"""Suffixes of labels in records of earlier versions."""


class Unit(NamedTuple):
    """One thing to measure; `calls`, `decode` and `together` are measured in each round, the others once.

    `calls`: complete calls of `generate` with one prompt each.  `decode`: the prompts of a category; a new row starts
    when one finishes.  `together`: a fixed batch of rows that do not finish.  `parts`: the parts of a step.  `texts`:
    the generated texts, compared with those without a drafter.
    """

    kind: Kind
    method: str
    category: str
    temperature: float
    batch: int
    round: int
    new_tokens: int = 0
    """New tokens of each of the `calls`; 0 for the other kinds, for which the command sets the number."""


@dataclass(frozen=True)
class Comparison:
    """Options of a comparison: what is measured for each method."""

    temperatures: Sequence[float]
    batch: int = 1
    batches: Sequence[int] = ()
    """Batch sizes of the `together` units."""
    rounds: int = 1
    answers: Sequence[int] = ()
    """Lengths of complete calls, in tokens."""
    transformers: bool = True
    """Whether transformers' generate is a method."""


@dataclass(frozen=True)
class Axes:
    """Options of a sweep.  An axis varies one property of the first method's default shape."""

    widths: Sequence[int]
    lengths: Sequence[int]
    budgets: Sequence[int]
    batches: Sequence[int]
    temperatures: Sequence[float]
    temperature: float = 0.0
    """Temperature of all axes but `temperatures`."""
    rounds: int = 1


def rotated(methods: Sequence[str], number: int) -> list[str]:
    """The order of the methods in round `number`; each comes first equally often."""
    first = number % len(methods)
    return [*methods[first:], *methods[:first]]


def comparison_units(
    methods: Sequence[str], categories: Sequence[str], options: Comparison, only_sampling: Collection[str] = ()
) -> list[Unit]:
    """The units of a comparison, in order; the first method decodes without a drafter.

    The longest answers come first, because transformers recompiles for a longer cache.  Methods in `only_sampling` are
    not measured in greedy decoding.
    """
    units: list[Unit] = []
    temperatures = options.temperatures
    for number in range(options.rounds):
        order = rotated(methods, number)
        for temperature, length in itertools.product(temperatures, sorted(options.answers, reverse=True)):
            units += [Unit("calls", name, ALL, temperature, 1, number, length) for name in order]
        for temperature, category in itertools.product(temperatures, categories):
            units += [Unit("decode", name, category, temperature, options.batch, number) for name in order]
        for temperature, rows in itertools.product(temperatures, options.batches):
            units += [Unit("together", name, ALL, temperature, rows, number) for name in order]
    for temperature in temperatures:
        ours = [name for name in methods if name != TRANSFORMERS]
        units += [Unit("parts", name, ALL, temperature, options.batch, 0) for name in ours]
        for category in categories:
            units += [Unit("texts", name, category, temperature, options.batch, 0) for name in ours[1:]]
    return [unit for unit in units if unit.temperature or unit.method not in only_sampling]


def sweep_units(
    methods: Sequence[str], uncoupled: str, shapes: Sequence[str], batched: Sequence[str], axes: Axes
) -> list[Unit]:
    """The units of a sweep, in order.

    The first of `methods` is swept; `uncoupled` is its uncoupled variant, `shapes` are its variants in other shapes, of
    which `batched` are also measured at the batch sizes.
    """
    swept, names = methods[0], [*methods, *shapes]
    units: list[Unit] = []
    for number in range(axes.rounds):
        order = rotated([AUTOREGRESSIVE, *names], number)
        units += [Unit("decode", name, ALL, axes.temperature, 1, number) for name in order]
        for temperature in axes.temperatures:
            order = rotated([AUTOREGRESSIVE, swept, *([uncoupled] if temperature else [])], number)
            units += [Unit("decode", name, ALL, temperature, 1, number) for name in order]
        for rows in axes.batches:
            order = rotated([AUTOREGRESSIVE, swept, *batched], number)
            units += [Unit("together", name, ALL, axes.temperature, rows, number) for name in order]
    units += [Unit("parts", name, ALL, axes.temperature, 1, 0) for name in (AUTOREGRESSIVE, *methods)]
    units += [Unit("texts", name, ALL, axes.temperature, 1, 0) for name in names]
    return list(dict.fromkeys(units))


class Measuring(Protocol):
    """Measures units."""

    def measure(self, unit: Unit) -> Record:
        """The figures of a unit.  Raises RedrafterError if it cannot be measured."""
        ...

    def remember(self, unit: Unit, record: Record) -> None:
        """Keeps the parts of a record that later units need."""
        ...


def run(
    units: Iterable[Unit],
    runner: Measuring,
    journal: Journal,
    report: Callable[[Unit], None],
    seconds: float | None = None,
) -> tuple[list[Record], list[str]]:
    """Measures all units that the journal lacks: the records of all, and error messages.

    A unit that fails is not tried again in other rounds.  `report` receives each unit before it is measured.  After
    `seconds`, no further unit is started.  Raises RedrafterError if the journal cannot be written.
    """
    begin, skipped = time.monotonic(), 0
    journal.open()
    with journal.path.open(encoding="utf-8") as lines:
        known = dict(map(_parse_record, lines))
    records: list[Record] = []
    failed: dict[Unit, str] = {}
    for unit in units:
        record = known.get(unit)
        report(unit)
        if record is None:
            first_round = unit._replace(round=0)
            if first_round in failed:
                continue
            if seconds is not None and time.monotonic() - begin >= seconds:
                skipped += 1
                continue
            try:
                record = unit._asdict() | runner.measure(unit)
            except RedrafterError as error:  # the other units are measured nevertheless
                failed[first_round] = f"{_description(unit)}: {error}"
                continue
            journal.checkpoint([record], done=journal.done + 1, source="", counts=Counter())
        runner.remember(unit, record)
        records.append(record)
    journal.close()
    rest = f"{skipped} measurements, because the time was over; run the same command again to measure them."
    return records, [*failed.values(), *([rest] if skipped else [])]


def _parse_record(line: str) -> tuple[Unit, Record]:
    record = json.loads(line)
    for old, new in _OLD_SUFFIXES.items():
        if record["method"].endswith(old):
            record["method"] = record["method"].removesuffix(old) + new
    return Unit(**{name: record[name] for name in Unit._fields}), record


def _description(unit: Unit) -> str:
    category = "" if unit.category == ALL else f" on {unit.category}"
    length = f" in calls of {unit.new_tokens} tokens" if unit.new_tokens else ""
    return f"{unit.method}{category}{length}, temperature {unit.temperature:g}, {unit.batch} rows"
