"""Training rows: JSON lines to token ids and a mask of the tokens to learn.

Promises that a bad line is named by file and number.  Does not know the target's weights or the drafter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from redrafter.errors import RedrafterError
from redrafter.prompts import read_json_lines


@dataclass(frozen=True)
class Row:
    """One training sequence; `trained[i]` says whether token i is to be learnt."""

    input_ids: list[int]
    trained: list[bool]


def read_rows(files: Iterable[Path], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Row]:
    """All rows of JSONL files, cut to `max_length` tokens.

    A row holds `messages` (the assistant's turns are learnt), `prompt` and `text` (the text is learnt: what
    `redrafter generate --json` writes) or `text` alone (all of it).  Raises RedrafterError for anything else, and where
    not one row has a token to learn.
    """
    rows = []
    for where, record in read_json_lines(files):
        row = _tokenize(record, tokenizer, where)
        rows.append(Row(row.input_ids[:max_length], row.trained[:max_length]))
    if not any(any(row.trained[2:]) for row in rows):
        raise RedrafterError("The data holds no token to learn.")
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """A batch padded right: `input_ids`, `attention_mask` (long) and `trained` (bool), each [B, P]."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    size = int(lengths.max())
    return {
        "input_ids": torch.tensor([row.input_ids + [0] * (size - len(row.input_ids)) for row in rows]),
        "attention_mask": (torch.arange(size) < lengths[:, None]).long(),
        "trained": torch.tensor([row.trained + [False] * (size - len(row.trained)) for row in rows]),
    }


def most_frequent(rows: list[Row], count: int) -> Tensor:
    """The `count` ids that are learnt most often, as a draft vocabulary [count]; ties go to the smaller id.

    Raises RedrafterError where the rows have fewer kinds of tokens to learn.
    """
    learnt = torch.tensor([i for row in rows for i, trained in zip(row.input_ids, row.trained, strict=True) if trained])
    counts = learnt.bincount()
    kinds = int((counts > 0).sum())
    if kinds < count:
        raise RedrafterError(
            f"The data has {kinds} kinds of tokens to learn, fewer than a draft vocabulary of {count}."
        )
    return counts.argsort(descending=True, stable=True)[:count]


def _tokenize(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    if "messages" in record:
        return _conversation(record["messages"], tokenizer, where)
    if not isinstance(record.get("text"), str):
        raise RedrafterError(f'{where}: a row needs "messages" or "text".')
    prompt, text = record.get("prompt", ""), record["text"]
    ids = tokenizer(prompt + text).input_ids
    end = tokenizer.eos_token_id
    if not prompt:
        ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        return Row(ids, [True] * len(ids))
    known = tokenizer(prompt).input_ids
    if known and known[-1] == end:
        known = known[:-1]
    return Row(ids, [i >= len(known) for i in range(len(ids))])


def _conversation(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    """Renders by the tokenizer's own template; the assistant's tokens by its generation markers or by comparison."""
    if not getattr(tokenizer, "chat_template", None):
        raise RedrafterError(f'{where}: the tokenizer has no chat template; give rows with "text" instead.')
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Row(list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]])
        return _by_comparison(messages, tokenizer)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RedrafterError(f"{where}: the messages do not fit the chat template ({error}).") from None
    except Exception as error:  # jinja raises its own kinds, and the template any of them
        raise RedrafterError(f"{where}: the chat template refuses the messages ({error}).") from None


def _by_comparison(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Marks what each assistant turn adds to the rendering of all before it."""

    def ids(count: int, *, prompt: bool) -> list[int]:
        rendered = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt, return_dict=True)
        return list(rendered["input_ids"])

    whole = ids(len(messages), prompt=False)
    trained = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = ids(index, prompt=True), ids(index + 1, prompt=False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise ValueError("it renders a turn differently once others follow")
        trained[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Row(whole, trained)
