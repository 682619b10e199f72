"""What the pictures of a report share: panels, legends, the look of a method, labels beside points.

Needs matplotlib, which is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from redrafter.bench.contenders import ALONE, THEIRS
from redrafter.bench.tables import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Colour-blind readers can tell them apart too (Okabe and Ito)."""

MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How a method is drawn, in every picture of a report."""

    colour: str
    marker: str = "o"
    line: str = "-"

    @property
    def told(self) -> dict[str, Any]:
        """Arguments for `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, "markersize": 4}


def looks(results: Results) -> dict[str, Look]:
    """A look for every method, no two alike.

    Methods that draft from one folder have one colour; their markers and lines differ.
    """
    found = {ALONE: Look("#777777"), THEIRS: Look("#222222", "s")}
    drafted = [one for one in results["methods"] if one["method"] not in found]
    folders = list(dict.fromkeys(one["path"] for one in drafted))
    styles = {colour: zip(cycle(MARKERS), cycle(LINES), strict=False) for colour in COLOURS}
    for one in drafted:
        colour = COLOURS[folders.index(one["path"]) % len(COLOURS)]
        found[one["method"]] = Look(colour, *next(styles[colour]))
    return found


def groups(results: Results, names: Sequence[str]) -> list[list[str]]:
    """Methods that one panel can show: all of them, or those of one folder where they are too many to tell apart."""
    if len(names) <= len(COLOURS):
        return [list(names)]
    folders: dict[str, list[str]] = {}
    for one in results["methods"]:
        if one["method"] in names:
            folders.setdefault(one.get("path", one["method"]), []).append(one["method"])
    return list(folders.values())


def panels(count: int, *, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each of this size in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all panels, below them, in rows of few names."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend([*found.values()], [*found], loc="outside lower center", ncols=min(len(found), 3))


def reach(found: Sequence[dict[str, float]]) -> list[list[float]]:
    """How far the least and the most lie from each median, for error bars."""
    return [[one["median"] - one["least"] for one in found], [one["most"] - one["median"] for one in found]]


def dots(
    axis: Axes,
    names: Sequence[str],
    tint: dict[str, Look],
    bars: dict[str, dict[str, float]],
    points: dict[str, dict[str, dict[str, float]]],
    bar: str,
) -> None:
    """A line for each of the methods, named at its left: a bar with its spread, and points on it.

    `bars` are medians and spreads by method, `points` the same by what a point stands for; `bar` is what a bar stands
    for.
    """
    there = [name for name in reversed(names) if name in bars]
    found = [bars[name] for name in there]
    colours = [tint[name].colour for name in there]
    at = range(len(there))
    axis.barh(at, [one["median"] for one in found], 0.62, color=colours, alpha=0.55)
    axis.barh([0], [0], color="#999999", label=bar)  # whose colour stands for any method's in the legend
    centres = [one["median"] for one in found]
    axis.errorbar(centres, at, xerr=reach(found), fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    for (label, own), marker, colour in zip(points.items(), cycle(MARKERS), cycle(("#111111", "white")), strict=False):
        places = [place for place, name in enumerate(there) if name in own]
        medians = [own[there[place]]["median"] for place in places]
        told: dict[str, Any] = {"linestyle": "none", "markerfacecolor": colour, "markeredgecolor": "#111111"}
        axis.plot(medians, places, marker=marker, markersize=4.5, label=label, zorder=3, **told)
    axis.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axis.set_yticks(at, there)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)


def labelled(axis: Axes, points: Sequence[tuple[float, float, str, str]], *, height: float) -> None:
    """Names points of a panel of this height in inches at its right side, where names do not cover each other.

    A point is x, y, its name and its colour; a thin line leads from the point to the name.  The limits of the axis must
    be set.
    """
    low, high = axis.get_ylim()
    gap = 0.17 / (0.75 * height)  # of the axis' height, for a line of text
    rising = sorted(points, key=lambda point: point[1])
    places = [(y - low) / (high - low) for _, y, _, _ in rising]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - gap)
    for (x, y, name, colour), place in zip(rising, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        told: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "annotation_clip": False}
        axis.annotate(name, (x, y), (1.04, place), arrowprops=line, **told)
