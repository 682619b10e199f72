"""Prompts from conversations, and the target's answers to them.

Guarantees that held-out rows are not used in training.  Uses only the package's public interface.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recipes.common.corpus import Corpus, is_held_out, rows
from transformers import PreTrainedModel

from redrafter import generate
from redrafter.data.examples import Row, most_frequent

TURNS = 2  # answers asked for in one dialogue
PROMPT, ANSWER = 512, 160  # tokens at most
SLOTS = 2**19  # of the cache of one call on a GPU: 20 GB for 12 layers of width 768 in bfloat16
CPU_ROWS = 32  # decoded together


def contexts(
    corpus: Corpus, name: str, tokenizer, *, held_out: bool | None, count: int | None = None, seed: int = 0
) -> list[Row]:
    """Conversations of one file up to a turn of the assistant, shuffled; that turn, if present, is `trained`.

    `held_out=None` takes all rows, for files that are only used in evaluation.  At most `count` rows.
    """
    draw = random.Random(seed)
    places: list[tuple[list[dict], int]] = []
    for row in rows(corpus.folder, name):
        if held_out is not None and is_held_out(row) != held_out:
            continue
        messages = row.get("messages") or [{"role": "user", "content": row["turns"][0]}]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] or [len(messages)]
        places += [(messages, turn) for turn in draw.sample(turns, min(TURNS, len(turns)))]
    draw.shuffle(places)
    found: list[Row] = []
    for messages, turn in places:
        if len(found) == count:
            break
        ids = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=True)
        prompt = list(ids["input_ids"])
        own = [message["content"] + tokenizer.eos_token for message in messages[turn : turn + 1]]
        answer = tokenizer("".join(own), add_special_tokens=False).input_ids[:ANSWER]
        if len(prompt) <= PROMPT:
            found.append(answered(prompt, answer))
    return found


def answered(prompt: list[int], answer: list[int]) -> Row:
    """A prompt and its answer, which is the only trained part."""
    return Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def prompt_of(row: Row) -> list[int]:
    """The tokens before the turn to be answered."""
    return [token for token, trained in zip(row.input_ids, row.trained, strict=True) if not trained]


def draft_vocabulary(rows: list[Row], count: int) -> torch.Tensor:
    """The `count` most frequent trained tokens, or all of them if they are fewer."""
    kinds = {token for row in rows for token, trained in zip(row.input_ids, row.trained, strict=True) if trained}
    return most_frequent(rows, min(count, len(kinds)))


def stored(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers as JSON values."""
    return [(prompt := prompt_of(row), row.input_ids[len(prompt) :]) for row in rows]


def restored(told: list[tuple[list[int], list[int]]]) -> list[Row]:
    """The inverse of `stored`."""
    return [answered(*pair) for pair in told]


def put(file: Path, told: Any) -> None:
    """Writes a JSON file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(told))
    os.replace(part, file)


def answers(model: PreTrainedModel, asked: list[Row], *, sampled: bool = False) -> list[Row]:
    """The rows sorted by prompt length, with the target's answers: greedy, or sampled at temperature 1."""
    prompts = sorted(map(prompt_of, asked), key=len)
    batch = None if model.device.type == "cuda" else CPU_ROWS
    new: list[list[int]] = []
    for part in [prompts] if batch else _calls(prompts):
        law: dict[str, Any] = {"do_sample": False}
        if sampled:
            law = {"do_sample": True, "temperature": 1.0, "seed": list(range(len(new), len(new) + len(part)))}
        new += generate(model, None, part, max_new_tokens=ANSWER, batch_size=batch, **law).new_tokens if part else []
    return [answered(prompt, answer) for prompt, answer in zip(prompts, new, strict=True)]


def _calls(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Batches of rows within SLOTS; a step on a GPU costs launches rather than rows."""
    part: list[list[int]] = []
    for prompt in prompts:  # the longest comes last
        if (len(part) + 1) * (len(prompt) + ANSWER) > SLOTS:
            yield part
            part = []
        part.append(prompt)
    yield part
