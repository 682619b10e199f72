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
from redrafter.bench.contenders import ALONE, THEIRS, Contender, greedy_twins
from redrafter.bench.tables import Results
from redrafter.bench.tasks import ALL, Tasks
from redrafter.bench.units import Asked, Record, Runner, Unit, context_of, of_bench, requests, run, turned
from redrafter.bench.variants import NO_NOISE, UNFOLDED, Variant
from redrafter.core.shapes import DraftShape, counted
from redrafter.errors import RedrafterError
from redrafter.proposers.base import draftable
from redrafter.targets.target import Target
from redrafter.training.journal import Journal
from redrafter.utils.outputs import MEASUREMENTS

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
    minutes: float | None = None
    """After which nothing more is begun."""

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
        seconds = None if self.minutes is None else 60 * self.minutes
        records, failed = run(units, runner, journal, lambda unit: tell(unit, next(numbers), len(units)), seconds)
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
    answers: Sequence[int],
    tell: Tell,
) -> Results:
    """Every method beside decoding without one: complete calls that write as many tokens as each of the `answers`,
    decoding alone by category and temperature, and by rows together for `batches`.

    An answer for which the model's context has no room is named among what is not measured. Greedily, one that differs
    from another in coupling alone is that one, and is not measured again.
    """
    twins = greedy_twins(methods, [batch, *batches])
    contenders = [Contender(ALONE), *([Contender(THEIRS)] if transformers else []), *methods]
    room = {length: bool(requests(setting.tasks, length, setting.model)) for length in answers}
    units = of_bench(
        [one.label for one in contenders],
        list(setting.tasks.prompts),
        temperatures,
        batch=batch,
        batches=batches,
        rounds=rounds,
        answers=[length for length in answers if room[length]],
        only_sampling=twins,
    )
    records, found = setting.run(units, contenders, tell)
    found["failed"] += [
        f"Answers of {counted(length, 'token')}: the model's context of {context_of(setting.model)} tokens has no room."
        for length in answers
        if not room[length]
    ]
    return found | {
        "methods": figures.methods(contenders, setting.model, batch, twins),
        "calls": figures.calls(records),
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


def sweep(
    setting: Setting, methods: Sequence[Contender], axes: Axes, *, temperature: float, rounds: int, tell: Tell
) -> Results:
    """The first method in many shapes, its own shape at many temperatures and batches, its beams folded and not; the
    others beside it, each in its own shape.

    Widths, lengths and budgets are measured one row at a time at one `temperature`.  Shapes that the method refuses are
    named among what failed.
    """
    base = methods[0]
    shaped, refused = _shapes(setting.model, base, axes)
    assert base.method is not None
    blind = Contender(f"{base.label}, {NO_NOISE}", base.path, Variant(base.method, coupled=False))
    contenders = [Contender(ALONE), *methods, blind, *(one.contender for one in shaped)]
    plan = _plan([one.label for one in methods], blind.label, shaped, axes, temperature=temperature, rounds=rounds)
    records, found = setting.run(plan, contenders, tell)
    found["failed"] += refused

    unfolded = {one.folded.contender.label: one.contender.label for one in shaped if one.folded is not None}
    speed = {(one["method"], one["temperature"]): one for one in figures.speeds(records, unfolded=unfolded)}
    together = figures.speeds(records, "together", unfolded)
    own = [speed[one.label, temperature] for one in methods if (one.label, temperature) in speed]
    entries = [one.told(speed[key]) for one in shaped if (key := (one.contender.label, temperature)) in speed]
    by_temperature = [
        speed[one.label, kind] | {"coupled": one is base}
        for kind in axes.temperatures
        for one in (base, blind)
        if (one.label, kind) in speed
    ]
    return found | {
        "methods": figures.methods([Contender(ALONE), *methods], setting.model, 1),
        "speed": [],
        "batches": [one for one in together if one["method"] in (ALONE, base.label)],
        "parts": figures.parts(records),
        "sweep": {
            "heads": own,
            "grid": [one for one in entries if one["axis"] == "grid"],
            "budgets": [one for one in entries if one["axis"] == "budgets"],
            "temperatures": by_temperature,
            "folding": {
                "widths": [one for one in entries if one["method"] in {*unfolded, *unfolded.values()}],
                "batches": [one.told(entry) for one in shaped for entry in together if one.is_of(entry)],
            },
            "all": own + entries,
        },
    }


@dataclass(frozen=True)
class _Shaped:
    """The base's method in a shape, folded as in decoding or not."""

    contender: Contender
    shape: DraftShape
    axis: str
    """`grid`, `budgets` or `folding`."""
    together: bool = False
    """Whether it is also measured by rows together."""
    folded: _Shaped | None = None
    """Where this one is not folded, what differs in that alone."""

    def is_of(self, entry: Record) -> bool:
        """Whether the entry is of this."""
        return bool(entry["method"] == self.contender.label)

    def told(self, entry: Record) -> Record:
        """The entry with its shape.  Of what is not folded all nodes are verified, those too that are not accepted."""
        width, length, budget = self.shape.beam_width, self.shape.beam_length, self.shape.node_budget
        found = entry | {"axis": self.axis, "shape": {"width": width, "length": length, "budget": budget}}
        found["folded"] = self.folded is None
        return found if self.folded is None else found | {"nodes_per_draft": float(width * length)}


def _plan(
    methods: Sequence[str], blind: str, shaped: Sequence[_Shaped], axes: Axes, *, temperature: float, rounds: int
) -> list[Unit]:
    """The units of a sweep, in order; what is held against each other is measured in turn."""
    base, names = methods[0], [*methods, *(one.contender.label for one in shaped)]
    pair = [one.contender.label for one in shaped if one.together]
    units: list[Unit] = []
    for number in range(rounds):
        units += [Unit("decode", name, ALL, temperature, 1, number) for name in turned([ALONE, *names], number)]
        for one in axes.temperatures:
            order = turned([ALONE, base, *([blind] if one else [])], number)
            units += [Unit("decode", name, ALL, one, 1, number) for name in order]
        for rows in axes.batches:
            order = turned([ALONE, base, *pair], number)
            units += [Unit("together", name, ALL, temperature, rows, number) for name in order]
    units += [Unit("parts", name, ALL, temperature, 1, 0) for name in (ALONE, *methods)]
    units += [Unit("texts", name, ALL, temperature, 1, 0) for name in names]
    return list(dict.fromkeys(units))


def _shapes(model: PreTrainedModel, base: Contender, axes: Axes) -> tuple[list[_Shaped], list[str]]:
    """The base's method as whole beams of every width and length, in its own with every budget that cuts them, and its
    own whole beams, at every width, folded and not.

    Also sentences about what it refuses.
    """
    assert base.method is not None
    target = Target(model, base.method.layers)
    method = base.method.method if isinstance(base.method, Variant) else base.method
    made = base.method.shape(0)
    width, length = made.beam_width, made.beam_length

    def shape(width: int, length: int, budget: int | None = None) -> DraftShape:
        return DraftShape(beam_width=width, beam_length=length, node_budget=budget)

    wanted = [shape(*sides) for sides in itertools.product(axes.widths, axes.lengths)]
    wanted += [shape(width, length, budget) for budget in axes.budgets if length < budget < made.num_candidates]
    drafted, refused = draftable(method, target, wanted)
    own = [shape(width, length)] if axes.batches else []
    beams = [one for one in dict.fromkeys([*own, *(shape(one, length) for one in axes.widths)]) if one.beam_width > 1]
    chains, also = draftable(Variant(method, folded=False), target, draftable(method, target, beams)[0])
    found = []
    for one in dict.fromkeys([*drafted, *chains]):
        label = f"{base.label}, {one.description}"
        axis = "folding" if one not in drafted else "budgets" if one.node_budget else "grid"
        entry = _Shaped(Contender(label, base.path, Variant(method, one)), one, axis, one in chains and one in own)
        found.append(entry)
        if one in chains:
            plain = Contender(f"{label}, {UNFOLDED}", base.path, Variant(method, one, folded=False))
            found.append(_Shaped(plain, one, "folding", entry.together, folded=entry))
    if not found and not axes.temperatures and not axes.batches:
        raise RedrafterError(f"{base.label} can draft in none of these shapes: {next(iter(refused), 'none is told')}")
    return found, refused + [f"{UNFOLDED}, {sentence}" for sentence in also]


def stamp(path: str) -> str | None:
    """Of a folder's files as they are now, so that other weights at the same place are noticed; None for a hub's id."""
    if not Path(path).is_dir():
        return None
    files = sorted(one for one in Path(path).iterdir() if one.is_file())
    told = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
