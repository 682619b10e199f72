"""Pictures of results as SVG, each whole in itself.

Promises a picture for every kind of figure that the results hold, and no other.  Needs matplotlib, which is imported
when the first picture is drawn.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redrafter.bench.contenders import ALONE, THEIRS
from redrafter.bench.tables import Results, drafters, law, millions, overall, pairs, temperatures
from redrafter.bench.variants import NO_NOISE, UNFOLDED
from redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Told apart by colour-blind readers too (Okabe and Ito)."""

PARTS = {"draft_ms": ("draft", "#e69f00"), "verify_ms": ("verify", "#0072b2"), "rest_ms": ("the rest", "#999999")}


def required() -> None:
    """Raises RedrafterError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RedrafterError("The report's pictures need a package more: pip install matplotlib.") from None


def drawn(results: Results) -> dict[str, str]:
    """SVG by the picture's name."""
    required()
    import matplotlib

    pictures: dict[str, Callable[[Results], Figure | None]] = {
        "speed": _speed,
        "acceptance": _acceptance,
        "parts": _parts,
        "batches": _batches,
        "grid": _grid,
        "budgets": _budgets,
        "temperatures": _temperatures,
        "folding": _folding,
        "heads": _heads,
        "unfolded": _unfolded,
    }
    look = {
        "text.parse_math": False,  # a label may hold a dollar
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
    found = {}
    for name, draw in pictures.items():
        with matplotlib.rc_context(look | {"svg.hashsalt": name}):
            figure = draw(results)
            if figure is not None:
                file = io.StringIO()
                figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
                found[name] = file.getvalue()
    return found


def _panels(count: int, *, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def colours(results: Results) -> dict[str, str]:
    """A colour for every method, the same in all pictures; what drafts from one folder shares it, in paler tints."""
    from matplotlib.colors import to_hex, to_rgb

    drafted = [one for one in results["methods"] if one["method"] not in (ALONE, THEIRS)]
    folders = list(dict.fromkeys(one["path"] for one in drafted))
    found, used = {}, dict.fromkeys(COLOURS, 0)
    for one in drafted:
        colour = COLOURS[folders.index(one["path"]) % len(COLOURS)]
        depth = 0.6 ** used[colour]
        found[one["method"]] = to_hex([1 - depth * (1 - part) for part in to_rgb(colour)])
        used[colour] += 1
    return {ALONE: "#777777", THEIRS: "#222222"} | found


def _speed(results: Results) -> Figure | None:
    """Speed-ups by category, side by side, one panel a temperature."""
    speed = [one for one in results["speed"] if "speed_up" in one]
    if not speed or "sweep" in results:
        return None
    tint, categories = colours(results), list(dict.fromkeys(one["category"] for one in speed))
    names = [name for name in tint if any(one["method"] == name for one in speed)]
    wide = max(5.0, 1.1 + 0.24 * len(categories) * (len(names) + 1))
    figure, axes = _panels(len(temperatures(speed)), width=min(wide, 12), columns=1 if wide > 6 else 2)
    for axis, temperature in zip(axes, temperatures(speed), strict=True):
        for place, name in enumerate(names):
            own = {
                o["category"]: o["speed_up"] for o in speed if (o["method"], o["temperature"]) == (name, temperature)
            }
            if not own:  # measured at other temperatures alone
                continue
            at = [i for i, category in enumerate(categories) if category in own]
            found = [own[categories[i]] for i in at]
            size = 0.8 / len(names)
            centres = [i + (place - (len(names) - 1) / 2) * size for i in at]
            middle = [one["median"] for one in found]
            reach = [[one["median"] - one["least"] for one in found], [one["most"] - one["median"] for one in found]]
            axis.bar(centres, middle, size * 0.92, color=tint[name], label=name)
            axis.errorbar(centres, middle, reach, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        axis.axhline(1, color="#555555", linewidth=1, linestyle="--")
        turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(categories) > 4 else {}
        axis.set_xticks(range(len(categories)), categories, **turn)
        axis.set(title=law(temperature), ylabel="times as fast")
        axis.grid(axis="x", visible=False)
        axis.set_ylim(0, 1.05 * max(one["speed_up"]["most"] for one in speed))
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all panels, below them, in rows of few names."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend([*found.values()], [*found], loc="outside lower center", ncols=min(len(found), 3))


def _acceptance(results: Results) -> Figure | None:
    """The share of drafts of which so many tokens were accepted, over all prompts."""
    speed = [one for one in overall(results["speed"]) if one.get("acceptance_by_position")]
    if not speed or "sweep" in results:
        return None
    tint = colours(results)
    figure, axes = _panels(len(temperatures(speed)))
    for axis, temperature in zip(axes, temperatures(speed), strict=True):
        for one in speed:
            if one["temperature"] == temperature:
                rates = one["acceptance_by_position"]
                places, shares = range(1, len(rates) + 1), [100 * rate for rate in rates]
                axis.plot(places, shares, marker="o", markersize=4, color=tint[one["method"]], label=one["method"])
        _whole(axis)
        axis.set(title=law(temperature), xlabel="position in the draft", ylabel="drafts accepted so far, %")
        axis.set_ylim(0, 100)
    _legend(figure, axes)
    return figure


def _whole(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _parts(results: Results) -> Figure | None:
    """Bars of milliseconds: draft, verify, the rest."""
    parts = results["parts"]
    if not parts:
        return None
    kinds = temperatures(parts)
    names = list(dict.fromkeys(one["method"] for one in parts))
    figure, axes = _panels(len(kinds), height=1.3 + 0.36 * len(names))
    for axis, temperature in zip(axes, kinds, strict=True):
        own = {one["method"]: one for one in parts if one["temperature"] == temperature}
        there = [name for name in reversed(names) if name in own]
        left = [0.0] * len(there)
        for key, (label, colour) in PARTS.items():
            took = [own[name][key] for name in there]
            axis.barh(there, took, left=left, color=colour, label=label, height=0.62)
            left = [a + b for a, b in zip(left, took, strict=True)]
        for place, (name, end) in enumerate(zip(there, left, strict=True)):
            axis.text(end, place, f" {own[name]['step_ms']:.3g}", va="center", fontsize=9)
        axis.set(title=law(temperature), xlabel="milliseconds of a step", xlim=(0, 1.15 * max(left)))
        axis.grid(axis="y", visible=False)
    _legend(figure, axes)
    return figure


def _batches(results: Results) -> Figure | None:
    """Throughput of all rows against the time that one row waits for a token."""
    batches = results["batches"]
    if not batches:
        return None
    tint, kinds = colours(results), temperatures(batches)
    figure, axes = _panels(len(kinds))
    for axis, temperature in zip(axes, kinds, strict=True):
        for name in dict.fromkeys(one["method"] for one in batches):
            own = [one for one in batches if (one["method"], one["temperature"]) == (name, temperature)]
            own.sort(key=lambda one: one["batch"])
            speed = [one["tokens_per_second"]["median"] for one in own]
            wait = [1e3 * one["batch"] / one["tokens_per_second"]["median"] for one in own]
            axis.plot(wait, speed, marker="o", markersize=4, color=tint.get(name, COLOURS[0]), label=name)
            for one, x, y in zip(own, wait, speed, strict=True):
                axis.annotate(str(one["batch"]), (x, y), (4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=law(temperature), xlabel="milliseconds a token, of one row", ylabel="tokens/s, of all rows")
        axis.margins(0.12)
        axis.set(xlim=(0, None), ylim=(0, None))
    _legend(figure, axes)
    return figure


def _grid(results: Results) -> Figure | None:
    """Heat maps of width × length: tokens a second, and tokens a step."""
    grid = results.get("sweep", {}).get("grid", [])
    if not grid:
        return None
    widths, lengths = (sorted({one["shape"][name] for one in grid}) for name in ("width", "length"))
    wide, high = 1.9 + 0.62 * len(lengths), 1.3 + 0.42 * len(widths)
    figure, axes = _panels(2, width=max(3.6, wide), height=max(2.6, high), columns=2 if wide < 8 else 1)
    speed = {(o["shape"]["width"], o["shape"]["length"]): o["tokens_per_second"]["median"] for o in grid}
    step = {(o["shape"]["width"], o["shape"]["length"]): o["tokens_per_step"] for o in grid}
    for axis, title, found, form in ((axes[0], "tokens/s", speed, ",.0f"), (axes[1], "tokens per step", step, ".2f")):
        values = [[found.get((width, length), float("nan")) for length in lengths] for width in widths]
        image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        low, high = image.get_clim()
        best = max(found, key=lambda place: found[place])
        for y, width in enumerate(widths):
            for x, length in enumerate(lengths):
                if (width, length) in found:
                    value = found[width, length]
                    dark = value < low + 0.6 * (high - low)
                    weight = "bold" if (width, length) == best else "normal"
                    told: dict[str, Any] = {"color": "white" if dark else "black", "weight": weight, "fontsize": 8}
                    axis.text(x, y, format(value, form), ha="center", va="center", **told)
        axis.set_xticks(range(len(lengths)), [str(one) for one in lengths])
        axis.set_yticks(range(len(widths)), [str(one) for one in widths])
        axis.set(title=title, xlabel="length, tokens of a beam", ylabel="width, beams")
        axis.grid(visible=False)
    return figure


def _budgets(results: Results) -> Figure | None:
    """Tokens a second and a step by the nodes that are verified."""
    budgets = sorted(results.get("sweep", {}).get("budgets", []), key=lambda one: one["shape"]["budget"])
    if not budgets:
        return None
    return _curves("most probable nodes verified", [("", [(one["shape"]["budget"], one) for one in budgets])])


def _temperatures(results: Results) -> Figure | None:
    """The same by temperature, with the noise of the target's draws known to the drafter and not."""
    found = results.get("sweep", {}).get("temperatures", [])
    if not found:
        return None
    lines = []
    for coupled, label in ((True, "as the method drafts"), (False, NO_NOISE)):
        own = [(one["temperature"], one) for one in found if one["coupled"] is coupled]
        if own:
            lines.append((label, sorted(own, key=lambda pair: pair[0])))
    return _curves("temperature (0: greedy)", lines)


def _curves(label: str, lines: Sequence[tuple[str, Sequence[tuple[float, dict[str, Any]]]]]) -> Figure:
    figure, (left, right) = _panels(2, width=4.4, height=3.2)
    for place, (name, points) in enumerate(lines):
        at = [x for x, _ in points]
        told: dict[str, Any] = {"marker": "o", "markersize": 4, "color": COLOURS[place], "label": name or None}
        ups = [(x, one["speed_up"]) for x, one in points if "speed_up" in one]
        middle = [up["median"] for _, up in ups]
        reach = [[up["median"] - up["least"] for _, up in ups], [up["most"] - up["median"] for _, up in ups]]
        left.errorbar([x for x, _ in ups], middle, reach, capsize=2, **told)
        right.plot(at, [one["tokens_per_step"] for _, one in points], **told)
    left.axhline(1, color="#555555", linewidth=1, linestyle="--")
    for axis in (left, right):
        axis.margins(y=0.12)
    left.set(xlabel=label, ylabel="times as fast")
    right.set(xlabel=label, ylabel="tokens per step", ylim=(1, None))
    left.set_ylim(bottom=0)
    _legend(figure, [left])
    return figure


def _folding(results: Results) -> Figure | None:
    """The share of nodes that is left when beams with one beginning share it."""
    grid = [one for one in results.get("sweep", {}).get("grid", []) if one["shape"]["width"] > 1]
    if not grid:
        return None
    figure, (axis,) = _panels(1, width=5.6, height=3.6)
    for place, length in enumerate(sorted({one["shape"]["length"] for one in grid})):
        own = sorted((one for one in grid if one["shape"]["length"] == length), key=lambda one: one["shape"]["width"])
        at = [one["shape"]["width"] for one in own]
        kept = [100 * one["nodes_per_draft"] / (one["shape"]["width"] * length) for one in own]
        line = "-" if place < len(COLOURS) else "--"
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(at, kept, line, marker="o", markersize=4, color=colour, label=f"length {length}")
    widths = sorted({one["shape"]["width"] for one in grid})
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(one) for one in widths])
    axis.set(xlabel="width, beams", ylabel="nodes after folding, %", ylim=(0, 105))
    _legend(figure, [axis])
    return figure


def _heads(results: Results) -> Figure | None:
    """How long a draft takes and how much of it is accepted, by temperature; of a sweep also what comes of it."""
    found = [one for one in drafters(results) if one["draft_ms"] is not None]
    if len({one["method"] for one in found}) < 2:
        return None
    tint, kinds = colours(results), temperatures(found)
    marks = dict(zip(tint, itertools.cycle("osD^vP"), strict=False))
    figure, axes = _panels(len(kinds) + ("sweep" in results), width=4.8)
    for axis, temperature in zip(axes, kinds, strict=False):
        for one in found:
            if one["temperature"] != temperature:
                continue
            told: dict[str, Any] = {"color": tint[one["method"]], "marker": marks[one["method"]], "markersize": 8}
            told |= {"linestyle": "none", "clip_on": False, "zorder": 3}
            label = f"{one['method']} ({millions(one['parameters'])})"
            axis.plot([one["draft_ms"]], [one["tokens_per_step"]], label=label, **told)
        axis.set(title=law(temperature), xlabel="milliseconds of a draft", ylabel="tokens per step")
        axis.set(xlim=(0, 1.1 * max(one["draft_ms"] for one in found)))
        axis.set(ylim=(1, 0.4 + max(one["tokens_per_step"] for one in found)))
    if "sweep" in results:
        axis, own = axes[-1], [one for one in reversed(found) if "speed_up" in one]
        middle = [one["speed_up"]["median"] for one in own]
        names = [one["method"] for one in own]
        axis.barh(names, middle, color=[tint[name] for name in names], height=0.62)
        for place, one in enumerate(middle):
            axis.text(one, place, f" {one:.2f}", va="center", fontsize=9)
        axis.axvline(1, color="#555555", linewidth=1, linestyle="--")
        axis.set(title=law(kinds[0]), xlabel="times as fast", xlim=(0, 1.15 * max(middle, default=1)))
        axis.grid(axis="y", visible=False)
    _legend(figure, axes)
    return figure


def _unfolded(results: Results) -> Figure | None:
    """Nodes and speed of beams that share nodes and of beams that do not."""
    if "sweep" not in results:
        return None
    ways = {"beams": pairs(results, "widths"), "rows together": pairs(results, "batches")}
    ways = {label: found for label, found in ways.items() if found}
    if not ways:
        return None
    figure, axes = _panels(2 * len(ways), width=4.4, height=3.0)
    for row, (label, found) in enumerate(ways.items()):
        nodes, speed = axes[2 * row : 2 * row + 2]
        at, folded, chains = ([*column] for column in zip(*found, strict=True))
        for name, own, colour in (("folded", folded, COLOURS[0]), (UNFOLDED, chains, COLOURS[1])):
            told: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": name}
            nodes.plot(at, [one["nodes_per_draft"] for one in own], **told)
            each = [one["tokens_per_second"] for one in own]
            middle = [one["median"] for one in each]
            reach = [[one["median"] - one["least"] for one in each], [one["most"] - one["median"] for one in each]]
            speed.errorbar(at, middle, reach, capsize=2, **told)
        for axis, title in ((nodes, "nodes verified in a draft"), (speed, "tokens/s, of all rows")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(at, [str(one) for one in at])
            axis.minorticks_off()
            axis.margins(y=0.12)
            axis.set(xlabel=label, ylabel=title, ylim=(0, None))
    _legend(figure, axes)
    return figure
