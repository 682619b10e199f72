"""Prompts as files and text, to token ids.

Promises that a bad line is named by file and number.  Does not know models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.errors import RedrafterError
from redrafter.files import Skip, read_records

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Roles by the names that other formats give them."""


def read_prompts(*sources: str | Path, skip: Skip | None = None) -> list[tuple[str, dict[str, Any]]]:
    """All rows of prompt files with their places (`files.read_records`).  Raises RedrafterError where there is none."""
    records = list(read_records(sources, skip))
    if not records:
        raise RedrafterError(f"{', '.join(map(str, sources))} holds no prompt.")
    return records


def prompt_ids(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a prompt row: `prompt` as plain text, `messages` or `turns` (its first) by the chat template.

    Raises RedrafterError where there is none of them, where it is empty, or where there is no template for it.
    """
    if isinstance(record.get("prompt"), str):
        ids = list(tokenizer(record["prompt"]).input_ids)
        end = tokenizer.eos_token_id
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # some tokenizers close every text
    else:
        ids = list(tokenizer(render(conversation(record, where), tokenizer, where), add_special_tokens=False).input_ids)
    if not ids:
        raise RedrafterError(f"{where}: the prompt is empty.")
    return ids


def render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A chat up to an answer, as text by the tokenizer's template, which names all special tokens itself.

    Raises RedrafterError where there is no template, or where it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RedrafterError(
            f'{where}: the tokenizer has no chat template; give one, where there is --template, or rows with "prompt".'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # jinja raises its own kinds, and the template any of them
        raise RedrafterError(f"{where}: the chat template refuses the messages ({str(error).rstrip('.')}).") from None


def conversation(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The messages of a prompt row, which must end with a turn to answer."""
    messages = messages_of(record, where)[:1] if record.get("turns") else messages_of(record, where)
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        messages = messages[:-1]
    if not messages[-1].get("content"):
        raise RedrafterError(f"{where}: the prompt is empty.")
    return messages


def messages_of(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a row as messages of `role` and `content`.

    They stand under `messages`, under `conversations` (with those keys, or `from` and `value`) or, the user's alone,
    under `turns`.  Raises RedrafterError where there are none or they are of another form.
    """
    if isinstance(record.get("turns"), list) and record["turns"]:
        return [{"role": "user", "content": str(turn)} for turn in record["turns"]]
    messages = record.get("messages") or record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise RedrafterError(f'{where}: a row needs "prompt", "messages", "conversations" or "turns".')
    if all(isinstance(m, dict) and isinstance(m.get("from"), str) for m in messages):
        messages = [
            {"role": SPEAKERS.get(m["from"].lower(), m["from"].lower()), "content": m.get("value")} for m in messages
        ]
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise RedrafterError(f'{where}: every message needs a "role" and a "content".')
    return messages
