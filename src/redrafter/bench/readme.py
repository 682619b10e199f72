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
from redrafter.bench.tables import Results, Table, equal, headline, law, overall, temperatures, times
from redrafter.core.shapes import counted
from redrafter.errors import RedrafterError, reason

MARKED = re.compile(r"(<!-- results (\S+(?: \S+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)


def block(results: Results) -> str:
    """A sentence and a table over all prompts, one line for each method and temperature.

    Complete calls, where they were measured, come first: a column for each length of answer.
    """
    shapes = {one["method"]: one.get("shape", "") for one in results["methods"]}
    calls = {(one["method"], one["temperature"], one["new_tokens"]): one for one in results.get("calls", [])}
    lengths = sorted({new_tokens for _, _, new_tokens in calls})
    rows = [
        [
            one["method"],
            shapes.get(one["method"], ""),
            law(one["temperature"]),
            *(times(calls.get((one["method"], one["temperature"], n), {}).get("speed_up")) for n in lengths),
            f"{one['tokens_per_step']:.2f}" if "tokens_per_step" in one else "",
            f"{one['tokens_per_second']['median']:,.0f}",
            times(one.get("speed_up")),
            equal(one),
        ]
        for one in sorted(overall(results["speed"]), key=lambda one: one["temperature"])
        if one["method"] != ALONE
    ]
    alone = ["tokens per step", "tokens/s", "decoding alone" if lengths else "times as fast", "equal texts"]
    head = ["method", "drafts", "decoding", *(f"end to end, {n} tokens" for n in lengths), *alone]
    told = "\n".join([_measured_on(results), *([_end_to_end(results)] if lengths else [])])
    return f"{told}\n\n{Table(head, rows, names=3).markdown}"


def _end_to_end(results: Results) -> str:
    """What the columns of complete calls say."""
    requests = max(one["requests"] for one in results["calls"])
    told = (
        f"End to end: complete calls of `generate` ({counted(requests, 'prompt')}, one a call, end tokens off so that "
        "every answer has the length that is named), undrafted time over this method's; decoding alone leaves out the "
        "prompt, and on CUDA the first steps."
    )
    return textwrap.fill(told, 120)


def beside(many: Sequence[Results]) -> str:
    """Sentences and one table over all prompts: how many times as fast each method is, and its tokens per step.

    A column for each of the results and temperature, after one of complete calls where those were measured.
    """
    cells: dict[tuple[str, str], str] = {}
    columns: list[str] = []
    for number, found in enumerate(many, start=1):
        for kind in temperatures(found["speed"]):
            title = f"{number}: {law(kind)}"
            calls = headline(found, kind)
            if calls:
                columns.append(f"{title}, end to end, {calls[0]['new_tokens']} tokens")
                own = [one for one in calls if "speed_up" in one]
                cells |= {(one["method"], columns[-1]): f"{one['speed_up']['median']:.2f}" for one in own}
                title = f"{title}, decoding alone"
            columns.append(title)
            for one in overall(found["speed"]):
                if "speed_up" in one and one["temperature"] == kind:
                    step = f" ({one['tokens_per_step']:.2f})" if "tokens_per_step" in one else ""
                    cells[one["method"], title] = f"{one['speed_up']['median']:.2f}{step}"
    names = list(dict.fromkeys(name for name, _ in cells))
    rows = [[name, *(cells.get((name, title), "") for title in columns)] for name in names]
    head = ["method", *columns]
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
