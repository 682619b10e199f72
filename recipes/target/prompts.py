"""Writes the held-out prompts of the three categories as JSON lines, for `redrafter bench --prompts`.

    python -m recipes.target.prompts --target OUT/target --data DATA --output prompts.jsonl [--count 12]

Guarantees that each row is tokenized to exactly the tokens that the recipe measures on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.common.answers import prompt_of
from recipes.common.corpus import Corpus, data_folder
from recipes.target.drafters import measured_on
from recipes.target.shape import CATEGORIES, corpus
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from redrafter.data.prompts import prompt_ids


def rows(data: Corpus, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, str]]:
    """A number of prompts per category as text, without those that would be tokenized differently."""
    found = []
    for category, own in measured_on(data, CATEGORIES, tokenizer, count).items():
        for ids in map(prompt_of, own):
            row = {"category": category, "prompt": tokenizer.decode(ids)}
            if prompt_ids(row, tokenizer, category) == ids:
                found.append(row)
    return found


def main() -> None:
    """Parses the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=data_folder, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12, help="of each category")
    given = parser.parse_args()
    found = rows(corpus(given.data), AutoTokenizer.from_pretrained(given.target), given.count)
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    print(f"{len(found)} prompts in {given.output}")


if __name__ == "__main__":
    main()
