"""Runs a comparison or a sweep: from the loaded model to the results.

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
from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS, BenchMethod, greedy_duplicates
from redrafter.bench.results import Results
from redrafter.bench.runner import Runner, RunOptions, call_prompts, context_length
from redrafter.bench.tasks import Tasks
from redrafter.bench.units import FLAT, UNCOUPLED, Axes, Comparison, Record, Unit, comparison_units, run, sweep_units
from redrafter.bench.variants import MethodVariant
from redrafter.core.shapes import DraftShape, counted
from redrafter.errors import RedrafterError
from redrafter.proposers.base import draftable
from redrafter.targets.target import Target
from redrafter.utils.journal import Journal
from redrafter.utils.outputs import MEASUREMENTS

OnUnit = Callable[[Unit, int, int], None]
"""Callback that receives each unit, its number and the number of all units before it is measured."""


@dataclass(frozen=True)
class BenchSetup:
    """The target, the prompts and the options that a comparison and a sweep share."""

    model: PreTrainedModel
    tasks: Tasks
    options: RunOptions
    arguments: dict[str, Any]
    """The command's arguments, for the journal and the report."""
    folder: Path
    overwrite: bool = False
    minutes: float | None = None
    """Time after which no further unit is started."""

    def run(self, units: Sequence[Unit], methods: Sequence[BenchMethod], on_unit: OnUnit) -> tuple[list[Any], Results]:
        """Measures the missing units: the records, and the part of the results that both commands share.

        Raises RedrafterError if the folder holds measurements with other arguments or of another machine.
        """
        about = figures.about(self.model)
        measured_on = {name: about[name] for name in ("device", "dtype", "versions")}
        weights = {method.path: folder_digest(method.path) for method in methods if method.path}
        depends = self.arguments | measured_on | {"weights": weights, "prompts read": self.tasks.digest}
        journal = Journal(self.folder / MEASUREMENTS, depends, overwrite=self.overwrite)
        runner = Runner(self.model, {method.label: method for method in methods}, self.tasks, self.options)
        numbers = itertools.count()
        seconds = None if self.minutes is None else 60 * self.minutes
        records, failed = run(units, runner, journal, lambda unit: on_unit(unit, next(numbers), len(units)), seconds)
        if not records:
            raise RedrafterError(f"Nothing could be measured: {failed[0]}")
        categories = {n: {"prompts": len(own), "of": self.tasks.of[n]} for n, own in self.tasks.prompts.items()}
        data = {"files": self.arguments["data"], "categories": categories, "too_long": self.tasks.too_long}
        return records, {"about": about, "asked": self.arguments, "data": data, "failed": failed}


def compare(setup: BenchSetup, drafting: Sequence[BenchMethod], on_unit: OnUnit, options: Comparison) -> Results:
    """Measures each method: complete calls, decoding by category and temperature, and fixed batches.

    Answer lengths that exceed the model's context are reported as not measured.  In greedy decoding, a method that
    differs from another one only in coupling is not measured again.
    """
    duplicates = greedy_duplicates(drafting, [options.batch, *options.batches])
    transformers = [BenchMethod(TRANSFORMERS)] if options.transformers else []
    methods = [BenchMethod(AUTOREGRESSIVE), *transformers, *drafting]
    too_long = [length for length in options.answers if not call_prompts(setup.tasks, length, setup.model)]
    labels, categories = [method.label for method in methods], list(setup.tasks.prompts)
    units = comparison_units(labels, categories, options, only_sampling=duplicates)
    records, results = setup.run([unit for unit in units if unit.new_tokens not in too_long], methods, on_unit)
    results["failed"] += [
        f"Answers of {counted(length, 'token')}: they exceed the model's context of {context_length(setup.model)} "
        "tokens."
        for length in too_long
    ]
    return results | {
        "methods": figures.methods(methods, setup.model, options.batch, duplicates),
        "calls": figures.calls(records),
        "speed": figures.speeds(records),
        "batches": figures.speeds(records, "together"),
        "parts": figures.parts(records),
    }


def sweep(setup: BenchSetup, methods: Sequence[BenchMethod], on_unit: OnUnit, axes: Axes) -> Results:
    """Measures the first method in many shapes, at many temperatures and batch sizes, and with flat beams.

    The other methods are measured in their own shapes.  Shapes that the first method does not support are reported as
    not measured.
    """
    base = methods[0]
    shaped, refused = _shaped_methods(setup.model, base, axes)
    assert base.method is not None
    uncoupled = BenchMethod(f"{base.label}, {UNCOUPLED}", base.path, MethodVariant(base.method, coupled=False))
    measured = [BenchMethod(AUTOREGRESSIVE), *methods, uncoupled, *(one.method for one in shaped)]
    labels, batched = [one.label for one in shaped], [one.label for one in shaped if one.batched]
    units = sweep_units([method.label for method in methods], uncoupled.label, labels, batched, axes)
    records, results = setup.run(units, measured, on_unit)
    results["failed"] += refused

    pairs = {one.prefix_tree: one.label for one in shaped if one.prefix_tree is not None}
    speed = {(one["method"], one["temperature"]): one for one in figures.speeds(records, flat=pairs)}
    batches = figures.speeds(records, "together", pairs)
    own = [speed[key] for method in methods if (key := (method.label, axes.temperature)) in speed]
    entries = [one.entry(speed[key]) for one in shaped if (key := (one.label, axes.temperature)) in speed]
    by_temperature = [
        speed[method.label, temperature] | {"coupled": method is base}
        for temperature in axes.temperatures
        for method in (base, uncoupled)
        if (method.label, temperature) in speed
    ]
    return results | {
        "methods": figures.methods([BenchMethod(AUTOREGRESSIVE), *methods], setup.model, 1),
        "speed": [],
        "batches": [one for one in batches if one["method"] in (AUTOREGRESSIVE, base.label)],
        "parts": figures.parts(records),
        "sweep": {
            "heads": own,
            "grid": [one for one in entries if one["axis"] == "grid"],
            "budgets": [one for one in entries if one["axis"] == "budgets"],
            "temperatures": by_temperature,
            "folding": {
                "widths": [one for one in entries if one["method"] in {*pairs, *pairs.values()}],
                "batches": [one.entry(batch) for one in shaped for batch in batches if batch["method"] == one.label],
            },
            "all": own + entries,
        },
    }


@dataclass(frozen=True)
class _ShapedMethod:
    """The swept method in one shape, with a prefix tree or with flat beams."""

    method: BenchMethod
    shape: DraftShape
    axis: str
    """`grid`, `budgets` or `folding`."""
    batched: bool = False
    """Whether it is also measured at the batch sizes."""
    prefix_tree: str | None = None
    """Of flat beams: the label of the method with the same beams in a prefix tree."""

    @property
    def label(self) -> str:
        return self.method.label

    def entry(self, figures: Record) -> Record:
        """The figures with the shape.  Flat beams verify all nodes, including those that cannot be accepted."""
        shape = self.shape
        sides = {"width": shape.beam_width, "length": shape.beam_length, "budget": shape.node_budget}
        entry = figures | {"axis": self.axis, "shape": sides, "folded": self.prefix_tree is None}
        nodes = {"nodes_per_draft": float(shape.beam_width * shape.beam_length)}
        return entry if self.prefix_tree is None else entry | nodes


def _shaped_methods(model: PreTrainedModel, base: BenchMethod, axes: Axes) -> tuple[list[_ShapedMethod], list[str]]:
    """The swept method in all shapes: every width and length, its own shape with every budget that limits it, and its
    own length at every width with flat beams.  Also sentences about the shapes that it does not support.
    """
    assert base.method is not None
    assert base.base is not None
    target, method = Target(model, base.method.layers), base.base
    default = base.method.shape(0)
    width, length = default.beam_width, default.beam_length

    def shape(width: int, length: int, budget: int | None = None) -> DraftShape:
        return DraftShape(beam_width=width, beam_length=length, node_budget=budget)

    budgets = [budget for budget in axes.budgets if length < budget < default.num_candidates]
    requested = [shape(*sides) for sides in itertools.product(axes.widths, axes.lengths)]
    supported, refused = draftable(method, target, requested + [shape(width, length, budget) for budget in budgets])
    own = [shape(width, length)] if axes.batches else []
    beams = [one for one in dict.fromkeys([*own, *(shape(one, length) for one in axes.widths)]) if one.beam_width > 1]
    flat, not_flat = draftable(MethodVariant(method, flat=True), target, draftable(method, target, beams)[0])
    found = []
    for one in dict.fromkeys([*supported, *flat]):
        label = f"{base.label}, {one.description}"
        axis = "folding" if one not in supported else "budgets" if one.node_budget else "grid"
        batched = one in flat and one in own
        found.append(_ShapedMethod(BenchMethod(label, base.path, MethodVariant(method, one)), one, axis, batched))
        if one in flat:
            variant = BenchMethod(f"{label}, {FLAT}", base.path, MethodVariant(method, one, flat=True))
            found.append(_ShapedMethod(variant, one, "folding", batched, prefix_tree=label))
    if not found and not axes.temperatures and not axes.batches:
        raise RedrafterError(f"{base.label} supports none of these shapes: {next(iter(refused), 'none was given')}")
    return found, refused + [f"{FLAT}, {sentence}" for sentence in not_flat]


def folder_digest(path: str) -> str | None:
    """Hash of the names, sizes and times of a folder's files, to detect changed weights; None for a hub id."""
    if not Path(path).is_dir():
        return None
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
