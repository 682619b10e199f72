"""Plots of results as SVG.

Guarantees a plot for each kind of figure that the results contain.  Imports matplotlib when the first plot is drawn.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redrafter.bench.charts import (
    COLOURS,
    Style,
    add_legend,
    groups,
    label_points,
    method_bars,
    panels,
    styles,
    temperature_panels,
)
from redrafter.bench.results import Results
from redrafter.bench.sweep_plots import budgets, by_temperature, grid, prefix_sharing, prefix_trees
from redrafter.bench.tables import (
    Entry,
    at,
    drafters,
    headline_calls,
    millions,
    overall,
    sampling_name,
    temperatures,
)
from redrafter.bench.tasks import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"draft_ms": ("draft", "#e69f00"), "verify_ms": ("verify", "#0072b2"), "rest_ms": ("rest", "#999999")}

SETTINGS = {
    "text.parse_math": False,  # a label may contain a dollar sign
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def draw(results: Results) -> dict[str, str]:
    """The plots that the results allow, as SVG by name."""
    import matplotlib

    functions: Sequence[Callable[[Results], Figure | None]] = (
        calls, speed, acceptance, parts, batches, grid, budgets, by_temperature, prefix_sharing, drafter_costs,
        prefix_trees,
    )  # fmt: skip
    found = {}
    for function in functions:
        with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": function.__name__}):
            figure = function(results)
            if figure is not None:
                file = io.StringIO()
                figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
                found[function.__name__] = file.getvalue()
    return found


def speed(results: Results) -> Figure | None:
    """Decoding speed-ups: all prompts as bars, categories as points."""
    entries = [one for one in results["speed"] if "speed_up" in one]
    if not entries or "sweep" in results:
        return None
    several = len({one["category"] for one in entries}) > 1
    count = len({one["method"] for one in entries})
    figure, axes, _ = temperature_panels(entries, width=6.0, height=1.3 + 0.27 * count)
    for axis, own in axes:
        points: dict[str, dict[str, Entry]] = {}
        for one in own if several else ():
            if one["category"] != ALL:
                points.setdefault(one["category"], {})[one["method"]] = one["speed_up"]
        bars = {one["method"]: one["speed_up"] for one in overall(own)}
        method_bars(axis, styles(results), bars, points, "all prompts" if several else entries[0]["category"])
    add_legend(figure, figure.axes)
    return figure


def calls(results: Results) -> Figure | None:
    """Speed-ups of complete calls: one answer length as bars, the others and decoding only as points."""
    entries = [one for one in results.get("calls", []) if "speed_up" in one]
    if not entries:
        return None
    count = len({one["method"] for one in entries})
    figure, axes, _ = temperature_panels(entries, width=6.0, height=1.3 + 0.27 * count)
    for axis, own in axes:
        chosen = [one for one in headline_calls(results, own[0]["temperature"]) if "speed_up" in one]
        length = chosen[0]["new_tokens"]
        points: dict[str, dict[str, Entry]] = {}
        for one in own:
            if one["new_tokens"] != length:
                points.setdefault(f"{one['new_tokens']} tokens", {})[one["method"]] = one["speed_up"]
        decoding = {o["method"]: o["decoding"]["speed_up"] for o in chosen if "speed_up" in o["decoding"]}
        points |= {f"decoding only, {length} tokens": decoding} if decoding else {}
        bars = {one["method"]: one["speed_up"] for one in chosen}
        method_bars(axis, styles(results), bars, points, f"end to end, {length} tokens")
    add_legend(figure, figure.axes)
    return figure


def acceptance(results: Results) -> Figure | None:
    """Acceptance rates by position over all prompts; a panel per folder if there are many methods."""
    from matplotlib.ticker import MaxNLocator

    entries = [one for one in overall(results["speed"]) if one.get("acceptance_by_position")]
    if not entries or "sweep" in results:
        return None
    style, kinds = styles(results), temperatures(entries)
    shown = groups(results, list(dict.fromkeys(one["method"] for one in entries)))
    several = len(shown) > 1
    figure, axes = panels(len(shown) * len(kinds), height=2.3 if several else 3.4, columns=len(kinds) if several else 2)
    for axis, (names, temperature) in zip(axes, itertools.product(shown, kinds), strict=True):
        for one in sorted(at(entries, temperature), key=lambda one: one["method"] in names):  # the others lie behind
            rates = [100 * rate for rate in one["acceptance_by_position"]]
            look: dict[str, Any] = {"color": "#dddddd", "linewidth": 1}
            if one["method"] in names:
                look = style[one["method"]].arguments | {"label": one["method"]}
            axis.plot(range(1, len(rates) + 1), rates, **look)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        title = sampling_name(temperature)
        axis.set(title=title, xlabel="position in the draft", ylabel="acceptance rate, %", ylim=(0, 100))
        if several:
            axis.legend(fontsize=8)
    if not several:
        add_legend(figure, axes)
    return figure


def parts(results: Results) -> Figure | None:
    """Stacked bars of the milliseconds of a step."""
    entries = results["parts"]
    if not entries:
        return None
    count = len({one["method"] for one in entries})
    figure, axes, _ = temperature_panels(entries, height=1.3 + 0.36 * count)
    for axis, own in axes:
        names = [one["method"] for one in reversed(own)]
        left = [0.0] * len(own)
        for key, (label, colour) in PARTS.items():
            widths = [one[key] for one in reversed(own)]
            axis.barh(names, widths, left=left, color=colour, label=label, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, (one, end) in enumerate(zip(reversed(own), left, strict=True)):
            axis.text(end, row, f" {one['step_ms']:.3g}", va="center", fontsize=9)
        axis.set(xlabel="milliseconds per step", xlim=(0, 1.15 * max(left)))
        axis.grid(axis="y", visible=False)
    add_legend(figure, figure.axes)
    return figure


def batches(results: Results) -> Figure | None:
    """Throughput against the time per token of one row."""
    entries = results["batches"]
    if not entries:
        return None
    style = styles(results)
    figure, axes, _ = temperature_panels(entries)
    for axis, own in axes:
        for name in dict.fromkeys(one["method"] for one in entries):
            points = sorted((one for one in own if one["method"] == name), key=lambda one: one["batch"])
            rates = [one["tokens_per_second"]["median"] for one in points]
            waits = [1e3 * one["batch"] / rate for one, rate in zip(points, rates, strict=True)]
            axis.plot(waits, rates, label=name, **style.get(name, Style(COLOURS[0])).arguments)
            for one, x, y in zip(points, waits, rates, strict=True):
                axis.annotate(str(one["batch"]), (x, y), (4, 4), textcoords="offset points", fontsize=8)
        axis.margins(0.12)
        axis.set(xlabel="milliseconds per token of a row", ylabel="tokens/s over all rows")
        axis.set(xlim=(0, None), ylim=(0, None))
    add_legend(figure, figure.axes)
    return figure


def drafter_costs(results: Results) -> Figure | None:
    """Tokens per step against draft time, by temperature; for a sweep also the speed-up."""
    entries = [one for one in drafters(results) if one["draft_ms"] is not None]
    count = len({one["method"] for one in entries})
    if count < 2:
        return None
    style, height = styles(results), max(3.4, 1.0 + 0.23 * count)
    figure, axes, extra = temperature_panels(entries, extra=int("sweep" in results), width=6.0, height=height)
    for axis, own in axes:
        axis.set(xlabel="milliseconds per draft", ylabel="tokens per step")
        axis.set(xlim=(0, 1.1 * max(one["draft_ms"] for one in entries)))
        axis.set(ylim=(1, 0.4 + max(one["tokens_per_step"] for one in entries)))
        points = []
        for one in own:
            look = style[one["method"]].arguments | {"linestyle": "none", "markersize": 8, "clip_on": False}
            axis.plot([one["draft_ms"]], [one["tokens_per_step"]], label=one["method"], zorder=3, **look)
            text = f"{one['method']} ({millions(one['parameters'])})"
            points.append((one["draft_ms"], one["tokens_per_step"], text, style[one["method"]].colour))
        label_points(axis, points, height=height)
    for axis in extra:
        bars = {one["method"]: one["speed_up"] for one in entries if "speed_up" in one}
        method_bars(axis, style, bars, {}, "all prompts")
        for row, name in enumerate(reversed([name for name in style if name in bars])):
            axis.text(bars[name]["most"], row, f" {bars[name]['median']:.2f}", va="center", fontsize=9)
        axis.set_title(sampling_name(entries[0]["temperature"]))
        axis.margins(x=0.15)
    return figure
