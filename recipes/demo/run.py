"""Trains the demo's target and drafter, from data files to the folders that ship: one command, one GPU, 15 minutes.

    python -m recipes.demo.run --data DATA --output OUT [--rivals]

A stage whose `training.json` exists is skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from recipes.common import pretrain
from recipes.common.corpus import data_folder, train_tokenizer
from recipes.demo import cards, drafter, rivals, shape

TARGET, DRAFTER = "redrafter-demo-12m", "drafter"


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=data_folder, required=True, help="folder with the files that README.md names")
    parser.add_argument("--output", type=Path, required=True, help=f"where {TARGET}/ and {DRAFTER}/ are written")
    parser.add_argument("--target-minutes", type=float, default=7.0)
    parser.add_argument("--batch", type=int, default=64, help="windows of 1,024 tokens in a step of the target")
    parser.add_argument("--drafter-epochs", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=15_000, help="prompts of each file that the target answers")
    parser.add_argument("--rivals", action="store_true", help="then also other ways to draft, for as long")
    parser.add_argument("--rival-seconds", type=float, default=rivals.SECONDS, help="of training each of them")
    parser.add_argument("--draft-minutes", type=float, default=2.0, help="of training the draft model on text before")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = shape.corpus(given.data)
    model, head = given.output / TARGET, given.output / DRAFTER
    if not (model / "training.json").exists():
        pretrain.train(
            corpus,
            train_tokenizer(corpus),
            shape.configuration(corpus),
            model,
            peak_rate=shape.PEAK_RATE,
            chat_share=shape.CHAT_SHARE,
            minutes=given.target_minutes,
            batch=given.batch,
            device=device,
            dtype="float32",
        )
    if not (head / "training.json").exists():
        drafter.train(corpus, model, head, epochs=given.drafter_epochs, device=device, limit=given.prompts)
    cards.write(model, head)
    if given.rivals:
        rivals.train(
            corpus,
            model,
            given.output,
            seconds=given.rival_seconds,
            minutes=given.draft_minutes,
            batch=given.batch,
            device=device,
            limit=given.prompts,
        )
        cards.write_rivals(model, given.output)


if __name__ == "__main__":
    main()
