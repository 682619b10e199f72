"""Compares drafters of one target, from data files to a table of results.

    python -m recipes.target.run --data DATA --output OUT

A finished stage is skipped: the tokenizer and the target if their folders exist, a drafter if a `results-*.json`
contains it.  Several processes, each with one GPU, share the work with `--part`.
"""

from __future__ import annotations

import time
from types import ModuleType

from recipes.demo import shape as demo
from recipes.target import drafters, shape, stages


def main() -> None:
    """Parses the command line and runs the stages."""
    begin = time.monotonic()
    parser = stages.options(__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=["target", "demo"], default="target", help="whose files and categories")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 50], help="beams to measure with")
    parser.add_argument("--drafter-steps", type=int, default=250)
    parser.add_argument("--drafter-batch", type=int, default=16, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--variants", nargs="+", default=[""], help="only drafters whose names hold one of these")
    parser.add_argument("--seconds", type=float, help="from the start, after which no drafter is begun")
    given = parser.parse_args()
    data: ModuleType = {"target": shape, "demo": demo}[given.corpus]
    corpus = data.corpus(given.data)
    if given.only_tokenizer:
        stages.tokenizer(given, corpus)
        return
    target = stages.target(given, corpus)
    part, parts = given.part
    plan = drafters.Plan(
        steps=given.drafter_steps,
        batch=given.drafter_batch,
        prompts=given.prompts,
        held_out=given.held_out,
        new_tokens=given.new_tokens,
        widths=given.widths,
        part=part,
        parts=parts,
        seconds=given.seconds,
        only=given.variants,
    )
    if not drafters.compare(corpus, data.CATEGORIES, getattr(data, "SHARES", {}), target, given.output, plan, begin):
        raise SystemExit(f"Not every drafter could be trained: see results-{part}.json.")


if __name__ == "__main__":
    main()
