"""Figures of a report from measured records: medians over the rounds, and ratios within one round.

Guarantees that every figure was measured: it is left out if its record is missing.  Does not know how a report looks.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from redrafter import __version__
from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS, BenchMethod
from redrafter.bench.tasks import ALL
from redrafter.bench.units import Record
from redrafter.engine.generate import describe_backend
from redrafter.evaluation.profiling import device_name
from redrafter.targets.target import Target

Results = dict[str, Any]
"""The content of results.json."""

Rounds = Mapping[int, Record]
"""Records of one cell of a table, by round."""

BASELINES = {"speed_up": AUTOREGRESSIVE, "speed_up_over_transformers": TRANSFORMERS}
"""The method that each ratio is relative to."""

_SUMMED = ("tokens", "seconds", "steps", "drafts", "drafted", "accepted")


def about(model: PreTrainedModel) -> Record:
    """The model, machine and versions that the figures were measured with."""
    target = Target(model)
    versions = {"redrafter": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "model": target.name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": device_name(target.device),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if target.device.type == "cuda" else None,
        "versions": versions,
        "path": describe_backend(model),
    }


def methods(
    compared: Iterable[BenchMethod], model: PreTrainedModel, batch: int, duplicates: Mapping[str, str] | None = None
) -> list[Record]:
    """Descriptions of the methods; `duplicates` as returned by `greedy_duplicates`."""
    found = []
    for method in compared:
        entry: Record = {"method": method.label}
        if method.method is not None:
            target = Target(model, method.method.layers)
            weights, vocabulary = method.weights_description(target)
            entry |= {
                "path": Path(method.path).resolve().name if Path(method.path).exists() else method.path,
                "weights": weights,
                "draft_vocabulary": vocabulary,
                "shape": method.drafts_description(target, batch),
                "parameters": method.num_parameters(target),
            }
        if duplicates and method.label in duplicates:
            entry["greedily"] = duplicates[method.label]
        found.append(entry)
    return found


def speeds(records: Sequence[Record], kind: str = "decode", flat: Mapping[str, str] | None = None) -> list[Record]:
    """Decoding speed per method, category, temperature and batch, and over all categories if there are several.

    `flat` maps the label of a method with prefix trees to that of its variant with flat beams.
    """
    cells = _cells(records, kind, ("method", "category", "temperature", "batch"))
    categories = list(dict.fromkeys(key[1] for key in cells))
    if len(categories) > 1:
        for method, temperature, batch in dict.fromkeys((k[0], k[2], k[3]) for k in cells):
            parts = [cells.get((method, category, temperature, batch), {}) for category in categories]
            complete = set.intersection(*(set(part) for part in parts))
            if complete:
                cells[method, ALL, temperature, batch] = {
                    number: _total([part[number] for part in parts]) for number in sorted(complete)
                }
    equal = _equal_texts(records)
    return [_speed(key, cells, flat or {}) | equal.get(key, {}) for key in cells]


def _cells(records: Sequence[Record], kind: str, names: Sequence[str]) -> dict[tuple[Any, ...], dict[int, Record]]:
    cells: dict[tuple[Any, ...], dict[int, Record]] = {}
    for one in records:
        if one["kind"] == kind:
            cells.setdefault(tuple(one[name] for name in names), {})[one["round"]] = one
    return cells


def _total(parts: Sequence[Record]) -> Record:
    """One round's figures over several categories."""
    total: Record = {name: sum(part.get(name, 0) for part in parts) for name in _SUMMED}
    positions = [part["accepted_by_position"] for part in parts]
    total["accepted_by_position"] = [sum(counts) for counts in zip(*positions, strict=True)]
    total["first_token_seconds"] = [seconds for part in parts for seconds in part["first_token_seconds"]]
    total["peak_memory_bytes"] = max(part.get("peak_memory_bytes") or 0 for part in parts) or None
    return total


def _speed(key: tuple[Any, ...], cells: Mapping[tuple[Any, ...], Rounds], flat: Mapping[str, str]) -> Record:
    """Medians over the rounds of one cell, and ratios to the baselines."""
    (method, *condition), rounds = key, cells[key]
    first = next(iter(rounds.values()))
    entry: Record = dict(zip(("method", "category", "temperature", "batch"), key, strict=True))
    entry |= {"rounds": len(rounds), "tokens_per_second": _spread([_rate(one) for one in rounds.values()])}
    baselines = BASELINES | ({"speed_up_over_unfolded": flat[method]} if method in flat else {})
    for name, base in baselines.items():
        ratios = _ratios(rounds, cells.get((base, *condition), {}), _rate)
        if ratios and base != method:
            entry[name] = _spread(ratios)
    if method != TRANSFORMERS:
        drafts = max(1, first["drafts"])
        entry["tokens_per_step"] = round(1 + first["accepted"] / drafts, 4)
        entry["acceptance_by_position"] = [round(count / drafts, 4) for count in first["accepted_by_position"]]
        entry["nodes_per_draft"] = round(first["drafted"] / drafts, 3)
    entry["step_ms"] = _median([1e3 * one["seconds"] / one["steps"] for one in rounds.values()])
    entry["first_token_ms"] = _median_ms(rounds, "first_token_seconds")
    memory = max((one.get("peak_memory_bytes") or 0 for one in rounds.values()), default=0)
    return entry | ({"peak_memory_bytes": memory} if memory else {})


def _rate(one: Record) -> float:
    return float(one["tokens"] / one["seconds"])


def _ratios(rounds: Rounds, baseline: Rounds, rate: Callable[[Record], float]) -> list[float]:
    """Ratios to a baseline in the rounds that both were measured in."""
    return [rate(one) / rate(baseline[number]) for number, one in rounds.items() if number in baseline]


def calls(records: Sequence[Record]) -> list[Record]:
    """Time of a complete call per method, temperature and answer length, its parts, and ratios to the baselines.

    A round's figure is the mean over its calls.  `decoding` holds the same without the prompt and the first steps.
    """
    cells = _cells(records, "calls", ("method", "temperature", "new_tokens"))
    found = []
    for key, rounds in sorted(cells.items(), key=lambda cell: cell[0][1:]):
        entry: Record = dict(zip(("method", "temperature", "new_tokens"), key, strict=True))
        entry |= {"rounds": len(rounds), "requests": len(next(iter(rounds.values()))["seconds"])}
        entry["seconds"] = _spread([statistics.mean(one["seconds"]) for one in rounds.values()])
        entry["first_token_ms"] = _median_ms(rounds, "first_token_seconds")
        entry["first_steps_ms"] = _median_ms(rounds, "starting_seconds")
        speeds = [_decoding_rate(one) for one in rounds.values()]
        decoding: Record = {"tokens_per_second": _spread(speeds)} if all(speeds) else {}
        for name, base in BASELINES.items():
            baseline = cells.get((base, *key[1:]), {})
            ratios = _ratios(rounds, baseline, lambda one: 1 / sum(one["seconds"]))
            if not ratios or base == key[0]:
                continue
            entry[name] = _spread(ratios)
            if decoding and all(_decoding_rate(one) for one in baseline.values()):
                decoding[name] = _spread(_ratios(rounds, baseline, _decoding_rate))
        found.append(entry | {"decoding": decoding})
    return found


def _decoding_rate(one: Record) -> float:
    """Tokens per second after the first steps; 0 if the calls end with those."""
    tokens = sum(one["decoding_tokens"])
    return tokens / sum(one["decoding_seconds"]) if tokens else 0.0


def _equal_texts(records: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    """Number of texts that equal those without a drafter, by method, category, temperature and batch."""
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for one in records:
        if one["kind"] == "texts":
            for category in dict.fromkeys((one["category"], ALL)):
                cells.setdefault((one["method"], category, one["temperature"], one["batch"]), []).append(one)
    found = {}
    for key, parts in cells.items():
        divergences = [one for part in parts for one in part["parted"]]
        compared = sum(part["texts_compared"] for part in parts)
        margins = [one["margin"] / one["rounding"] for one in divergences if one["rounding"]]
        found[key] = {
            "texts": compared,
            "texts_equal": compared - len(divergences),
            "texts_parted_without_reason": sum(not one["explained"] for one in divergences),
            "largest_margin_in_roundings": round(max(margins), 4) if margins else None,
        }
    return found


def parts(records: Sequence[Record]) -> list[Record]:
    """Parts of a step: draft, verification and the rest."""
    found = []
    for one in records:
        if one["kind"] == "parts":
            entry = {name: one[name] for name in ("method", "temperature", "batch", "context", "nodes")}
            entry |= {name: round(one[name], 4) for name in ("step_ms", "draft_ms", "verify_ms")}
            rest = max(0.0, one["step_ms"] - one["draft_ms"] - one["verify_ms"])
            found.append(entry | {"rest_ms": round(rest, 4)})
    return found


def _spread(values: Sequence[float]) -> Record:
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def _median(values: Sequence[float]) -> float:
    return float(f"{statistics.median(values):.5g}")


def _median_ms(rounds: Rounds, name: str) -> float:
    return _median([1e3 * seconds for one in rounds.values() for seconds in one[name]])
