"""Parts of plots: panels, legends, the style of each method, and labels that do not overlap.

Imports matplotlib when the first plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.results import Results
from redrafter.bench.tables import Entry, at, sampling_name, temperatures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Distinguishable for colour-blind readers (Okabe and Ito)."""

MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Style:
    """The style of a method in all plots of a report."""

    colour: str
    marker: str = "o"
    line: str = "-"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, "markersize": 4}


def styles(results: Results) -> dict[str, Style]:
    """A different style for each method; methods from one folder share a colour."""
    found = {AUTOREGRESSIVE: Style("#777777"), TRANSFORMERS: Style("#222222", "s")}
    drafted = [one for one in results["methods"] if one["method"] not in found]
    folders = list(dict.fromkeys(one["path"] for one in drafted))
    remaining = {colour: zip(cycle(MARKERS), cycle(LINES), strict=False) for colour in COLOURS}
    for one in drafted:
        colour = COLOURS[folders.index(one["path"]) % len(COLOURS)]
        found[one["method"]] = Style(colour, *next(remaining[colour]))
    return found


def groups(results: Results, names: Sequence[str]) -> list[list[str]]:
    """Splits methods by folder if they are too many for one panel."""
    if len(names) <= len(COLOURS):
        return [list(names)]
    folders: dict[str, list[str]] = {}
    for one in results["methods"]:
        if one["method"] in names:
            folders.setdefault(one.get("path", one["method"]), []).append(one["method"])
    return list(folders.values())


def panels(count: int, *, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels; `width` and `height` of each in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def temperature_panels(
    entries: Sequence[Entry], *, extra: int = 0, **size: Any
) -> tuple[Figure, list[tuple[Axes, list[Entry]]], list[Axes]]:
    """A figure with a titled panel for each temperature of the entries, each with its entries, and `extra` panels."""
    kinds = temperatures(entries)
    figure, axes = panels(len(kinds) + extra, **size)
    for axis, temperature in zip(axes, kinds, strict=False):
        axis.set_title(sampling_name(temperature))
    own = [(axis, at(entries, temperature)) for axis, temperature in zip(axes, kinds, strict=False)]
    return figure, own, axes[len(kinds) :]


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend of all panels below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=min(len(handles), 3))


def whiskers(figures: Sequence[Entry]) -> list[list[float]]:
    """Distances from each median to the lowest and the highest value, for error bars."""
    return [[one["median"] - one["least"] for one in figures], [one["most"] - one["median"] for one in figures]]


def method_bars(
    axis: Axes,
    style: Mapping[str, Style],
    bars: Mapping[str, Entry],
    points: Mapping[str, Mapping[str, Entry]],
    label: str,
) -> None:
    """Draws a horizontal bar with its range for each method in `bars`, and points on it.

    `points` are figures by the name of the point and by method; `label` names the bars in the legend.
    """
    names = [name for name in reversed([*style]) if name in bars]
    figures = [bars[name] for name in names]
    centres, rows = [one["median"] for one in figures], range(len(names))
    axis.barh(rows, centres, 0.62, color=[style[name].colour for name in names], alpha=0.55)
    axis.barh([0], [0], color="#999999", label=label)  # a neutral colour for the legend
    axis.errorbar(centres, rows, xerr=whiskers(figures), fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    looks = zip(points.items(), cycle(MARKERS), cycle(("#111111", "white")), strict=False)
    for (name, own), marker, colour in looks:
        there = [row for row, method in enumerate(names) if method in own]
        medians = [own[names[row]]["median"] for row in there]
        look: dict[str, Any] = {"linestyle": "none", "markerfacecolor": colour, "markeredgecolor": "#111111"}
        axis.plot(medians, there, marker=marker, markersize=4.5, label=name, zorder=3, **look)
    axis.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axis.set_yticks(rows, names)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)
    axis.set_xlabel("speed-up over autoregressive decoding")


def label_points(axis: Axes, points: Sequence[tuple[float, float, str, str]], *, height: float) -> None:
    """Labels points (x, y, text, colour) to the right of a panel of this height in inches, without overlaps.

    The limits of the axis must be set.
    """
    low, high = axis.get_ylim()
    gap = 0.17 / (0.75 * height)  # height of a line of text, relative to the axis
    rising = sorted(points, key=lambda point: point[1])
    heights = [(y - low) / (high - low) for _, y, _, _ in rising]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1.0 if i == len(heights) - 1 else heights[i + 1] - gap)
    for (x, y, text, colour), at_height in zip(rising, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        look: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "annotation_clip": False}
        axis.annotate(text, (x, y), (1.04, at_height), arrowprops=arrow, **look)
