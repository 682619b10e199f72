"""Tables of results, as text in cells; how a page shows them is the report's matter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redrafter.bench.contenders import ALONE, THEIRS
from redrafter.bench.tasks import ALL
from redrafter.bench.variants import NO_NOISE, UNFOLDED

Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells under a head; the first column holds names, the others figures."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""
    names: int = 1
    """Columns at the left that hold names."""

    @property
    def markdown(self) -> str:
        """As it is written in Markdown."""
        ruler = ["---" if place < self.names else "---:" for place in range(len(self.head))]
        lines = [self.head, ruler, *([cell.replace("|", r"\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def law(temperature: float) -> str:
    """How tokens are chosen, for a reader."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def temperatures(entries: Iterable[dict[str, Any]]) -> list[float]:
    """Those of entries, rising."""
    return sorted({one["temperature"] for one in entries})


def overall(speed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries over all prompts: those of all categories together, or of the only one."""
    together = [one for one in speed if one["category"] == ALL]
    return together or list(speed)


def times(found: dict[str, float] | None, form: str = ".2f") -> str:
    """A median with its spread; `least` and `most` are left out where they say nothing."""
    if found is None:
        return ""
    middle, least, most = (format(found[name], form) for name in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"


def speed(results: Results, temperature: float) -> Table:
    """Every method on every category at one temperature."""
    entries = [one for one in results["speed"] if one["temperature"] == temperature]
    names = {one["method"]: place for place, one in enumerate(results["methods"])}
    categories = list(dict.fromkeys(one["category"] for one in entries))
    entries.sort(key=lambda one: (categories.index(one["category"]), names.get(one["method"], 0)))
    columns = {
        "prompts": lambda one: one["category"],
        "method": lambda one: one["method"],
        "tokens/s": lambda one: f"{one['tokens_per_second']['median']:,.1f}",
        "x autoregressive": lambda one: times(one.get("speed_up")),
        "x transformers": lambda one: times(one.get("speed_up_over_transformers")),
        "tokens per step": lambda one: f"{one['tokens_per_step']:.2f}" if "tokens_per_step" in one else "",
        "nodes a draft": lambda one: f"{one['nodes_per_draft']:.1f}" if one.get("nodes_per_draft") else "",
        "step, ms": lambda one: f"{one['step_ms']:.2f}",
        "first token, ms": lambda one: f"{one['first_token_ms']:.1f}" if "first_token_ms" in one else "",
        "peak memory, MB": lambda one: f"{one['peak_memory_bytes'] / 1e6:,.0f}" if "peak_memory_bytes" in one else "",
        "equal texts": equal,
    }
    return _filled(columns, entries, law(temperature).capitalize(), names=2)


def calls(results: Results, temperature: float) -> Table:
    """Complete calls of every method at one temperature, by the tokens that they write, decoding alone beside them."""
    columns = {
        "tokens": lambda one: f"{one['new_tokens']}",
        "method": lambda one: one["method"],
        "a call, s": lambda one: times(one["seconds"], ".3f"),
        "x autoregressive": lambda one: times(one.get("speed_up")),
        "x transformers": lambda one: times(one.get("speed_up_over_transformers")),
        "first token, ms": lambda one: f"{one['first_token_ms']:.1f}",
        "first steps, ms": lambda one: f"{one['first_steps_ms']:.1f}" if one["first_steps_ms"] else "",
        "then tokens/s": lambda one: median(one["decoding"].get("tokens_per_second"), ",.1f"),
        "decoding alone, x autoregressive": lambda one: times(one["decoding"].get("speed_up")),
        "decoding alone, x transformers": lambda one: times(one["decoding"].get("speed_up_over_transformers")),
    }
    entries = [one for one in results["calls"] if one["temperature"] == temperature]
    names = [one["method"] for one in results["methods"]]
    entries.sort(key=lambda one: (one["new_tokens"], names.index(one["method"])))
    return _filled(columns, entries, law(temperature).capitalize(), names=2)


def median(found: dict[str, float] | None, form: str) -> str:
    """A median alone; nothing where nothing was measured."""
    return "" if found is None else format(found["median"], form)


def headline(results: Results, temperature: float) -> list[dict[str, Any]]:
    """Complete calls at a temperature whose answers are nearest to 128 tokens; none where none were measured."""
    found = [one for one in results.get("calls", []) if one["temperature"] == temperature]
    length = min((one["new_tokens"] for one in found), key=lambda n: abs(n - 128), default=0)
    return [one for one in found if one["new_tokens"] == length]


def _filled(columns: dict[str, Any], entries: Sequence[dict[str, Any]], title: str, *, names: int) -> Table:
    """A row for each entry; columns that no entry has anything for are left out."""
    rows = [[write(one) for write in columns.values()] for one in entries]
    there = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    head = [list(columns)[place] for place in there]
    return Table(head, [[row[place] for place in there] for row in rows], title, names=names)


def equal(one: dict[str, Any]) -> str:
    """Texts that are what is written without a drafter, and whether rounding explains the others."""
    if "texts" not in one:
        return ""
    odd = one["texts_parted_without_reason"]
    return f"{one['texts_equal']} of {one['texts']}" + (f", {odd} unexplained" if odd else "")


def drafters(results: Results) -> list[dict[str, Any]]:
    """Entries of the methods side by side, over all prompts, each with what it is and with the time of its draft."""
    found = results["sweep"]["heads"] if "sweep" in results else overall(results["speed"])
    about = {one["method"]: one for one in results["methods"] if "parameters" in one}
    took = {(one["method"], one["temperature"]): one["draft_ms"] for one in results["parts"]}
    return [
        one | about[one["method"]] | {"draft_ms": took.get((one["method"], one["temperature"]))}
        for one in found
        if one["method"] in about
    ]


def heads(results: Results, temperature: float) -> Table:
    """What every method is, what it costs and what it brings, at one temperature."""
    columns = {
        "method": lambda one: one["method"],
        "weights": lambda one: one["weights"],
        "drafts among": lambda one: one["draft_vocabulary"],
        "parameters": lambda one: millions(one["parameters"]),
        "a draft, ms": lambda one: "" if one["draft_ms"] is None else f"{one['draft_ms']:.3f}",
        "tokens per step": lambda one: f"{one['tokens_per_step']:.2f}",
        "tokens/s": lambda one: f"{one['tokens_per_second']['median']:,.1f}",
        "x autoregressive": lambda one: times(one.get("speed_up")),
    }
    own = [one for one in drafters(results) if one["temperature"] == temperature]
    rows = [[write(one) for write in columns.values()] for one in own]
    return Table(list(columns), rows, law(temperature).capitalize(), names=3)


def millions(parameters: int | None) -> str:
    """A number of weights."""
    return "" if parameters is None else f"{parameters / 1e6:,.2f} M" if parameters else "none"


def acceptance(results: Results) -> Table | None:
    """Shares accepted at each position, over all prompts."""
    found = [one for one in overall(results["speed"]) if one.get("acceptance_by_position")]
    if not found:
        return None
    deepest = max(len(one["acceptance_by_position"]) for one in found)
    rows = []
    for one in sorted(found, key=lambda one: one["temperature"]):
        shares = [f"{rate:.0%}" for rate in one["acceptance_by_position"]]
        step = f"{one['tokens_per_step']:.2f}"
        rows.append([one["method"], law(one["temperature"]), step, *shares, *[""] * (deepest - len(shares))])
    return Table(["method", "decoding", "tokens per step", *map(str, range(1, deepest + 1))], rows, names=2)


def parts(results: Results) -> Table | None:
    """Milliseconds of a step and of its parts."""
    rows = [
        [one["method"], law(one["temperature"]), str(one["nodes"])]
        + [f"{one[name]:.3f}" for name in ("draft_ms", "verify_ms", "rest_ms", "step_ms")]
        + [f"{one['draft_ms'] / one['step_ms']:.0%}"]
        for one in results["parts"]
    ]
    head = ["method", "decoding", "nodes verified", "draft", "verify", "the rest", "whole step", "draft's share"]
    return Table(head, rows, names=2) if rows else None


def batches(results: Results) -> Table | None:
    """Tokens a second by the rows that are decoded together."""
    found = results["batches"]
    sizes = sorted({one["batch"] for one in found})
    if not sizes:
        return None
    rows = []
    for temperature in temperatures(found):
        for name in dict.fromkeys(one["method"] for one in found):
            own = {o["batch"]: o for o in found if (o["method"], o["temperature"]) == (name, temperature)}
            speeds = [f"{own[b]['tokens_per_second']['median']:,.0f}" if b in own else "" for b in sizes]
            rows.append([name, law(temperature), "tokens/s", *speeds])
            if name not in (ALONE, THEIRS):
                ups = [times(own[b].get("speed_up")).split(" ")[0] if b in own else "" for b in sizes]
                rows.append([name, law(temperature), "x autoregressive", *ups])
    return Table(["method", "decoding", "rows together", *map(str, sizes)], rows, names=3)


def grid(results: Results, title: str, name: str, form: str) -> Table:
    """Width × length, one figure a cell."""
    found = results["sweep"]["grid"]
    widths, lengths = (sorted({one["shape"][side] for one in found}) for side in ("width", "length"))
    cells = {(one["shape"]["width"], one["shape"]["length"]): one[name] for one in found}
    cells = {place: value["median"] if isinstance(value, dict) else value for place, value in cells.items()}
    rows = [
        [str(width), *(format(cells[width, n], form) if (width, n) in cells else "" for n in lengths)]
        for width in widths
    ]
    return Table(["width", *(f"length {one}" for one in lengths)], rows, title)


def pairs(results: Results, axis: str) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Beams folded and unfolded by `widths` or by `batches`: the place on that axis, and both entries there."""
    found = results["sweep"]["folding"][axis]
    at = [one["shape"]["width"] if axis == "widths" else one["batch"] for one in found]
    tree, chains = (
        {place: one for place, one in zip(at, found, strict=True) if one["folded"] is folded}
        for folded in (True, False)
    )
    return [(place, tree[place], chains[place]) for place in sorted(tree) if place in chains]


def folding(results: Results, axis: str) -> Table | None:
    """Beams folded and unfolded, by `widths` or by `batches`."""
    rows = [
        [
            str(place),
            *(f"{one['nodes_per_draft']:.1f}" for one in (tree, chains)),
            f"{tree['nodes_per_draft'] / chains['nodes_per_draft']:.0%}",
            f"{tree['tokens_per_step']:.2f}",
            *(f"{one['tokens_per_second']['median']:,.0f}" for one in (tree, chains)),
            times(tree.get("speed_up_over_unfolded")),
        ]
        for place, tree, chains in pairs(results, axis)
    ]
    head = ["beams" if axis == "widths" else "rows together", "nodes, folded", UNFOLDED, "left", "tokens per step"]
    return Table([*head, "tokens/s, folded", UNFOLDED, "folded x unfolded"], rows) if rows else None


def points(results: Results, axis: str) -> Table | None:
    """The budgets or the temperatures of a sweep, one a row."""
    found = results["sweep"][axis]
    if not found:
        return None
    rows = []
    for one in found:
        kind = law(one["temperature"]) if axis == "temperatures" else str(one["shape"]["budget"])
        known = "" if axis == "budgets" else "as the method drafts" if one["coupled"] else NO_NOISE
        figures = [f"{one['tokens_per_second']['median']:,.1f}", times(one.get("speed_up"))]
        rows.append([kind, known, *figures, f"{one['tokens_per_step']:.2f}", f"{one['nodes_per_draft']:.1f}"])
    head = ["decoding" if axis == "temperatures" else "nodes", "drafts", "tokens/s", "x autoregressive"]
    table = Table([*head, "tokens per step", "nodes a draft"], rows, names=2)
    if axis == "budgets":
        return Table([table.head[0], *table.head[2:]], [[row[0], *row[2:]] for row in rows])
    return table
