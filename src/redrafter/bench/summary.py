"""The title and the main results of a report, in sentences."""

from __future__ import annotations

from redrafter.bench.methods import TRANSFORMERS
from redrafter.bench.results import Results
from redrafter.bench.tables import Entry, at, headline_calls, overall, spread, temperatures


def title(results: Results) -> str:
    """The title of the page."""
    model = results["about"]["model"] or "unnamed model"
    if "sweep" in results:
        return f"Draft shape sweep: {results['methods'][1]['method']} on {model}"
    return f"Drafting benchmark: {model}"


def lead(results: Results) -> list[str]:
    """The main results in sentences, complete calls first."""
    found = [_fastest_call(results, one) for one in temperatures(results.get("calls", []))]
    scope = " in decoding only" if found else ""
    entries = results["sweep"]["all"] if "sweep" in results else overall(results["speed"])
    for temperature in temperatures(entries):
        own = [one for one in at(entries, temperature) if "speed_up" in one and one["method"] != TRANSFORMERS]
        own = [one for one in own if one.get("folded", True)]
        if own:
            best = max(own, key=lambda one: one["speed_up"]["median"])
            found.append(
                f"{_setting(temperature)}, {best['method']} is the fastest method{scope}: "
                f"{best['tokens_per_second']['median']:,.0f} tokens/s, {_speed_up(best)}, "
                f"{best['tokens_per_step']:.2f} tokens per step."
            )
    compared = [one for one in entries if "texts" in one]
    if compared:
        texts, same = (sum(one[name] for one in compared) for name in ("texts", "texts_equal"))
        unexplained = sum(one["texts_parted_without_reason"] for one in compared)
        rest = "."
        if texts > same:
            rest = "; the others diverge where the two best logits are closer than the rounding error."
        if unexplained:
            rest = f"; {unexplained} diverge beyond rounding, which is a bug."
        found.append(f"{same:,} of {texts:,} drafted texts equal the text without a drafter token for token{rest}")
    if results["failed"]:
        found.append('Some measurements are missing; see "Not measured".')
    return found


def _setting(temperature: float) -> str:
    return f"At temperature {temperature:g}" if temperature else "In greedy decoding"


def _speed_up(best: Entry) -> str:
    beside = best.get("speed_up_over_transformers")
    over = f" and {spread(beside)} over transformers' generate" if beside else ""
    return f"a speed-up of {spread(best['speed_up'])} over autoregressive decoding{over}"


def _fastest_call(results: Results, temperature: float) -> str:
    """The fastest method in complete calls."""
    calls = headline_calls(results, temperature)
    drafted = [one for one in calls if "speed_up" in one and one["method"] != TRANSFORMERS]
    if not drafted:
        return f"{_setting(temperature)}, no drafted calls could be compared end to end."
    best = max(drafted, key=lambda one: one["speed_up"]["median"])
    return (
        f"{_setting(temperature)}, {best['method']} is the fastest method end to end: a call that generates "
        f"{best['new_tokens']} tokens takes {best['seconds']['median']:.3g} s, {_speed_up(best)}."
    )
