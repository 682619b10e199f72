"""Tables of results in a page of Markdown, each from a results.json that its marker names.

    python -m redrafter.bench.readme README.md

puts them between `<!-- results FILE -->`, FILE as seen from the page's folder, and `<!-- /results -->`.  Promises that
nothing outside the markers is touched.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

from redrafter.bench.contenders import ALONE
from redrafter.bench.tables import Results, Table, counted, equal, law, overall, times
from redrafter.errors import RedrafterError, reason

MARKED = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def block(results: Results) -> str:
    """A sentence and a table over all prompts, one line for each method and temperature."""
    about, data, asked = results["about"], results["data"], results["asked"]
    prompts = sum(one["prompts"] for one in data["categories"].values())
    versions = about["versions"]
    told = (
        f"{about['model']} ({about['parameters'] / 1e6:,.0f} M, {about['dtype']}) on {about['device']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}: {counted(prompts, 'prompt')} "
        f"({', '.join(data['files'])}), up to {asked['max_new_tokens']} tokens each, medians of "
        f"{counted(asked['rounds'], 'round')}."
    )
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
    return f"{textwrap.fill(told, 120)}\n\n{Table(head, rows, names=3).markdown}"


def put(page: str, folder: Path) -> str:
    """The page, which lies in a folder, with a block between each pair of markers.

    Raises RedrafterError where there is none, and where a file that one names cannot be read.
    """

    def block_of(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        try:
            results = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RedrafterError(f"{name} cannot be read: {reason(error)}.") from error
        return f"{begin}\n{block(results)}\n\n{end}"

    new, count = MARKED.subn(block_of, page)
    if not count:
        raise RedrafterError("There is no <!-- results FILE --> with <!-- /results --> after it.")
    return new


if __name__ == "__main__":
    (path,) = map(Path, sys.argv[1:])
    try:
        filled = put(path.read_text(encoding="utf-8"), path.parent)
    except RedrafterError as error:
        sys.exit(f"{path}: {error}")
    path.write_text(filled, encoding="utf-8")
