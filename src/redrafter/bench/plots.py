"""Pictures of results as SVG, each whole in itself.

Promises a picture for every kind of figure that the results hold, and no other.  Needs matplotlib, which is imported
when the first picture is drawn.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redrafter.bench.charts import COLOURS, Look, dots, groups, labelled, legend, looks, panels, reach
from redrafter.bench.tables import Results, drafters, headline, law, millions, overall, pairs, temperatures
from redrafter.bench.tasks import ALL
from redrafter.bench.variants import NO_NOISE, UNFOLDED
from redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        "calls": _calls,
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


def _speed(results: Results) -> Figure | None:
    """Speed-ups of decoding alone: all prompts as a bar, categories as points on it, one panel a temperature."""
    speed = [one for one in results["speed"] if "speed_up" in one]
    if not speed or "sweep" in results:
        return None
    tint, several = looks(results), len({one["category"] for one in speed}) > 1
    names = [name for name in tint if any(one["method"] == name for one in speed)]
    whole = overall(speed)
    figure, axes = panels(len(temperatures(speed)), width=6.0, height=1.3 + 0.27 * len(names))
    for axis, temperature in zip(axes, temperatures(speed), strict=True):
        bars = {one["method"]: one["speed_up"] for one in whole if one["temperature"] == temperature}
        points: dict[str, dict[str, Any]] = {}
        for one in speed:
            if several and one["temperature"] == temperature and one["category"] != ALL:
                points.setdefault(one["category"], {})[one["method"]] = one["speed_up"]
        dots(axis, names, tint, bars, points, "all prompts" if several else speed[0]["category"])
        axis.set(title=law(temperature), xlabel="times as fast as without a drafter")
    legend(figure, axes)
    return figure


def _calls(results: Results) -> Figure | None:
    """Speed-ups of complete calls: one length of answer as a bar, the others and decoding alone as points on it."""
    calls = [one for one in results.get("calls", []) if "speed_up" in one]
    if not calls:
        return None
    tint = looks(results)
    names = [name for name in tint if any(one["method"] == name for one in calls)]
    figure, axes = panels(len(temperatures(calls)), width=6.0, height=1.3 + 0.27 * len(names))
    for axis, temperature in zip(axes, temperatures(calls), strict=True):
        chosen = [one for one in headline(results, temperature) if "speed_up" in one]
        length = chosen[0]["new_tokens"]
        points: dict[str, dict[str, Any]] = {}
        for one in calls:
            if one["temperature"] == temperature and one["new_tokens"] != length:
                points.setdefault(f"{one['new_tokens']} tokens", {})[one["method"]] = one["speed_up"]
        alone = {o["method"]: o["decoding"]["speed_up"] for o in chosen if "speed_up" in o["decoding"]}
        points |= {f"decoding alone, {length} tokens": alone} if alone else {}
        bars = {one["method"]: one["speed_up"] for one in chosen}
        dots(axis, names, tint, bars, points, f"end to end, {length} tokens")
        axis.set(title=law(temperature), xlabel="times as fast as without a drafter")
    legend(figure, axes)
    return figure


def _acceptance(results: Results) -> Figure | None:
    """The share of drafts of which so many tokens were accepted, over all prompts; many methods folder by folder."""
    speed = [one for one in overall(results["speed"]) if one.get("acceptance_by_position")]
    if not speed or "sweep" in results:
        return None
    tint, kinds = looks(results), temperatures(speed)
    shown = groups(results, list(dict.fromkeys(one["method"] for one in speed)))
    several = len(shown) > 1
    figure, axes = panels(len(shown) * len(kinds), height=2.3 if several else 3.4, columns=len(kinds) if several else 2)
    for axis, (own, temperature) in zip(axes, itertools.product(shown, kinds), strict=True):
        there = [one for one in speed if one["temperature"] == temperature]
        for one in sorted(there, key=lambda one: one["method"] in own):  # the others lie behind
            rates = one["acceptance_by_position"]
            places, shares = range(1, len(rates) + 1), [100 * rate for rate in rates]
            if one["method"] in own:
                axis.plot(places, shares, label=one["method"], **tint[one["method"]].told)
            else:
                axis.plot(places, shares, color="#dddddd", linewidth=1)
        _whole(axis)
        axis.set(title=law(temperature), xlabel="position in the draft", ylabel="drafts accepted so far, %")
        axis.set_ylim(0, 100)
        if several:
            axis.legend(fontsize=8)
    if not several:
        legend(figure, axes)
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
    figure, axes = panels(len(kinds), height=1.3 + 0.36 * len(names))
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
    legend(figure, axes)
    return figure


def _batches(results: Results) -> Figure | None:
    """Throughput of all rows against the time that one row waits for a token."""
    batches = results["batches"]
    if not batches:
        return None
    tint, kinds = looks(results), temperatures(batches)
    figure, axes = panels(len(kinds))
    for axis, temperature in zip(axes, kinds, strict=True):
        for name in dict.fromkeys(one["method"] for one in batches):
            own = [one for one in batches if (one["method"], one["temperature"]) == (name, temperature)]
            own.sort(key=lambda one: one["batch"])
            speed = [one["tokens_per_second"]["median"] for one in own]
            wait = [1e3 * one["batch"] / one["tokens_per_second"]["median"] for one in own]
            axis.plot(wait, speed, label=name, **tint.get(name, Look(COLOURS[0])).told)
            for one, x, y in zip(own, wait, speed, strict=True):
                axis.annotate(str(one["batch"]), (x, y), (4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=law(temperature), xlabel="milliseconds a token, of one row", ylabel="tokens/s, of all rows")
        axis.margins(0.12)
        axis.set(xlim=(0, None), ylim=(0, None))
    legend(figure, axes)
    return figure


def _grid(results: Results) -> Figure | None:
    """Heat maps of width × length: tokens a second, and tokens a step."""
    grid = results.get("sweep", {}).get("grid", [])
    if not grid:
        return None
    widths, lengths = (sorted({one["shape"][name] for one in grid}) for name in ("width", "length"))
    wide, high = 1.9 + 0.62 * len(lengths), 1.3 + 0.42 * len(widths)
    figure, axes = panels(2, width=max(3.6, wide), height=max(2.6, high), columns=2 if wide < 8 else 1)
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
    figure, (left, right) = panels(2, width=4.4, height=3.2)
    for place, (name, points) in enumerate(lines):
        at = [x for x, _ in points]
        told: dict[str, Any] = {"marker": "o", "markersize": 4, "color": COLOURS[place], "label": name or None}
        ups = [(x, one["speed_up"]) for x, one in points if "speed_up" in one]
        middle = [up["median"] for _, up in ups]
        left.errorbar([x for x, _ in ups], middle, reach([up for _, up in ups]), capsize=2, **told)
        right.plot(at, [one["tokens_per_step"] for _, one in points], **told)
    left.axhline(1, color="#555555", linewidth=1, linestyle="--")
    for axis in (left, right):
        axis.margins(y=0.12)
    left.set(xlabel=label, ylabel="times as fast")
    right.set(xlabel=label, ylabel="tokens per step", ylim=(1, None))
    left.set_ylim(bottom=0)
    legend(figure, [left])
    return figure


def _folding(results: Results) -> Figure | None:
    """The share of nodes that is left when beams with one beginning share it."""
    grid = [one for one in results.get("sweep", {}).get("grid", []) if one["shape"]["width"] > 1]
    if not grid:
        return None
    figure, (axis,) = panels(1, width=5.6, height=3.6)
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
    legend(figure, [axis])
    return figure


def _heads(results: Results) -> Figure | None:
    """How long a draft takes and how much of it is accepted, by temperature; of a sweep also what comes of it."""
    found = [one for one in drafters(results) if one["draft_ms"] is not None]
    if len({one["method"] for one in found}) < 2:
        return None
    tint, kinds = looks(results), temperatures(found)
    height = max(3.4, 1.0 + 0.23 * len({one["method"] for one in found}))
    figure, axes = panels(len(kinds) + ("sweep" in results), width=6.0, height=height)
    for axis, temperature in zip(axes, kinds, strict=False):
        axis.set(title=law(temperature), xlabel="milliseconds of a draft", ylabel="tokens per step")
        axis.set(xlim=(0, 1.1 * max(one["draft_ms"] for one in found)))
        axis.set(ylim=(1, 0.4 + max(one["tokens_per_step"] for one in found)))
        points = []
        for one in found:
            if one["temperature"] == temperature:
                look = tint[one["method"]]
                told = look.told | {"linestyle": "none", "markersize": 8, "clip_on": False, "zorder": 3}
                axis.plot([one["draft_ms"]], [one["tokens_per_step"]], label=one["method"], **told)
                name = f"{one['method']} ({millions(one['parameters'])})"
                points.append((one["draft_ms"], one["tokens_per_step"], name, look.colour))
        labelled(axis, points, height=height)
    if "sweep" in results:
        axis, own = axes[-1], {one["method"]: one["speed_up"] for one in found if "speed_up" in one}
        dots(axis, [*own], tint, own, {}, "all prompts")
        for place, name in enumerate(reversed(own)):
            axis.text(own[name]["most"], place, f" {own[name]['median']:.2f}", va="center", fontsize=9)
        axis.set(title=law(kinds[0]), xlabel="times as fast as without a drafter")
        axis.margins(x=0.15)
    return figure


def _unfolded(results: Results) -> Figure | None:
    """Nodes and speed of beams that share nodes and of beams that do not."""
    if "sweep" not in results:
        return None
    ways = {"beams": pairs(results, "widths"), "rows together": pairs(results, "batches")}
    ways = {label: found for label, found in ways.items() if found}
    if not ways:
        return None
    figure, axes = panels(2 * len(ways), width=4.4, height=3.0)
    for row, (label, found) in enumerate(ways.items()):
        nodes, speed = axes[2 * row : 2 * row + 2]
        at, folded, chains = ([*column] for column in zip(*found, strict=True))
        for name, own, colour in (("folded", folded, COLOURS[0]), (UNFOLDED, chains, COLOURS[1])):
            told: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": name}
            nodes.plot(at, [one["nodes_per_draft"] for one in own], **told)
            each = [one["tokens_per_second"] for one in own]
            speed.errorbar(at, [one["median"] for one in each], reach(each), capsize=2, **told)
        for axis, title in ((nodes, "nodes verified in a draft"), (speed, "tokens/s, of all rows")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(at, [str(one) for one in at])
            axis.minorticks_off()
            axis.margins(y=0.12)
            axis.set(xlabel=label, ylabel=title, ylim=(0, None))
    legend(figure, axes)
    return figure
