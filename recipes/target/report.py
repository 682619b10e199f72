"""Renders the page of results from the files of the runs.

    python -m recipes.target.report OUT [OUT …] > docs/target.md

Guarantees that each figure was measured by those runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.target.measure import WAYS

from redrafter.bench.tables import Table

PAPER = {"head": {}, "vocabulary": 1}
NAMES = {"greedy": "greedy", "sampled": "temperature 1"}
ANSWER = 400  # characters shown of a sample

Record = dict[str, Any]


def main() -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outputs", type=Path, nargs="+", help="what --output was of a run")
    print(page([load(folder) for folder in parser.parse_args().outputs]), end="")


def load(folder: Path) -> Record:
    """The results of all parts of a run as one record, with the drafters by number."""
    parts = [json.loads(file.read_text()) for file in sorted(folder.glob("results-*.json"))]
    if not parts:
        raise SystemExit(f"{folder} holds no results.")
    found: Record = {}
    for part in reversed(parts):  # the first part measured what is not of one drafter
        found |= part
    drafters = [record for part in parts for record in part["variants"].values()]
    found["variants"] = sorted(drafters, key=lambda record: record["number"])
    found["checks"] = [part["check"] for part in parts if "check" in part]
    return found


def page(runs: list[Record]) -> str:
    """The results of all runs, as Markdown."""
    lines = [
        "# Drafters compared",
        "",
        "By `recipes/target`, whose README says what is trained on what. Every drafter of a target sees the same",
        "prompts for the same number of steps; what differs is the text that it learns from, the loss, the head or its",
        "vocabulary. Figures are tokens per step (the prompt's own run counts as a step) on prompts that no training",
        "saw. CE is cross-entropy on the text's tokens; KL and TV are distances from the target's whole distribution;",
        "coupled is the cross-entropy of the target's draws by known noise; decay is what a draft position counts of",
        "the one before.",
        "",
    ]
    for found in runs:
        lines += [f"## {found['config']['name']}", "", *_target(found), *_tables(found), *_checks(found)]
        lines += _samples(found)
    return "\n".join(lines).rstrip() + "\n"


def _target(found: Record) -> list[str]:
    """How the target was trained, and samples of its texts."""
    config, made = found["config"], found["training"]
    lines = [
        f"{config['parameters'] / 1e6:,.0f} M parameters ({config['model_type']}: {config['num_hidden_layers']} layers "
        f"of width {config['hidden_size']}, a vocabulary of {config['vocab_size']:,})."
    ]
    if made:
        files = ", ".join(f"{name} ({times:g} x)" for name, times in made.get("files", {}).items())
        lines[0] += (
            f" Trained from scratch on one {made['device']} for {made['minutes']:g} minutes after compiling: "
            f"{made['steps']:,} steps of {made['batch']} windows, {made['tokens'] / 1e6:,.0f} M tokens"
            f"{f', of {files}' if files else ''}."
        )
        losses = made["held_out_loss"]
        lines += ["", "Loss on held-out rows, nats a token:", ""]
        lines += _table(["", *losses], [["loss", *(f"{loss:.2f}" for loss in losses.values())]])
    lines += ["", "Its texts, on the held-out prompts (entropy in nats a token; distinct 4-grams within a text):", ""]
    rows = [
        [
            category,
            NAMES[way],
            f"{one['prompts']}",
            f"{one['tokens']:,}",
            f"{one['entropy']:.2f}",
            "" if one["distinct_4_grams"] is None else f"{one['distinct_4_grams']:.2f}",
        ]
        for way, categories in found["target"].items()
        for category, one in categories.items()
    ]
    lines += _table(["prompts of", "decoding", "prompts", "tokens", "entropy", "distinct 4-grams"], rows)
    return [*lines, ""]


def _tables(found: Record) -> list[str]:
    plan, data = found["plan"], found["data"]
    drafters = found["variants"]
    prompts = sum(one["prompts"] for one in found["target"]["greedy"].values())
    size = "; ".join(f"{kind}: {one['rows']:,} rows, {one['tokens']:,} tokens" for kind, one in data.items())
    widths = " / ".join(map(str, plan["widths"]))
    lines = [
        f"Drafters: {plan['steps']} steps of {plan['batch']} rows of 1,024 tokens. To learn from: {size}. Measured on "
        f"{prompts} prompts, {plan['new_tokens']} new tokens each, with W = {widths} beams of "
        f"{found['length']} tokens, on {found['device']} (torch {found['torch']}).",
        "",
        "### Recipes",
        "",
    ]
    recipes = [one for one in drafters if _is(one, **PAPER)]
    released = next((one for one in recipes if one["data"] == "text"), None)
    lines += _compared(found, recipes, released, "released")
    changed = [one for one in drafters if one["head"]]
    base = _like(changed, drafters)
    lines += ["", "### Heads", "", "Trained alike; ms are of one draft for one row, from state to tree.", ""]
    lines += _compared(found, [*([base] if base else []), *changed], base, "paper's head", costs=True)
    fewer = [one for one in drafters if one["vocabulary"] > 1 and not one["head"]]
    base = _like(fewer, drafters)
    lines += ["", "### Draft vocabulary", "", "Coverage: the share of the target's tokens that can be drafted.", ""]
    lines += _compared(found, [*([base] if base else []), *fewer], base, "full", costs=True, coverage=True)
    return [*lines, ""]


def _is(one: Record, **wanted: Any) -> bool:
    return all(one[name] == value for name, value in wanted.items())


def _like(changed: list[Record], drafters: list[Record]) -> Record | None:
    """The drafter with the paper's head that was trained in the same way."""
    return next(
        (
            one
            for one in drafters
            if changed and _is(one, **PAPER, data=changed[0]["data"], objective=changed[0]["objective"])
        ),
        None,
    )


def _compared(
    found: Record, rows: list[Record], base: Record | None, name: str, *, costs: bool = False, coverage: bool = False
) -> list[str]:
    """A table of drafters: tokens per step by category and overall, relative to `base`."""
    if not rows:
        return ["Not measured."]
    categories, widths = [*found["target"]["greedy"]], found["plan"]["widths"]
    head = ["drafter"]
    head += [f"{NAMES[way]}: {one}" for way in WAYS for one in (*categories, "all")]
    head += [f"x {name}, {NAMES[way]}" for way in WAYS]
    head += ["parameters", "ms a draft", f"x {name}"] if costs else []
    head += ["tokens drafted", "coverage: " + " / ".join(categories)] if coverage else []
    lines = []
    for one in rows:
        cells = [f"**{one['name']}**" if one is base else one["name"]]
        for way in WAYS:
            cells += [_both(_rates(one, way, widths, names)) for names in (*([c] for c in categories), categories)]
        for way in WAYS:
            own = _rates(one, way, widths, categories)
            cells.append(_ratio(own, _rates(base, way, widths, categories) if base else []))
        if costs:
            own, known = _ms(found, one), _ms(found, base) if base else []
            cells += [f"{one['parameters'] / 1e6:.1f} M", _both(own, 3), _ratio(own, known)]
        if coverage:
            covered = one["coverage"]
            shares = [100 * sum(covered[way][c] for way in WAYS) / len(WAYS) for c in categories] if covered else []
            cells += [f"{one['draft_vocabulary'] or found['config']['vocab_size']:,}", _both(shares, 1, "%")]
        lines.append(cells)
    return _table(head, lines)


def _rates(one: Record, way: str, widths: list[int], categories: list[str]) -> list[float]:
    """Tokens per step over these categories, by width."""
    found = []
    for width in widths:
        pairs = [one["counts"][f"{way} {width}"][category] for category in categories]
        found.append(sum(tokens for tokens, _ in pairs) / sum(steps for _, steps in pairs))
    return found


def _ms(found: Record, one: Record) -> list[float]:
    """Draft times by width, if this head shape was timed."""
    return list(found.get("drafts", {}).get(one["shape"], {}).values())


def _ratio(own: list[float], base: list[float]) -> str:
    return _both(a / b for a, b in zip(own, base, strict=True)) if own and base else ""


def _both(values: Iterable[float], digits: int = 2, unit: str = "") -> str:
    return " / ".join(f"{value:.{digits}f}{unit}" for value in values)


def _samples(found: Record) -> list[str]:
    """One text per category, greedy and sampled; the prompts belong to others and are not shown."""
    lines = ["### Sample texts", "", "What the target wrote to the first prompt of each category.", ""]
    for way, categories in found["target"].items():
        for category, one in categories.items():
            _, answer = one["samples"][0]
            end = " …" if len(answer) > ANSWER else ""
            lines += [f"{category.capitalize()}, {NAMES[way]}:", "", "````text"]
            lines += [f"{answer[:ANSWER]}{end}", "````", ""]
    return lines


def _checks(found: Record) -> list[str]:
    """Tokens per step of actual decoding."""
    lines = []
    for check in found["checks"]:
        counts = [
            f"{NAMES[way]} {check[way]['decoded'][0]:,} tokens in {check[way]['decoded'][1]:,} steps (by the texts "
            f"{check[way]['counted'][0]:,} in {check[way]['counted'][1]:,})"
            for way in WAYS
        ]
        lines.append(f"- {check['variant']}, W = {check['width']}: {'; '.join(counts)}.")
    return ["Drafts are counted on texts that the target wrote once; decoding itself counted:", "", *lines, ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return Table(head, rows, names=len(head)).markdown.splitlines()


if __name__ == "__main__":
    main()
