"""Drafted against undrafted decoding of several rows together: tokens a second by the number of rows.

    python -m benchmarks.batches --model M --drafter D --data FOLDER [--rows 1 2 4 8 16 32 64] [--widths 4 10:21]

Run it from the repository's root; options as of benchmarks.speed.  Rows do not end before they have all their tokens,
and steps count while all of them are alive.  The categories' prompts are mixed, and repeated where they are too few.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import chain, cycle, islice, zip_longest

from benchmarks.pace import UNDRAFTED, Run, Shape, about, in_rounds, parser, prompts_of, put, table, timed
from benchmarks.speed import ratios
from recipes.target.measure import WAYS

from redrafter import RecurrentDrafter, stream
from redrafter.cli.loading import load_drafter, load_model


def main() -> None:
    """Parses the command line, measures all in rounds and says what came of it."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    options.add_argument("--way", choices=list(WAYS), default="greedy")
    given = options.parse_args()
    until = time.monotonic() + given.seconds
    model, tokenizer = load_model(given.model, given.dtype, given.device)
    drafter = load_drafter(given.drafter, model)
    mixed = chain(*zip_longest(*prompts_of(given.data, tokenizer, given.prompts).values()))
    asked = list(islice(cycle([prompt for prompt in mixed if prompt is not None]), max(given.rows)))

    def run(rows: int, drafter: RecurrentDrafter | None, shape: Shape) -> Run:
        told = {
            "compile": given.compile,
            "max_new_tokens": given.new_tokens,
            "eos_token_id": (),
            **WAYS[given.way],
            **shape.settings,
        }
        return timed(stream(model, drafter, asked[:rows], **told), rows)

    engines = [(Shape(UNDRAFTED, {}), None), *((shape, drafter) for shape in given.widths)]
    jobs = {(rows, shape.name): partial(run, rows, d, shape) for rows in given.rows for shape, d in engines}
    in_rounds({("warm-up", *name): job for name, job in jobs.items() if name[0] == given.rows[0]}, 1, until)
    runs, failed = in_rounds(jobs, given.rounds, until)
    records = [
        {"rows": rows, "width": name} | ratios(runs[rows, UNDRAFTED], found)
        for (rows, name), found in runs.items()
        if name != UNDRAFTED and found and runs[rows, UNDRAFTED]
    ]
    print(table(records))
    told = about(model) | {"way": given.way, "new tokens": given.new_tokens}
    put(told | {"records": records, "failed": failed}, given.output)


if __name__ == "__main__":
    main()
