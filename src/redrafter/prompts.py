"""Prompts as files and text, to token ids.

Promises that a bad line is named by file and number.  Does not know models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.errors import RedrafterError


def read_json_lines(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object of the files with its place, `FILE line N`; blank lines are passed over.

    Raises RedrafterError for a file that cannot be read and for a line that is not a JSON object.
    """
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{file} line {number}"
                        yield where, _json_object(line, where)
        except OSError as error:
            raise RedrafterError(f"{file} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise RedrafterError(f"{file} is not UTF-8 text.") from None


def read_prompts(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a prompts file with their places.  Raises RedrafterError where there is none."""
    records = list(read_json_lines([file]))
    if not records:
        raise RedrafterError(f"{file} holds no prompt.")
    return records


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RedrafterError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(record, dict):
        raise RedrafterError(f"{where} is not a JSON object.")
    return record


def prompt_ids(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a prompt row: `prompt` as plain text, `messages` or `turns` (its first) by the chat template.

    Raises RedrafterError where there is none of them, where it is empty, or where there is no template for it.
    """
    if isinstance(record.get("prompt"), str):
        ids = list(tokenizer(record["prompt"]).input_ids)
        end = tokenizer.eos_token_id
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # some tokenizers close every text
    else:
        messages = conversation(record, where)
        if not getattr(tokenizer, "chat_template", None):
            raise RedrafterError(f'{where}: the tokenizer has no chat template; give rows with "prompt" instead.')
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    if not ids:
        raise RedrafterError(f"{where}: the prompt is empty.")
    return ids


def conversation(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The messages of a prompt row, which must end with a turn to answer."""
    if isinstance(record.get("turns"), list) and record["turns"]:
        messages: Any = [{"role": "user", "content": str(record["turns"][0])}]
    else:
        messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RedrafterError(f'{where}: a prompt row needs "prompt", "messages" or "turns".')
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise RedrafterError(f'{where}: every message needs a "role" and a "content".')
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        messages = messages[:-1]
    if not messages[-1].get("content"):
        raise RedrafterError(f"{where}: the prompt is empty.")
    return messages  # type: ignore[no-any-return]
