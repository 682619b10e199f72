"""Plots of a sweep.  Each function returns None if the results lack its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redrafter.bench.charts import COLOURS, add_legend, panels, whiskers
from redrafter.bench.results import Results
from redrafter.bench.tables import Entry, tree_pairs
from redrafter.bench.units import FLAT, UNCOUPLED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid(results: Results) -> Figure | None:
    """Heat maps by width and length: tokens per second, and tokens per step."""
    entries = results.get("sweep", {}).get("grid", [])
    if not entries:
        return None
    widths, lengths = (sorted({one["shape"][name] for one in entries}) for name in ("width", "length"))
    wide, high = 1.9 + 0.62 * len(lengths), 1.3 + 0.42 * len(widths)
    figure, axes = panels(2, width=max(3.6, wide), height=max(2.6, high), columns=2 if wide < 8 else 1)
    rates = {(o["shape"]["width"], o["shape"]["length"]): o["tokens_per_second"]["median"] for o in entries}
    tokens = {(o["shape"]["width"], o["shape"]["length"]): o["tokens_per_step"] for o in entries}
    for axis, title, found, form in ((axes[0], "tokens/s", rates, ",.0f"), (axes[1], "tokens per step", tokens, ".2f")):
        values = [[found.get((width, length), float("nan")) for length in lengths] for width in widths]
        image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        low, high = image.get_clim()
        best = max(found, key=lambda shape: found[shape])
        for (width, length), value in found.items():
            look: dict[str, Any] = {"color": "white" if value < low + 0.6 * (high - low) else "black", "fontsize": 8}
            look |= {"weight": "bold" if (width, length) == best else "normal", "ha": "center", "va": "center"}
            axis.text(lengths.index(length), widths.index(width), format(value, form), **look)
        axis.set_xticks(range(len(lengths)), [str(one) for one in lengths])
        axis.set_yticks(range(len(widths)), [str(one) for one in widths])
        axis.set(title=title, xlabel="beam length, tokens", ylabel="beam width")
        axis.grid(visible=False)
    return figure


def budgets(results: Results) -> Figure | None:
    """Speed-up and tokens per step by node budget."""
    entries = sorted(results.get("sweep", {}).get("budgets", []), key=lambda one: one["shape"]["budget"])
    return _curves("node budget", {"": [(one["shape"]["budget"], one) for one in entries]})


def by_temperature(results: Results) -> Figure | None:
    """Speed-up and tokens per step by temperature, with default and uncoupled drafts."""
    entries = results.get("sweep", {}).get("temperatures", [])
    lines = {
        label: sorted(((one["temperature"], one) for one in entries if one["coupled"] is coupled), key=lambda p: p[0])
        for coupled, label in ((True, "default"), (False, UNCOUPLED))
    }
    return _curves("temperature (0: greedy)", lines)


def _curves(label: str, lines: dict[str, list[tuple[float, Entry]]]) -> Figure | None:
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    figure, (left, right) = panels(2, width=4.4, height=3.2)
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": name or None}
        ratios = [(x, one["speed_up"]) for x, one in points if "speed_up" in one]
        figures = [ratio for _, ratio in ratios]
        middle = [one["median"] for one in figures]
        left.errorbar([x for x, _ in ratios], middle, whiskers(figures), capsize=2, **look)
        right.plot([x for x, _ in points], [one["tokens_per_step"] for _, one in points], **look)
    left.axhline(1, color="#555555", linewidth=1, linestyle="--")
    for axis in (left, right):
        axis.margins(y=0.12)
    left.set(xlabel=label, ylabel="speed-up")
    right.set(xlabel=label, ylabel="tokens per step", ylim=(1, None))
    left.set_ylim(bottom=0)
    add_legend(figure, [left])
    return figure


def prefix_sharing(results: Results) -> Figure | None:
    """Nodes of the prefix tree as a share of the nodes of flat beams."""
    entries = [one for one in results.get("sweep", {}).get("grid", []) if one["shape"]["width"] > 1]
    if not entries:
        return None
    figure, (axis,) = panels(1, width=5.6, height=3.6)
    for number, length in enumerate(sorted({one["shape"]["length"] for one in entries})):
        points = {o["shape"]["width"]: o["nodes_per_draft"] for o in entries if o["shape"]["length"] == length}
        shares = [100 * points[width] / (width * length) for width in sorted(points)]
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": "-" if number < len(COLOURS) else "--",
        }
        axis.plot(sorted(points), shares, marker="o", markersize=4, label=f"length {length}", **look)
    widths = sorted({one["shape"]["width"] for one in entries})
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(one) for one in widths])
    axis.set(xlabel="beam width", ylabel="nodes of the prefix tree, %", ylim=(0, 105))
    add_legend(figure, [axis])
    return figure


def prefix_trees(results: Results) -> Figure | None:
    """Nodes and speed of prefix trees and of flat beams."""
    if "sweep" not in results:
        return None
    axes_of = {"beam width": tree_pairs(results, "widths"), "batch size": tree_pairs(results, "batches")}
    axes_of = {label: pairs for label, pairs in axes_of.items() if pairs}
    if not axes_of:
        return None
    figure, axes = panels(2 * len(axes_of), width=4.4, height=3.0)
    for row, (label, pairs) in enumerate(axes_of.items()):
        nodes, rates = axes[2 * row : 2 * row + 2]
        values, trees, flat = ([*column] for column in zip(*pairs, strict=True))
        for name, own, colour in (("prefix tree", trees, COLOURS[0]), (FLAT, flat, COLOURS[1])):
            look: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": name}
            nodes.plot(values, [one["nodes_per_draft"] for one in own], **look)
            figures = [one["tokens_per_second"] for one in own]
            rates.errorbar(values, [one["median"] for one in figures], whiskers(figures), capsize=2, **look)
        for axis, title in ((nodes, "nodes verified per draft"), (rates, "tokens/s over all rows")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(one) for one in values])
            axis.minorticks_off()
            axis.margins(y=0.12)
            axis.set(xlabel=label, ylabel=title, ylim=(0, None))
    add_legend(figure, axes)
    return figure
