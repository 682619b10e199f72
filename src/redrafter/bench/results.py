"""From measured units to the figures of a report: medians over rounds, ratios of runs in one round.

Promises that nothing here was not measured: a figure whose unit is missing is left out.  Does not know how a report
looks.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from redrafter import __version__
from redrafter.bench.contenders import ALONE, THEIRS, Contender
from redrafter.bench.tasks import ALL
from redrafter.bench.units import Record
from redrafter.engine.generate import describe_backend
from redrafter.evaluation.profiling import device_name
from redrafter.targets.target import Target

BASES = {"speed_up": ALONE, "speed_up_over_transformers": THEIRS}
"""What a ratio is to, by the ratio's name."""

_SUMMED = ("tokens", "seconds", "steps", "drafts", "drafted", "accepted")


def about(model: PreTrainedModel) -> Record:
    """The model, the machine and the versions that figures hold for."""
    target = Target(model)
    found = {"redrafter": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "model": target.name,
        "parameters": sum(one.numel() for one in model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": device_name(target.device),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if target.device.type == "cuda" else None,
        "versions": found,
        "path": describe_backend(model),
    }


def methods(
    contenders: Iterable[Contender], model: PreTrainedModel, batch: int, twins: Mapping[str, str] | None = None
) -> list[Record]:
    """What was compared, in the order of the command; with the one as which it drafts greedily, where there is one."""
    found = []
    for one in contenders:
        told: Record = {"method": one.label}
        if one.method is not None:
            target = Target(model, one.method.layers)
            weights, scored = one.form(target)
            told |= {
                "path": Path(one.path).resolve().name if Path(one.path).exists() else one.path,
                "weights": weights,
                "draft_vocabulary": scored,
                "shape": one.drafts(target, batch),
                "parameters": one.parameters(target),
            }
        if twins and one.label in twins:
            told["greedily"] = twins[one.label]
        found.append(told)
    return found


def speeds(records: Sequence[Record], kind: str = "decode", unfolded: Mapping[str, str] | None = None) -> list[Record]:
    """Every method × category × temperature × batch; with several categories also all of them together.

    `unfolded` names the methods that others are held against because they do not fold.
    """
    cells: dict[tuple[Any, ...], dict[int, Record]] = {}
    for one in records:
        if one["kind"] == kind:
            key = (one["method"], one["category"], one["temperature"], one["batch"])
            cells.setdefault(key, {})[one["round"]] = one
    categories = list(dict.fromkeys(key[1] for key in cells))
    if len(categories) > 1:
        for method, temperature, batch in dict.fromkeys((k[0], k[2], k[3]) for k in cells):
            parts = [cells.get((method, category, temperature, batch), {}) for category in categories]
            rounds = set.intersection(*(set(part) for part in parts))
            if rounds:
                cells[method, ALL, temperature, batch] = {
                    number: _together([part[number] for part in parts]) for number in sorted(rounds)
                }
    equal, found = _equal(records), []
    for key, cell in cells.items():
        own = {} if unfolded is None or key[0] not in unfolded else {"speed_up_over_unfolded": unfolded[key[0]]}
        found.append(_speed(key, cell, cells, BASES | own) | equal.get(key, {}))
    return found


def calls(records: Sequence[Record]) -> list[Record]:
    """Complete calls of every method × temperature × answer: the time of one, where it goes, and its ratios.

    A round's figure is of all its calls together: their mean time, and for a ratio the other method's time over it.
    `decoding` holds the same of decoding alone: without the prompt and the first steps.
    """
    cells: dict[tuple[Any, ...], dict[int, Record]] = {}
    for one in records:
        if one["kind"] == "calls":
            cells.setdefault((one["method"], one["temperature"], one["new_tokens"]), {})[one["round"]] = one
    found = []
    for (method, temperature, new_tokens), rounds in sorted(cells.items(), key=lambda cell: cell[0][1:]):
        told: Record = {"method": method, "temperature": temperature, "new_tokens": new_tokens}
        told |= {"rounds": len(rounds), "requests": len(next(iter(rounds.values()))["seconds"])}
        told["seconds"] = _spread([statistics.mean(one["seconds"]) for one in rounds.values()])
        told["first_token_ms"] = _median_ms(rounds.values(), "first_token_seconds")
        told["first_steps_ms"] = _median_ms(rounds.values(), "starting_seconds")
        speeds = [_decoding_speed(one) for one in rounds.values()]
        decoding: Record = {"tokens_per_second": _spread(speeds)} if all(speeds) else {}
        for name, base in BASES.items():
            beside = cells.get((base, temperature, new_tokens), {})
            pairs = [(one, beside[number]) for number, one in rounds.items() if number in beside]
            if not pairs or base == method:
                continue
            told[name] = _spread([sum(other["seconds"]) / sum(one["seconds"]) for one, other in pairs])
            bases = [_decoding_speed(other) for _, other in pairs]
            if decoding and all(bases):
                decoding[name] = _spread(
                    [_decoding_speed(one) / own for (one, _), own in zip(pairs, bases, strict=True)]
                )
        found.append(told | {"decoding": decoding})
    return found


def _decoding_speed(one: Record) -> float:
    """Tokens a second after the first steps; 0 for calls that end with those."""
    tokens = sum(one["decoding_tokens"])
    return tokens / sum(one["decoding_seconds"]) if tokens else 0.0


def _median_ms(rounds: Iterable[Record], name: str) -> float:
    return _median([1e3 * seconds for one in rounds for seconds in one[name]])


def _together(parts: Sequence[Record]) -> Record:
    """One run's figures from those of several categories."""
    found: Record = {name: sum(part.get(name, 0) for part in parts) for name in _SUMMED}
    positions = [part["accepted_by_position"] for part in parts]
    found["accepted_by_position"] = [sum(counts) for counts in zip(*positions, strict=True)]
    found["first_token_seconds"] = [one for part in parts for one in part["first_token_seconds"]]
    found["peak_memory_bytes"] = max(part.get("peak_memory_bytes") or 0 for part in parts) or None
    return found


def _speed(
    key: tuple[Any, ...],
    rounds: dict[int, Record],
    cells: dict[tuple[Any, ...], dict[int, Record]],
    bases: Mapping[str, str],
) -> Record:
    """Medians and spread over the rounds of one cell, and its ratios to those of other methods, `bases`, beside it."""
    method, category, temperature, batch = key
    speed = [one["tokens"] / one["seconds"] for one in rounds.values()]
    first = next(iter(rounds.values()))
    found: Record = {"method": method, "category": category, "temperature": temperature, "batch": batch}
    found |= {"rounds": len(rounds), "tokens_per_second": _spread(speed)}
    for name, base in bases.items():
        beside = cells.get((base, category, temperature, batch), {})
        ratios = [
            (one["tokens"] / one["seconds"]) / (beside[number]["tokens"] / beside[number]["seconds"])
            for number, one in rounds.items()
            if number in beside
        ]
        if ratios and base != method:
            found[name] = _spread(ratios)
    if method != THEIRS:
        drafts = max(1, first["drafts"])
        found["tokens_per_step"] = round(1 + first["accepted"] / drafts, 4)
        found["acceptance_by_position"] = [round(count / drafts, 4) for count in first["accepted_by_position"]]
        found["nodes_per_draft"] = round(first["drafted"] / drafts, 3)
    found["step_ms"] = _median([1e3 * one["seconds"] / one["steps"] for one in rounds.values()])
    found["first_token_ms"] = _median([1e3 * s for one in rounds.values() for s in one["first_token_seconds"]])
    memory = max((one.get("peak_memory_bytes") or 0 for one in rounds.values()), default=0)
    return found | ({"peak_memory_bytes": memory} if memory else {})


def _equal(records: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    """How many texts are equal, by method, category, temperature and batch."""
    held = [one for one in records if one["kind"] == "texts"]
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for one in held:
        place = (one["temperature"], one["batch"])
        cells.setdefault((one["method"], one["category"], *place), []).append(one)
        if one["category"] != ALL:
            cells.setdefault((one["method"], ALL, *place), []).append(one)
    found = {}
    for key, parts in cells.items():
        parted = [one for part in parts for one in part["parted"]]
        compared = sum(part["texts_compared"] for part in parts)
        margins = [one["margin"] / one["rounding"] for one in parted if one["rounding"]]
        found[key] = {
            "texts": compared,
            "texts_equal": compared - len(parted),
            "texts_parted_without_reason": sum(not one["explained"] for one in parted),
            "largest_margin_in_roundings": round(max(margins), 4) if margins else None,
        }
    return found


def parts(records: Sequence[Record]) -> list[Record]:
    """Where the time of a step goes: draft, verify, and the rest of the whole step."""
    found = []
    for one in records:
        if one["kind"] == "parts":
            told = {name: one[name] for name in ("method", "temperature", "batch", "context", "nodes")}
            rest = max(0.0, one["step_ms"] - one["draft_ms"] - one["verify_ms"])
            told |= {name: round(one[name], 4) for name in ("step_ms", "draft_ms", "verify_ms")}
            found.append(told | {"rest_ms": round(rest, 4)})
    return found


def _spread(values: Sequence[float]) -> Record:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _median(values: Sequence[float]) -> float:
    return float(f"{statistics.median(values):.5g}")
