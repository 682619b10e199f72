"""Tables of results in a page of Markdown, each from what its marker names: a results.json, or several side by side.

    python -m redrafter.bench.readme README.md

puts them between `<!-- results FILE -->`, FILE as seen from the page's folder, and `<!-- /results -->`.  Promises that
nothing outside the markers is touched.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from redrafter.bench.contenders import ALONE
from redrafter.bench.tables import Results, Table, equal, law, overall, temperatures, times
from redrafter.config import counted
from redrafter.errors import RedrafterError, reason

MARKED = re.compile(r"(<!-- results (\S+(?: \S+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)


def block(results: Results) -> str:
    """A sentence and a table over all prompts, one line for each method and temperature."""
    shapes = {one["method"]: one.get("shape", "") for one in results["methods"]}
    rows = [
        [
            one["method"],
            shapes.get(one["method"], ""),
            law(one["temperature"]),
            f"{one['tokens_per_step']:.2f}" if "tokens_per_step" in one else "",
            f"{one['tokens_per_second']['median']:,.0f}",
            times(one.get("speed_up")),
            equal(one),
        ]
        for one in sorted(overall(results["speed"]), key=lambda one: one["temperature"])
        if one["method"] != ALONE
    ]
    head = ["method", "drafts", "decoding", "tokens per step", "tokens/s", "times as fast", "equal texts"]
    return f"{_measured_on(results)}\n\n{Table(head, rows, names=3).markdown}"


def beside(many: Sequence[Results]) -> str:
    """Sentences and one table over all prompts: how many times as fast each method is, and its tokens per step.

    A column for each of the results and temperature.
    """
    cells: dict[tuple[str, int, float], str] = {}
    columns = [(number, kind) for number, found in enumerate(many, start=1) for kind in temperatures(found["speed"])]
    for number, found in enumerate(many, start=1):
        for one in overall(found["speed"]):
            if "speed_up" in one:
                step = f" ({one['tokens_per_step']:.2f})" if "tokens_per_step" in one else ""
                cells[one["method"], number, one["temperature"]] = f"{one['speed_up']['median']:.2f}{step}"
    names = list(dict.fromkeys(name for name, _, _ in cells))
    rows = [[name, *(cells.get((name, *place), "") for place in columns)] for name in names]
    head = ["method", *(f"{number}: {law(kind)}" for number, kind in columns)]
    told = [f"{number}. {_measured_on(found, '   ').lstrip()}" for number, found in enumerate(many, start=1)]
    return "\n".join([*told, "", Table(head, rows).markdown])


def _measured_on(results: Results, margin: str = "") -> str:
    about, data, asked = results["about"], results["data"], results["asked"]
    prompts = sum(one["prompts"] for one in data["categories"].values())
    versions = about["versions"]
    told = (
        f"{about['model']} ({about['parameters'] / 1e6:,.0f} M, {about['dtype']}) on {about['device']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}: {counted(prompts, 'prompt')} "
        f"({', '.join(data['files'])}), up to {asked['max_new_tokens']} tokens each, medians of "
        f"{counted(asked['rounds'], 'round')}."
    )
    return textwrap.fill(told, 120, initial_indent=margin, subsequent_indent=margin)


def put(page: str, folder: Path) -> str:
    """The page, which lies in a folder, with a block between each pair of markers.

    Raises RedrafterError where there is none, and where a file that one names cannot be read.
    """

    def block_of(found: re.Match[str]) -> str:
        begin, names, end = found.groups()
        many = [_read(folder, name) for name in names.split()]
        return f"{begin}\n{block(*many) if len(many) == 1 else beside(many)}\n\n{end}"

    new, count = MARKED.subn(block_of, page)
    if not count:
        raise RedrafterError("There is no <!-- results FILE --> with <!-- /results --> after it.")
    return new


def _read(folder: Path, name: str) -> Results:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise RedrafterError(f"{name} cannot be read: {reason(error)}.") from error


def main(words: Sequence[str]) -> None:
    """Fills the page that is named in place; exit status 2, with a sentence, where that cannot be."""
    if len(words) != 1:
        sentence = "name one page of Markdown, as README.md."
    else:
        page = Path(words[0])
        try:
            page.write_text(put(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
            return
        except RedrafterError as error:
            sentence = f"{page}: {error}"
        except OSError as error:
            sentence = f"{page} cannot be read or written: {error.strerror}."
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
