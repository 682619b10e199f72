"""Drafted against undrafted decoding from end to end: tokens a second, and why.

    python -m benchmarks.speed --model M --drafter D --data FOLDER [--widths 4 10:21] [--seconds 300] [--transformers]

Run it from the repository's root.  DATA is the folder of recipes/target, of which its three categories are read, or
files of prompts, each a category; `10:21` is a beam width and a node budget.  Prompts are decoded one after another,
greedily and at temperature 1, by one engine without a drafter and with it, in turn, several rounds; figures are medians
of the rounds, ratios of runs in one round.  A Markdown table, then one JSON line.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import product
from typing import Any

import torch
from benchmarks.pace import (
    UNDRAFTED,
    UNTIMED,
    Run,
    Shape,
    about,
    in_rounds,
    parser,
    pooled,
    prompts_of,
    put,
    table,
    timed,
)
from recipes.target.measure import WAYS
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from redrafter import RecurrentDrafter, stream
from redrafter.checking import parting
from redrafter.cli.loading import load_drafter, load_model

TRANSFORMERS = "transformers, compiled"


def ratios(plain: list[Run], drafted: list[Run]) -> dict[str, Any]:
    """What a number of rounds come to; there is one at least."""

    def median(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    gains = [two.speed / one.speed for one, two in zip(plain, drafted, strict=False)]
    per_step = statistics.median(run.tokens_per_step for run in drafted)
    return {
        "tokens per step": round(per_step, 3),
        "tokens/s": median([run.speed for run in drafted], 1),
        "undrafted": median([run.speed for run in plain], 1),
        "speed-up": median(gains, 3),
        "spread": round(max(gains) - min(gains), 3),
        "of tokens per step": round(statistics.median(gains) / per_step, 3),
        "step ms": median([run.step_ms for run in drafted], 3),
        "undrafted step ms": median([run.step_ms for run in plain], 3),
        "rounds": len(gains),
        "MB more": round(median([two.memory - one.memory for one, two in zip(plain, drafted, strict=False)], 0) / 1e6),
    }


def partings(
    model: PreTrainedModel, prompts: list[list[int]], plain: Run, drafted: Run, settings: dict[str, Any]
) -> dict[str, Any]:
    """How many texts are equal, and of the others whether the margin where they part is one of rounding."""
    found = [
        parting(model, prompts, row, text, drafted.texts[row], settings)
        for row, text in plain.texts.items()
        if text != drafted.texts[row]
    ]
    margins = [one.margin / one.rounding for one in found]
    return {
        "equal": f"{len(prompts) - len(found)}/{len(prompts)}",
        "unexplained": sum(not one.explained for one in found),
        "parted": {
            "largest margin, in roundings": round(max(margins), 3) if margins else None,
            "first": min((one.position for one in found), default=None),
        },
    }


class _Clock(BaseStreamer):
    """Times the tokens that transformers writes for one prompt."""

    def __init__(self, run: Run):
        self.run, self.puts, self.last = run, 0, time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, its first token, the steps in which a graph is recorded, then those that count."""
        now = time.perf_counter()
        self.puts += 1
        if self.puts == 2:
            self.run.prompts.append(now - self.last)
        if self.puts > 2 + UNTIMED:
            self.run.times.append(now - self.last)
            self.run.tokens += 1
        self.last = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to do."""


def by_transformers(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> Run:
    """transformers' own greedy decoding with a static cache, whose steps it compiles on a GPU."""
    run = Run()
    for prompt in sorted(prompts, key=len, reverse=True):  # a longer one later would be compiled anew
        ids = torch.tensor([prompt], device=model.device)
        asked = {"do_sample": False, "max_new_tokens": new_tokens, "cache_implementation": "static"}
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=_Clock(run), **asked)
    return run


def main() -> None:
    """Parses the command line, measures all in rounds and says what came of it."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--transformers", action="store_true", help="its own generate, compiled, after all else")
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = options.parse_args()
    end = time.monotonic() + given.seconds
    until = end - 0.3 * given.seconds if given.transformers else end  # compiling takes its time
    model, tokenizer = load_model(given.model, given.dtype, given.device)
    drafter = load_drafter(given.drafter, model)
    asked = prompts_of(given.data, tokenizer, given.prompts)

    def run(prompts: list[list[int]], way: str, drafter: RecurrentDrafter | None, shape: Shape) -> Run:
        told = {
            "compile": given.compile,
            "batch_size": 1,
            "max_new_tokens": given.new_tokens,
            **WAYS[way],
            **shape.settings,
        }
        return timed(stream(model, drafter, prompts, **told))

    plain = Shape(UNDRAFTED, {})
    engines = [(plain, None), *((shape, drafter) for shape in given.widths)]
    first = next(iter(asked.values()))[:2]
    for way in given.ways:  # kernels are built, clocks rise
        in_rounds({("warm-up", way, s.name): partial(run, first, way, d, s) for s, d in engines}, 1, until)
    jobs = {
        (category, way, shape.name): partial(run, prompts, way, drafter, shape)
        for category, prompts in asked.items()
        for way in given.ways
        for shape, drafter in engines
    }
    runs, failed = in_rounds(jobs, given.rounds, until)
    records = []
    for (category, way, name), found in runs.items():
        base = runs[category, way, UNDRAFTED]
        if name == UNDRAFTED or not (base and found):
            continue
        settings = WAYS[way] | {"max_new_tokens": given.new_tokens}
        texts = partings(model, asked[category], base[0], found[0], settings)
        prompt_ms = round(1e3 * statistics.median(one for run in found for one in run.prompts), 1)
        told = {"category": category, "way": way, "width": name}
        records.append(told | ratios(base, found) | {"prompt ms": prompt_ms} | texts)
    for way, shape in product(given.ways, given.widths):
        plain_runs, drafted = (pooled([runs[c, way, name] for c in asked]) for name in (UNDRAFTED, shape.name))
        if len(asked) > 1 and drafted:
            records.append({"category": "all", "way": way, "width": shape.name} | ratios(plain_runs, drafted))
    print(table(records), flush=True)
    compiled = {}
    if given.transformers:
        alone = {
            (category, TRANSFORMERS): partial(by_transformers, model, prompts, given.new_tokens)
            for category, prompts in asked.items()
        }
        longest = max((prompt for prompts in asked.values() for prompt in prompts), key=len)
        in_rounds({(TRANSFORMERS, "warm-up"): partial(by_transformers, model, [longest], given.new_tokens)}, 1, end)
        theirs, more = in_rounds(alone, given.rounds, end)
        failed += more
        compiled = {
            category: round(statistics.median(run.speed for run in found), 1)
            for (category, _), found in theirs.items()
            if found
        }
        print(f"\n{TRANSFORMERS}, tokens/s: {compiled}")
    told = about(model) | {"new tokens": given.new_tokens, "prompts": {name: len(own) for name, own in asked.items()}}
    put(told | {"records": records, TRANSFORMERS: compiled, "failed": failed}, given.output)


if __name__ == "__main__":
    main()
