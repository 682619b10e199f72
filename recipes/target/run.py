"""The benchmark target and its drafters, from data files to a table of results: one command, one GPU.

    python -m recipes.target.run --data DATA --output OUT

A stage that is done is not run again: the target is there where its `training.json` is, a drafter where
`results.json` names it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from recipes.common import pretrain
from recipes.target import drafters, shape


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the files that README.md names")
    parser.add_argument("--output", type=Path, required=True, help="where target/ and the drafters are written")
    parser.add_argument("--family", default="llama", help="llama, qwen3, mistral, … of the same shape")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training the target")
    parser.add_argument("--batch", type=int, default=32, help="windows of 1,024 tokens in a step")
    parser.add_argument("--width", type=int, default=768, help="of the target")
    parser.add_argument("--layers", type=int, default=12, help="of the target")
    parser.add_argument("--prompts", type=int, default=3_000, help="prompts of each file to learn from")
    parser.add_argument("--held-out", type=int, default=64, help="prompts of each category to measure on")
    parser.add_argument("--drafter-steps", type=int, default=300)
    parser.add_argument("--drafter-batch", type=int, default=16, help="packed rows of 1,024 tokens in a step")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus, target = shape.corpus(given.data), given.output / "target"
    if not (target / "training.json").exists():
        pretrain.train(
            corpus,
            shape.configuration(corpus, given.family, given.width, given.layers),
            target,
            peak_rate=shape.PEAK_RATE,
            chat_share=1.0,
            minutes=given.minutes,
            batch=given.batch,
            device=device,
            dtype="bfloat16",
        )
    drafters.compare(
        corpus,
        target,
        given.output,
        steps=given.drafter_steps,
        batch=given.drafter_batch,
        prompts=given.prompts,
        held_out=given.held_out,
    )


if __name__ == "__main__":
    main()
