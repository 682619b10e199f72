"""Converts rows to the token ids of their prompts.

Errors name the file and line of the row.  Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.data.files import Skip, read_records
from redrafter.data.messages import Message, text_of
from redrafter.data.rows import Chat, Text, parse_row
from redrafter.errors import RedrafterError, reason


def read_prompts(
    *sources: str | Path, skip: Skip | None = None, limit: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """The first `limit` rows of prompt files, with their locations (`files.read_records`).

    Raises RedrafterError if there is no row.
    """
    records = list(islice(read_records(sources, skip), limit))
    if not records:
        raise RedrafterError(f"{', '.join(map(str, sources))} holds no prompt.")
    return records


def prompt_ids(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    chat: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Token ids of a row's prompt: plain text, or a chat up to the message to generate, by the chat template.

    `chat` and `template_kwargs` as in `rows.parse_row`.  Raises RedrafterError if the row has no prompt, if the prompt
    is empty, if the tokenizer has no chat template, or if an id is not below `vocab_size`.
    """
    row = parse_row(record, where, chat=chat, template_kwargs=template_kwargs)
    if isinstance(row, Text):
        ids = _text_ids(row, tokenizer, where)
    else:
        ids = encode(render(up_to_answer(row, where), tokenizer, where), tokenizer)
    if not ids:
        raise RedrafterError(f"{where}: the prompt is empty.")
    check_ids(ids, vocab_size, where)
    return ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of text that already contains all special tokens, such as a rendered chat."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def check_ids(ids: Sequence[int], vocab_size: int | None, where: str) -> None:
    """Raises RedrafterError if an id is outside the model's vocabulary."""
    largest = max(ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise RedrafterError(
            f"{where}: the tokenizer produces token {largest}, outside the model's vocabulary of {vocab_size}: use the "
            "model's own tokenizer, or resize the model's embeddings."
        )


def up_to_answer(chat: Chat, where: str) -> Chat:
    """A chat without its final answer; of a chat with only user messages, the first of them.

    Raises RedrafterError if there is no message to answer, or if it is empty.
    """
    messages = chat.messages
    if chat.only_user:
        messages = messages[: 1 + next(i for i, one in enumerate(messages) if one["role"] == "user")]
    elif messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    check_has_question(messages, where)
    return replace(chat, messages=messages)


def check_has_question(messages: Sequence[Message], where: str) -> None:
    """Raises RedrafterError if all messages are the system's or the assistant's, or if a user message is empty."""
    if all(one["role"] in ("system", "developer", "assistant") for one in messages):
        raise RedrafterError(f"{where}: there is no message to answer.")
    if any(one["role"] == "user" and not text_of(one) for one in messages):
        raise RedrafterError(f"{where}: the prompt is empty.")


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str, *, prompt: bool = True) -> str:
    """A chat as text by the tokenizer's chat template; `prompt` adds the generation prompt.

    Raises RedrafterError if there is no template, or if it rejects the chat.
    """
    if any(isinstance(one.get("content"), list) for one in chat.messages):
        return _render_parts(chat, tokenizer, where, prompt=prompt)
    return str(apply_template(chat, tokenizer, where, add_generation_prompt=prompt, tokenize=False))


def apply_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str, **options: Any) -> Any:
    """Calls the tokenizer's `apply_chat_template`.  Raises RedrafterError."""
    if not getattr(tokenizer, "chat_template", None):
        raise RedrafterError(
            f"{where}: the tokenizer has no chat template; give one, if the command has --template, or rows of plain "
            'text ("prompt", or "text" to train on).'
        )
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, documents=chat.documents, **options, **chat.template_kwargs
        )
    except Exception as error:  # jinja has its own exceptions, and a template may raise any other
        raise RedrafterError(f"{where}: the chat template rejects the messages ({reason(error)}).") from None


def _render_parts(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str, *, prompt: bool) -> str:
    """Renders a chat in which some contents are lists of text parts.

    Many templates only support text and would print the list.  So a list of one part is replaced by its text.  Lists of
    several parts are passed to the template only if it renders a list of one part like its text.
    """

    def rendered(messages: list[Message]) -> str:
        return render(replace(chat, messages=messages), tokenizer, where, prompt=prompt)

    as_text = [{**one, "content": text_of(one)} if "content" in one else one for one in chat.messages]
    if all(len(one["content"]) == 1 for one in chat.messages if isinstance(one.get("content"), list)):
        return rendered(as_text)
    as_parts = [
        {**new, "content": [{"type": "text", "text": new["content"]}]} if isinstance(one.get("content"), list) else new
        for one, new in zip(chat.messages, as_text, strict=True)
    ]
    options: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": False}
    try:
        reads_parts = apply_template(replace(chat, messages=as_parts), tokenizer, where, **options) == rendered(as_text)
    except RedrafterError:
        reads_parts = False
    if not reads_parts:
        raise RedrafterError(
            f"{where}: a message has several text parts, and the chat template only supports text: join the parts."
        )
    return str(apply_template(chat, tokenizer, where, **options))


def _text_ids(row: Text, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    if row.prompt is None:
        raise RedrafterError(f'{where}: the row has "text" and no "prompt" to continue.')
    ids = list(tokenizer(row.prompt).input_ids)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers add an end token
