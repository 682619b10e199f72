"""Prompts from conversations, and what the target answers to them.

Promises that nothing held out is answered in training.  Uses the package as any user would.
"""

from __future__ import annotations

import random

from recipes.common.corpus import Corpus, is_held_out, rows
from transformers import PreTrainedModel

from redrafter import generate
from redrafter.training.data import Row

TURNS = 2  # answers asked for in one dialogue
PROMPT, ANSWER = 512, 160  # tokens at most


def contexts(corpus: Corpus, name: str, tokenizer, *, held_out: bool | None, seed: int = 0) -> list[Row]:
    """Conversations of one file up to a turn of the assistant, shuffled; that turn, where there is one, is `trained`.

    `held_out=None` takes every row: of files that are there to be evaluated on.
    """
    draw = random.Random(seed)
    found = []
    for row in rows(corpus.folder, name):
        if held_out is not None and is_held_out(row) != held_out:
            continue
        messages = row.get("messages") or [{"role": "user", "content": row["turns"][0]}]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] or [len(messages)]
        for turn in draw.sample(turns, min(TURNS, len(turns))):
            ids = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=True)
            prompt = list(ids["input_ids"])
            own = [message["content"] + tokenizer.eos_token for message in messages[turn : turn + 1]]
            answer = tokenizer("".join(own), add_special_tokens=False).input_ids[:ANSWER]
            if len(prompt) <= PROMPT:
                found.append(Row(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    draw.shuffle(found)
    return found


def prompt_of(row: Row) -> list[int]:
    """What stands before the turn to be answered."""
    return [token for token, trained in zip(row.input_ids, row.trained, strict=True) if not trained]


def answers(model: PreTrainedModel, asked: list[Row], batch: int, **law) -> list[Row]:
    """The same rows with the target's own answers, which are learnt."""
    prompts = sorted(map(prompt_of, asked), key=len)
    new = generate(model, None, prompts, max_new_tokens=ANSWER, batch_size=batch, **law).new_tokens if prompts else []
    return [Row(p + n, [False] * len(p) + [True] * len(n)) for p, n in zip(prompts, new, strict=True)]
