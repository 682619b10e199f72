"""A comparison or a sweep from the model to the results: the plan, the units, the figures.

Does not know the command line nor how a report looks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from redrafter.bench import results as figures
from redrafter.bench.contenders import ALONE, THEIRS, Contender, Variant, in_words
from redrafter.bench.tables import NO_NOISE, Results
from redrafter.bench.tasks import ALL, Tasks
from redrafter.bench.units import Asked, Runner, Unit, of_bench, run, turned
from redrafter.config import DecodingShape
from redrafter.errors import RedrafterError
from redrafter.proposers.beams import weighed
from redrafter.target import Target
from redrafter.training.journal import Journal

MEASUREMENTS = "measurements.jsonl"

Tell = Callable[[Unit, int, int], None]
"""Hears of each unit, its number and how many there are, before it is measured."""


@dataclass(frozen=True)
class Setting:
    """What comparison and sweep have in common: the target, what it is asked, and what the command said."""

    model: PreTrainedModel
    tasks: Tasks
    asked: Asked
    told: dict[str, Any]
    """The command's arguments, for the journal and the report."""
    folder: Path
    overwrite: bool = False

    def run(self, units: Sequence[Unit], contenders: Sequence[Contender], tell: Tell) -> tuple[list[Any], Results]:
        """Measures what is missing; the records, and what is in every kind of results.

        Raises RedrafterError where the folder holds measurements of other arguments or another machine.
        """
        about = figures.about(self.model)
        measured_on = {name: about[name] for name in ("device", "dtype", "versions")}
        weights = {one.path: stamp(one.path) for one in contenders if one.path}
        depends = self.told | measured_on | {"weights": weights, "prompts read": self.tasks.digest}
        journal = Journal(self.folder / MEASUREMENTS, depends, overwrite=self.overwrite)
        runner = Runner(self.model, {one.label: one for one in contenders}, self.tasks, self.asked)
        numbers = itertools.count()
        records, failed = run(units, runner, journal, lambda unit: tell(unit, next(numbers), len(units)))
        if not records:
            raise RedrafterError(f"Nothing could be measured: {failed[0]}")
        kinds = {name: {"prompts": len(own), "of": self.tasks.of[name]} for name, own in self.tasks.prompts.items()}
        data = {"files": self.told["data"], "categories": kinds, "too_long": self.tasks.too_long}
        return records, {"about": about, "asked": self.told, "data": data, "failed": failed}


def compare(
    setting: Setting,
    methods: Sequence[Contender],
    *,
    transformers: bool,
    temperatures: Sequence[float],
    batch: int,
    batches: Sequence[int],
    rounds: int,
    tell: Tell,
) -> Results:
    """Every method beside decoding without one: by category and temperature, and by rows together for `batches`."""
    contenders = [Contender(ALONE), *([Contender(THEIRS)] if transformers else []), *methods]
    units = of_bench(
        [one.label for one in contenders],
        list(setting.tasks.prompts),
        temperatures,
        batch=batch,
        batches=batches,
        rounds=rounds,
    )
    records, found = setting.run(units, contenders, tell)
    return found | {
        "methods": figures.methods(contenders, setting.model, batch),
        "speed": figures.speeds(records),
        "batches": figures.speeds(records, "together"),
        "parts": figures.parts(records),
    }


@dataclass(frozen=True)
class Axes:
    """What a sweep goes through; the base's own shape where an axis does not say otherwise."""

    widths: Sequence[int]
    lengths: Sequence[int]
    budgets: Sequence[int]
    batches: Sequence[int]
    temperatures: Sequence[float]


def sweep(setting: Setting, base: Contender, axes: Axes, *, temperature: float, rounds: int, tell: Tell) -> Results:
    """One method in many shapes, and its own shape at many temperatures and batches.

    Widths, lengths and budgets are measured one row at a time at one `temperature`.  Shapes that the method refuses are
    named among what failed.
    """
    grid, refused = _shapes(setting.model, base, axes)
    assert base.method is not None
    blind = Contender(f"{base.label}, {NO_NOISE}", base.path, Variant(base.method, coupled=False))
    contenders = [Contender(ALONE), base, blind, *(one for one, _ in grid)]
    names = [one.label for one, _ in grid]
    units: list[Unit] = []
    for number in range(rounds):
        order = turned([ALONE, base.label, *names], number)
        units += [Unit("decode", name, ALL, temperature, 1, number) for name in order]
        for one in axes.temperatures:
            order = turned([ALONE, base.label, *([blind.label] if one else [])], number)
            units += [Unit("decode", name, ALL, one, 1, number) for name in order]
        for rows in axes.batches:
            order = turned([ALONE, base.label], number)
            units += [Unit("together", name, ALL, temperature, rows, number) for name in order]
    units += [Unit("parts", name, ALL, temperature, 1, 0) for name in (ALONE, base.label)]
    units += [Unit("texts", name, ALL, temperature, 1, 0) for name in (base.label, *names)]
    units = list(dict.fromkeys(units))
    records, found = setting.run(units, contenders, tell)
    speed = {(one["method"], one["temperature"]): one for one in figures.speeds(records)}
    shaped = [(one, shape) for one, shape in grid if (one.label, temperature) in speed]
    entries = [speed[one.label, temperature] | {"shape": shape} for one, shape in shaped]
    by_temperature = [
        speed[one.label, kind] | {"coupled": one is base}
        for kind in axes.temperatures
        for one in (base, blind)
        if (one.label, kind) in speed
    ]
    own = [speed[base.label, temperature]] if (base.label, temperature) in speed else []
    found["failed"] += refused
    return found | {
        "methods": figures.methods([Contender(ALONE), base], setting.model, 1),
        "speed": [],
        "batches": figures.speeds(records, "together"),
        "parts": figures.parts(records),
        "sweep": {
            "grid": [one for one in entries if one["shape"]["budget"] is None],
            "budgets": [one for one in entries if one["shape"]["budget"] is not None],
            "temperatures": by_temperature,
            "all": own + entries,
        },
    }


def _shapes(
    model: PreTrainedModel, base: Contender, axes: Axes
) -> tuple[list[tuple[Contender, dict[str, int | None]]], list[str]]:
    """The base's method as whole beams of every width and length, and in its own with every budget that cuts them.

    Also sentences about what it refuses.
    """
    assert base.method is not None
    target = Target(model, base.method.layers)
    method = base.method.method if isinstance(base.method, Variant) else base.method
    width, length, _ = base.method.drafting(0)
    wanted: list[tuple[int, int, int | None]] = [(w, n, None) for w, n in itertools.product(axes.widths, axes.lengths)]
    wanted += [(width, length, budget) for budget in axes.budgets if length < budget < weighed(width, length)]
    found: list[tuple[Contender, dict[str, int | None]]] = []
    refused: dict[str, list[str]] = {}
    for shape in wanted:
        told = dict(zip(("width", "length", "budget"), shape, strict=True))
        words = in_words(DecodingShape(beam_width=shape[0], beam_length=shape[1], node_budget=shape[2]))
        one = Contender(f"{base.label}, {words}", base.path, Variant(method, shape))
        try:
            one.proposer(target, 1)
        except RedrafterError as error:
            refused.setdefault(str(error), []).append(words)
        else:
            found.append((one, told))
    if not found and not axes.temperatures and not axes.batches:
        raise RedrafterError(f"{base.label} can draft in none of these shapes: {next(iter(refused), 'none is told')}")
    return found, [f"{', '.join(shapes)}: {error}" for error, shapes in refused.items()]


def stamp(path: str) -> str | None:
    """Of a folder's files as they are now, so that other weights at the same place are noticed; None for a hub's id."""
    if not Path(path).is_dir():
        return None
    files = sorted(one for one in Path(path).iterdir() if one.is_file())
    told = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
