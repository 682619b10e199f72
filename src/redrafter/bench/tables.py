"""Tables of results.  A table holds text; reports and pages lay it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.results import Results
from redrafter.bench.tasks import ALL
from redrafter.bench.units import FLAT, UNCOUPLED

Entry = Mapping[str, Any]
"""Figures of one method, from the results."""


@dataclass(frozen=True)
class Table:
    """Text cells below a row of column titles."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""
    names: int = 1
    """Number of left columns that hold names; the others hold figures."""

    @property
    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        ruler = ["---" if column < self.names else "---:" for column in range(len(self.head))]
        lines = [self.head, ruler, *([cell.replace("|", r"\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sampling_name(temperature: float) -> str:
    """`"greedy"` or `"temperature 0.7"`."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def temperatures(entries: Iterable[Entry]) -> list[float]:
    """The temperatures of the entries, sorted."""
    return sorted({one["temperature"] for one in entries})


def at(entries: Iterable[Entry], temperature: float) -> list[Entry]:
    """The entries at a temperature."""
    return [one for one in entries if one["temperature"] == temperature]


def overall(speed: Sequence[Entry]) -> list[Entry]:
    """Entries over all prompts: those of all categories together, or of the only category."""
    return [one for one in speed if one["category"] == ALL] or list(speed)


def median(figure: Entry | None, form: str) -> str:
    """The median of a figure; empty if there is none."""
    return "" if figure is None else format(figure["median"], form)


def spread(figure: Entry | None, form: str = ".2f") -> str:
    """The median of a figure with its range, which is omitted if it rounds to the median; empty if there is none."""
    if figure is None:
        return ""
    middle, least, most = (format(figure[name], form) for name in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"


def equal_texts(one: Entry) -> str:
    """Number of texts that equal those without a drafter, and of those that differ by more than rounding explains."""
    if "texts" not in one:
        return ""
    unexplained = one["texts_parted_without_reason"]
    return f"{one['texts_equal']} of {one['texts']}" + (f", {unexplained} unexplained" if unexplained else "")


def millions(parameters: int | None) -> str:
    """A number of parameters."""
    return "" if parameters is None else f"{parameters / 1e6:,.2f} M" if parameters else "none"


def _figure(name: str, form: str, scale: float = 1.0) -> Callable[[Entry], str]:
    """A column of numbers; empty where the number is missing."""
    return lambda one: "" if one.get(name) is None else format(scale * one[name], form)


COLUMNS: Mapping[str, Callable[[Entry], str]] = {
    "prompts": lambda one: one["category"],
    "method": lambda one: one["method"],
    "decoding": lambda one: sampling_name(one["temperature"]),
    "weights": lambda one: one["weights"],
    "draft vocabulary": lambda one: one["draft_vocabulary"],
    "parameters": lambda one: millions(one["parameters"]),
    "new tokens": lambda one: str(one["new_tokens"]),
    "call, s": lambda one: spread(one["seconds"], ".3f"),
    "draft, ms": _figure("draft_ms", ".3f"),
    "tokens/s": lambda one: median(one["tokens_per_second"], ",.1f"),
    "speed-up": lambda one: spread(one.get("speed_up")),
    "speed-up over transformers": lambda one: spread(one.get("speed_up_over_transformers")),
    "tokens per step": _figure("tokens_per_step", ".2f"),
    "nodes per draft": lambda one: f"{one['nodes_per_draft']:.1f}" if one.get("nodes_per_draft") else "",
    "step, ms": _figure("step_ms", ".2f"),
    "first token, ms": _figure("first_token_ms", ".1f"),
    "first steps, ms": lambda one: f"{one['first_steps_ms']:.1f}" if one["first_steps_ms"] else "",
    "peak memory, MB": _figure("peak_memory_bytes", ",.0f", 1e-6),
    "decoding tokens/s": lambda one: median(one["decoding"].get("tokens_per_second"), ",.1f"),
    "decoding speed-up": lambda one: spread(one["decoding"].get("speed_up")),
    "decoding speed-up over transformers": lambda one: spread(one["decoding"].get("speed_up_over_transformers")),
    "equal texts": equal_texts,
}
"""How each column is filled from an entry."""


def _table(columns: str, entries: Sequence[Entry], title: str = "", *, names: int = 2) -> Table:
    """One row per entry; `columns` are names from COLUMNS, separated by `|`.  Empty columns are omitted."""
    head = [name.strip() for name in columns.split("|")]
    cells = [[COLUMNS[name](one) for one in entries] for name in head]
    kept = [column for column, values in enumerate(cells) if any(values)]
    rows = [[cells[column][row] for column in kept] for row in range(len(entries))]
    return Table([head[column] for column in kept], rows, title, names)


def speed(results: Results, temperature: float) -> Table:
    """Decoding speed of each method by category, at one temperature."""
    entries = at(results["speed"], temperature)
    names = {one["method"]: number for number, one in enumerate(results["methods"])}
    categories = list(dict.fromkeys(one["category"] for one in entries))
    entries.sort(key=lambda one: (categories.index(one["category"]), names.get(one["method"], 0)))
    columns = (
        "prompts | method | tokens/s | speed-up | speed-up over transformers | tokens per step | nodes per draft | "
        "step, ms | first token, ms | peak memory, MB | equal texts"
    )
    return _table(columns, entries, sampling_name(temperature).capitalize())


def calls(results: Results, temperature: float) -> Table:
    """Complete calls of each method by answer length, at one temperature."""
    names = [one["method"] for one in results["methods"]]
    entries = at(results["calls"], temperature)
    entries.sort(key=lambda one: (one["new_tokens"], names.index(one["method"])))
    columns = (
        "new tokens | method | call, s | speed-up | speed-up over transformers | first token, ms | first steps, ms | "
        "decoding tokens/s | decoding speed-up | decoding speed-up over transformers"
    )
    return _table(columns, entries, sampling_name(temperature).capitalize())


def headline_calls(results: Results, temperature: float) -> list[Entry]:
    """Complete calls at a temperature, of the answer length closest to 128 tokens; empty if none were measured."""
    entries = at(results.get("calls", []), temperature)
    length = min((one["new_tokens"] for one in entries), key=lambda n: abs(n - 128), default=0)
    return [one for one in entries if one["new_tokens"] == length]


def drafters(results: Results) -> list[Entry]:
    """Entries of the drafting methods over all prompts, with their descriptions and draft times."""
    entries = results["sweep"]["heads"] if "sweep" in results else overall(results["speed"])
    about = {one["method"]: one for one in results["methods"] if "parameters" in one}
    draft_ms = {(one["method"], one["temperature"]): one["draft_ms"] for one in results["parts"]}
    return [
        one | about[one["method"]] | {"draft_ms": draft_ms.get((one["method"], one["temperature"]))}
        for one in entries
        if one["method"] in about
    ]


def drafter_costs(results: Results, temperature: float) -> Table:
    """Weights, draft time and speed of each drafting method, at one temperature."""
    columns = "method | weights | draft vocabulary | parameters | draft, ms | tokens per step | tokens/s | speed-up"
    return _table(columns, at(drafters(results), temperature), sampling_name(temperature).capitalize(), names=3)


def acceptance(results: Results) -> Table | None:
    """Acceptance rates by position, over all prompts."""
    entries = [one for one in overall(results["speed"]) if one.get("acceptance_by_position")]
    if not entries:
        return None
    entries.sort(key=lambda one: one["temperature"])
    positions = max(len(one["acceptance_by_position"]) for one in entries)
    rates = [[f"{rate:.0%}" for rate in one["acceptance_by_position"]] for one in entries]
    table = _table("method | decoding | tokens per step", entries)
    rows = [[*row, *own, *[""] * (positions - len(own))] for row, own in zip(table.rows, rates, strict=True)]
    return Table([*table.head, *map(str, range(1, positions + 1))], rows, names=2)


def parts(results: Results) -> Table | None:
    """Milliseconds of a step and of its parts."""
    rows = [
        [one["method"], sampling_name(one["temperature"]), str(one["nodes"])]
        + [f"{one[name]:.3f}" for name in ("draft_ms", "verify_ms", "rest_ms", "step_ms")]
        + [f"{one['draft_ms'] / one['step_ms']:.0%}"]
        for one in results["parts"]
    ]
    head = ["method", "decoding", "verified nodes", "draft", "verify", "rest", "step", "draft share"]
    return Table(head, rows, names=2) if rows else None


def batches(results: Results) -> Table | None:
    """Tokens per second and speed-up by batch size."""
    entries = results["batches"]
    sizes = sorted({one["batch"] for one in entries})
    rows = []
    for temperature in temperatures(entries):
        for method in dict.fromkeys(one["method"] for one in entries):
            own = {one["batch"]: one for one in at(entries, temperature) if one["method"] == method}
            figures = {"tokens/s": ("tokens_per_second", ",.0f"), "speed-up": ("speed_up", ".2f")}
            for label, (name, form) in figures.items():
                if label == "tokens/s" or method not in (AUTOREGRESSIVE, TRANSFORMERS):
                    cells = [median(own.get(size, {}).get(name), form) for size in sizes]
                    rows.append([method, sampling_name(temperature), label, *cells])
    return Table(["method", "decoding", "batch size", *map(str, sizes)], rows, names=3) if rows else None


def grid(results: Results, title: str, name: str, form: str) -> Table:
    """One figure by beam width (rows) and beam length (columns)."""
    entries = results["sweep"]["grid"]
    widths, lengths = (sorted({one["shape"][side] for one in entries}) for side in ("width", "length"))
    cells = {(one["shape"]["width"], one["shape"]["length"]): one[name] for one in entries}
    cells = {shape: value["median"] if isinstance(value, dict) else value for shape, value in cells.items()}
    rows = [
        [str(width), *(format(cells[width, n], form) if (width, n) in cells else "" for n in lengths)]
        for width in widths
    ]
    return Table(["width", *(f"length {length}" for length in lengths)], rows, title)


def tree_pairs(results: Results, axis: str) -> list[tuple[int, Entry, Entry]]:
    """Values of an axis, `widths` or `batches`, with the entries of the prefix tree and of flat beams there."""
    entries = results["sweep"]["folding"][axis]
    values = [one["shape"]["width"] if axis == "widths" else one["batch"] for one in entries]
    tree, flat = (
        {value: one for value, one in zip(values, entries, strict=True) if one["folded"] is folded}
        for folded in (True, False)
    )
    return [(value, tree[value], flat[value]) for value in sorted(tree) if value in flat]


def prefix_trees(results: Results, axis: str) -> Table | None:
    """Prefix trees and flat beams, by `widths` or by `batches`."""
    rows = [
        [
            str(value),
            *(f"{one['nodes_per_draft']:.1f}" for one in (tree, flat)),
            f"{tree['nodes_per_draft'] / flat['nodes_per_draft']:.0%}",
            f"{tree['tokens_per_step']:.2f}",
            *(median(one["tokens_per_second"], ",.0f") for one in (tree, flat)),
            spread(tree.get("speed_up_over_unfolded")),
        ]
        for value, tree, flat in tree_pairs(results, axis)
    ]
    head = ["beams" if axis == "widths" else "batch size", "nodes, prefix tree", f"nodes, {FLAT}", "share"]
    head += ["tokens per step", "tokens/s, prefix tree", f"tokens/s, {FLAT}", "speed-up of the prefix tree"]
    return Table(head, rows) if rows else None


def budgets(results: Results) -> Table | None:
    """The node budgets of a sweep."""
    entries = results["sweep"]["budgets"]
    table = _table("tokens/s | speed-up | tokens per step | nodes per draft", entries)
    rows = [[str(one["shape"]["budget"]), *row] for one, row in zip(entries, table.rows, strict=True)]
    return Table(["node budget", *table.head], rows) if rows else None


def by_temperature(results: Results) -> Table | None:
    """The temperatures of a sweep."""
    entries = results["sweep"]["temperatures"]
    table = _table("decoding | tokens/s | speed-up | tokens per step | nodes per draft", entries)
    rows = [
        [row[0], "default" if one["coupled"] else UNCOUPLED, *row[1:]]
        for one, row in zip(entries, table.rows, strict=True)
    ]
    return Table(["decoding", "drafts", *table.head[1:]], rows, names=2) if rows else None
