"""Inserts tables of results into a Markdown page.

    python -m redrafter.bench.readme README.md

replaces the text between `<!-- results FILE -->`, with the path of a results.json relative to the page, and
`<!-- /results -->`.  A marker with several files gets one table that compares them.  Guarantees that nothing outside
the markers changes.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from redrafter.bench.methods import AUTOREGRESSIVE
from redrafter.bench.results import Results
from redrafter.bench.tables import (
    COLUMNS,
    Table,
    equal_texts,
    headline_calls,
    median,
    overall,
    sampling_name,
    spread,
    temperatures,
)
from redrafter.core.shapes import counted
from redrafter.errors import RedrafterError, reason

MARKED = re.compile(r"(<!-- results (\S+(?: \S+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)


def block(results: Results) -> str:
    """A description and a table over all prompts: a row per method and temperature, complete calls first."""
    shapes = {one["method"]: one.get("shape", "") for one in results["methods"]}
    calls = {(one["method"], one["temperature"], one["new_tokens"]): one for one in results.get("calls", [])}
    lengths = sorted({new_tokens for _, _, new_tokens in calls})
    rows = [
        [
            one["method"],
            shapes.get(one["method"], ""),
            sampling_name(one["temperature"]),
            *(spread(calls.get((one["method"], one["temperature"], n), {}).get("speed_up")) for n in lengths),
            COLUMNS["tokens per step"](one),
            median(one["tokens_per_second"], ",.0f"),
            spread(one.get("speed_up")),
            equal_texts(one),
        ]
        for one in sorted(overall(results["speed"]), key=lambda one: one["temperature"])
        if one["method"] != AUTOREGRESSIVE
    ]
    head = ["method", "drafts", "decoding", *(f"end to end, {n} tokens" for n in lengths), "tokens per step"]
    head += ["tokens/s", "decoding speed-up" if lengths else "speed-up", "equal texts"]
    note = [_end_to_end_note(results)] if lengths else []
    return "\n".join([_conditions(results), *note, "", Table(head, rows, names=3).markdown])


def _end_to_end_note(results: Results) -> str:
    requests = max(one["requests"] for one in results["calls"])
    text = (
        "End to end: speed-up of complete calls of `generate` over undrafted calls "
        f"({counted(requests, 'prompt')}, one per call; end tokens are disabled, so every answer has the given "
        "length).  The decoding speed-up excludes the prompt and, on CUDA, the first steps."
    )
    return textwrap.fill(text, 120)


def comparison(several: Sequence[Results]) -> str:
    """Descriptions and one table over all prompts: speed-up and tokens per step of each method.

    There is a column per file and temperature, after one of complete calls if those were measured.
    """
    cells: dict[tuple[str, str], str] = {}
    columns: list[str] = []
    for number, results in enumerate(several, start=1):
        for temperature in temperatures(results["speed"]):
            title = f"{number}: {sampling_name(temperature)}"
            calls = headline_calls(results, temperature)
            if calls:
                columns.append(f"{title}, end to end, {calls[0]['new_tokens']} tokens")
                drafted = [one for one in calls if "speed_up" in one]
                cells |= {(one["method"], columns[-1]): median(one["speed_up"], ".2f") for one in drafted}
                title = f"{title}, decoding"
            columns.append(title)
            for one in overall(results["speed"]):
                if "speed_up" in one and one["temperature"] == temperature:
                    step = f" ({one['tokens_per_step']:.2f})" if "tokens_per_step" in one else ""
                    cells[one["method"], title] = median(one["speed_up"], ".2f") + step
    methods = list(dict.fromkeys(method for method, _ in cells))
    rows = [[method, *(cells.get((method, title), "") for title in columns)] for method in methods]
    about = [f"{number}. {_conditions(results, '   ').lstrip()}" for number, results in enumerate(several, start=1)]
    return "\n".join([*about, "", Table(["method", *columns], rows).markdown])


def _conditions(results: Results, indent: str = "") -> str:
    about, data, arguments = results["about"], results["data"], results["asked"]
    prompts = sum(one["prompts"] for one in data["categories"].values())
    versions = about["versions"]
    text = (
        f"{about['model']} ({about['parameters'] / 1e6:,.0f} M, {about['dtype']}) on {about['device']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}: {counted(prompts, 'prompt')} "
        f"({', '.join(data['files'])}), up to {arguments['max_new_tokens']} tokens each, medians of "
        f"{counted(arguments['rounds'], 'round')}."
    )
    return textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=indent)


def fill(page: str, folder: Path) -> str:
    """The page with a table between each pair of markers; `folder` contains the page.

    Raises RedrafterError if there are no markers or a file cannot be read.
    """

    def table(match: re.Match[str]) -> str:
        begin, names, end = match.groups()
        several = [_read(folder, name) for name in names.split()]
        return f"{begin}\n{block(*several) if len(several) == 1 else comparison(several)}\n\n{end}"

    new, count = MARKED.subn(table, page)
    if not count:
        raise RedrafterError("There is no <!-- results FILE --> followed by <!-- /results -->.")
    return new


def _read(folder: Path, name: str) -> Results:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise RedrafterError(f"{name} cannot be read: {reason(error)}.") from error


def main(arguments: Sequence[str]) -> None:
    """Fills the page in place; on an error, prints one sentence and exits with status 2."""
    if len(arguments) != 1:
        sentence = "Give one Markdown page, such as README.md."
    else:
        page = Path(arguments[0])
        try:
            page.write_text(fill(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
            return
        except RedrafterError as error:
            sentence = f"{page}: {error}"
        except OSError as error:
            sentence = f"{page} cannot be read or written: {error.strerror}."
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
