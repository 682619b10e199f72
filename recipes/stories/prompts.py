"""Openings of children's stories, as prompts for small models that were trained on such stories.

    python recipes/stories/prompts.py FOLDER

Writes FOLDER/prompts.jsonl (1,136 openings for training) and FOLDER/held_out.jsonl (64 others).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

NAMES = "Lily Tom Ben Anna Sam Mia Max Sara Tim Lucy Jack Zoe Leo Emma Bob Amy".split()
ADJECTIVES = "little big happy sad red small brave kind silly old".split()
CREATURES = "girl boy dog cat bird frog rabbit bear fish mouse".split()
PLACES = "park garden forest house school lake shop farm beach kitchen".split()
OBJECTS = "ball car hat book cake toy box flower kite apple".split()
OPENINGS = [
    "Once upon a time, there was a {a} {t} named {n}.",
    "{n} and {m} were playing in the {p}.",
    "One day, {n} found a {a} {o}.",
    "{n} wanted a new {o}.",
    "There was a {a} {t} who lived in the {p}.",
    "{n} went to the {p} with a {a} {t}.",
    "The {a} {t} saw a {o}.",
    "{n} had a {a} {o}.",
]
HELD_OUT, ALL = 64, 1200


def openings() -> list[str]:
    """The same 1,200 distinct openings every time, in the same random order."""
    draw = random.Random(0)
    found: set[str] = set()
    while len(found) < ALL:
        n, m = draw.sample(NAMES, 2)
        words = {"a": ADJECTIVES, "t": CREATURES, "p": PLACES, "o": OBJECTS}
        opening = draw.choice(OPENINGS)
        found.add(opening.format(n=n, m=m, **{key: draw.choice(kinds) for key, kinds in words.items()}))
    ordered = sorted(found)
    draw.shuffle(ordered)
    return ordered


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": text}) + "\n" for text in openings()]
    (folder / "held_out.jsonl").write_text("".join(rows[:HELD_OUT]))
    (folder / "prompts.jsonl").write_text("".join(rows[HELD_OUT:]))
