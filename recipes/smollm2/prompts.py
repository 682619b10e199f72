"""Prompts for the drafter of SmolLM2-135M-Instruct, from public data whose licences permit sharing trained weights.

    python -m recipes.smollm2.prompts --data DATA --output FOLDER

Writes FOLDER/prompts.jsonl, in random order with a fixed seed, and FOLDER/held_out.jsonl with prompts of the same kinds
that share no row with it.  Reads only prompts, never answers; README.md names the files and their licences.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipes.common.corpus import data_folder, is_held_out, rows

FOLLOW_UPS = (
    "Rewrite your answer in half as many words.",
    "Explain your answer step by step.",
    "Give me another example.",
    "Write that again for a ten-year-old.",
    "List the main points of your answer.",
    "What would a critic say about your answer?",
    "Is that correct? Check it carefully.",
    "Translate your answer into Spanish.",
)
"""Second turns of a chat."""

ABOUT_TEXT = (
    "Summarize the following text in a few sentences.\n\n{text}",
    "{text}\n\nSummarize the text above.",
    "Read this passage and list its most important points.\n\n{text}",
    "Write three questions about the following text and answer them.\n\n{text}",
    "Using only the text below, explain what it is about and what the reader should do or know.\n\n{text}",
    "Translate the following text into French.\n\n{text}",
    "Rewrite the following text in simple words.\n\n{text}",
    "Correct any mistakes in this text and return the corrected text.\n\n{text}",
    "Extract all names, numbers and dates from this text as a list.\n\n{text}",
    "What is the main idea of this text?\n\n{text}",
)

ABOUT_CODE = (
    "Explain what this code does.\n\n```python\n{text}\n```",
    "Write a docstring for each function in this code.\n\n```python\n{text}\n```",
    "Find a bug in this code, or say that there is none, and return the corrected code.\n\n```python\n{text}\n```",
    "Add comments to this code.\n\n```python\n{text}\n```",
    "Complete this Python code.\n\n{text}",
)

TEXT_CHARACTERS = (400, 2400)
"""Shortest and longest passage of a text."""

FOLLOWED = 0.4
"""Share of chats that have a second turn."""

DIALOGUE_TURNS = 3
"""User turns that are kept of a dialogue."""


def instructions(folder: Path, name: str, draw: random.Random) -> Iterator[tuple[dict, dict]]:
    """The first turn of every chat of a file, some with a second turn."""
    for row in rows(folder, name):
        asked = row["messages"][0]["content"].strip()
        if asked:
            more = [draw.choice(FOLLOW_UPS)] if draw.random() < FOLLOWED else []
            yield row, {"turns": [asked, *more]}


def dialogues(folder: Path, name: str, draw: random.Random) -> Iterator[tuple[dict, dict]]:
    """The first turns of the user."""
    for row in rows(folder, name):
        turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
        yield row, {"turns": turns[:DIALOGUE_TURNS]}


def passages(folder: Path, name: str, draw: random.Random, tasks: tuple[str, ...]) -> Iterator[tuple[dict, dict]]:
    """Tasks about passages that begin at a line of a text."""
    for row in rows(folder, name):
        lines = row["text"].splitlines(keepends=True)
        for _ in range(1 + len(row["text"]) // 40_000):
            start = draw.randrange(max(1, len(lines)))
            size = draw.randint(*TEXT_CHARACTERS)
            text = "".join(lines[start : start + 200])[:size].strip()
            if len(text) >= TEXT_CHARACTERS[0]:
                yield row, {"turns": [draw.choice(tasks).format(text=text)]}


Source = Callable[[Path, str, random.Random], Iterator[tuple[dict, dict]]]

SOURCES: dict[str, tuple[Source, int]] = {
    "gpteacher": (instructions, 14_000),
    "gsm8k_train": (instructions, 4_000),
    "sgd": (dialogues, 1_500),
    "cpp_docs": (lambda *given: passages(*given, ABOUT_TEXT), 2_500),
    "books": (lambda *given: passages(*given, ABOUT_TEXT), 1_500),
    "python_stdlib": (lambda *given: passages(*given, ABOUT_CODE), 800),
}
"""How prompts are made of each file, and the largest number of them."""

HELD_OUT = 16
"""Prompts of each file that are kept for measuring."""


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=data_folder, required=True, help="folder with the files that README.md names")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts of each file")
    given = parser.parse_args()
    prompts: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for name, (source, most) in SOURCES.items():
        draw = random.Random(name)
        pairs = list(source(given.data, name, draw))
        draw.shuffle(pairs)
        kept = [prompt | {"category": name} for row, prompt in pairs if is_held_out(row)][:HELD_OUT]
        used = [prompt | {"category": name} for row, prompt in pairs if not is_held_out(row)]
        held_out += kept
        prompts += used[: int(most * given.share)]
    random.Random(0).shuffle(prompts)
    given.output.mkdir(parents=True, exist_ok=True)
    for file, found in (("prompts", prompts), ("held_out", held_out)):
        (given.output / f"{file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
        print(f"{file}.jsonl: {len(found):,} prompts")


if __name__ == "__main__":
    main()
