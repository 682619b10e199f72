"""Drafters compared on one target, from data files to a table of results.

    python -m recipes.target.run --data DATA --output OUT

A stage that is done is not run again: the tokenizer and the target are there where their folders are, a drafter where a
`results-*.json` names it.  Several processes, each with a GPU of its own, share the work by `--part`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import ModuleType

import torch
from recipes.common import pretrain
from recipes.common.corpus import train_tokenizer
from recipes.demo import shape as demo
from recipes.target import drafters, shape
from transformers import AutoTokenizer


def main() -> None:
    """Parses the command line and runs the stages."""
    begin = time.monotonic()
    given = _arguments()
    data: ModuleType = {"target": shape, "demo": demo}[given.corpus]
    corpus = data.corpus(given.data)
    target = given.target or given.output / "target"
    tokenizer = given.tokenizer or given.output / "tokenizer"
    part, parts = given.part
    if given.target and not (target / "config.json").exists():
        raise SystemExit(f"{target} holds no model.")
    if not given.target and part == 0 and not tokenizer.exists():
        train_tokenizer(corpus).save_pretrained(tokenizer)
    if given.only_tokenizer:
        return
    if not given.target and part == 0 and not (target / "training.json").exists():
        pretrain.train(
            corpus,
            AutoTokenizer.from_pretrained(tokenizer),
            shape.configuration(corpus, given.family, given.width, given.layers),
            target,
            peak_rate=shape.PEAK_RATE,
            chat_share=1.0,
            minutes=given.minutes,
            batch=given.batch,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            dtype="bfloat16",
        )
    if not given.target:
        drafters.awaited(target / "training.json")  # written last of all
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the files that README.md names")
    parser.add_argument("--output", type=Path, required=True, help="where all is written")
    parser.add_argument("--target", type=Path, help="a model's folder; by default one is trained in OUTPUT/target")
    parser.add_argument("--corpus", choices=["target", "demo"], default="target", help="whose files and categories")
    parser.add_argument("--tokenizer", type=Path, help="of the target to be trained; by default OUTPUT/tokenizer")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop when it is made")
    parser.add_argument("--family", default="llama", help="llama, qwen3, mistral, … of the same shape")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training the target")
    parser.add_argument("--batch", type=int, default=32, help="windows of 1,024 tokens in a step of the target")
    parser.add_argument("--width", type=int, default=768, help="of the target")
    parser.add_argument("--layers", type=int, default=12, help="of the target")
    parser.add_argument("--prompts", type=int, default=2_000, help="of each file to learn from")
    parser.add_argument("--held-out", type=int, default=64, help="prompts of each category to measure on")
    parser.add_argument("--new-tokens", type=int, default=128, help="written to each of those")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 50], help="beams to measure with")
    parser.add_argument("--drafter-steps", type=int, default=250)
    parser.add_argument("--drafter-batch", type=int, default=16, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--variants", nargs="+", default=[""], help="only drafters whose names hold one of these")
    parser.add_argument("--seconds", type=float, help="from the start, after which no drafter is begun")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="this process's share, from 0/N")
    return parser.parse_args()


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise argparse.ArgumentTypeError(f"{text} is not a part, such as 0/2")
    return int(part), int(parts)


if __name__ == "__main__":
    main()
