"""The table of results in a README, from a results.json that lies beside the code.

    python -m redrafter.bench.readme docs/bench/results.json README.md

Promises that nothing outside the two markers is touched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from redrafter.bench.contenders import ALONE
from redrafter.bench.tables import Results, Table, equal, law, overall, times
from redrafter.errors import RedrafterError

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def block(results: Results) -> str:
    """A sentence and a table over all prompts, one line for each method and temperature."""
    about, data, asked = results["about"], results["data"], results["asked"]
    prompts = sum(one["prompts"] for one in data["categories"].values())
    versions = about["versions"]
    told = (
        f"{about['model']} ({about['parameters'] / 1e6:,.0f} M, {about['dtype']}) on {about['device']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}: {prompts} prompts of "
        f"{', '.join(data['files'])}, up to {asked['max_new_tokens']} tokens each, medians of {asked['rounds']} rounds."
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
    return f"{told}\n\n{Table(head, rows, names=3).markdown}"


def put(readme: str, results: Results) -> str:
    """The README with this block between its markers.  Raises RedrafterError where they are not there once each."""
    if not (readme.count(BEGIN) == readme.count(END) == 1 and readme.index(BEGIN) < readme.index(END)):
        raise RedrafterError(f"The README needs one {BEGIN} and after it one {END}.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block(results)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    source, page = map(Path, sys.argv[1:])
    page.write_text(put(page.read_text(encoding="utf-8"), json.loads(source.read_text(encoding="utf-8"))), "utf-8")
