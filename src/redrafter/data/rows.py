"""Rows of data files: one reader for every command.

`parse_row` turns a row, a JSON object, into a `Chat` (messages for the chat template) or a `Text` (plain text).  It
raises RedrafterError for a row that has no known format or that can be read in two ways.  Does not know tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from redrafter.data.messages import Message, read_messages, text_of
from redrafter.errors import RedrafterError

FORMATS = '"messages", "conversations", "turns", "prompt", "instruction" or "text"'

_CHATS = ("messages", "conversations", "conversation")
_ANSWERS = ("completion", "response", "chosen")
_SYSTEM = ("system", "system_prompt")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
_TEXT = (*_CHATS, *_ANSWERS, *_SYSTEM, *_TEMPLATE, "turns", "prompt", "instruction", "text", "rejected")
_TOKENS = ("input_ids", "loss_mask", "continuations", "finish_reasons")
_RESERVED = {
    "messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip
"""Arguments of `apply_chat_template` that are not variables of the template."""


@dataclass(frozen=True)
class Chat:
    """A conversation and all other inputs of its chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    given: int = 0
    """Messages of the prompt; the assistant's turns among them are not learned."""
    only_user: bool = False
    """Whether the row holds user turns alone (`turns`), each of which is to be answered."""

    def first(self, count: int) -> Chat:
        """The same chat up to its first `count` messages."""
        return replace(self, messages=self.messages[:count])

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns that answer somebody.  An assistant's greeting is not one of them."""
        others = [i for i, one in enumerate(self.messages) if one["role"] not in ("system", "developer", "assistant")]
        begin = others[0] if others else len(self.messages)
        return [i for i, one in enumerate(self.messages) if one["role"] == "assistant" and i > begin]

    @property
    def learned(self) -> list[int]:
        """The answers to train on: those after the prompt whose `weight` is not 0 and whose `train` is not false."""
        return [
            i
            for i in self.answers
            if i >= self.given and self.messages[i].get("weight", 1) and self.messages[i].get("train", True)
        ]

    def columns(self, messages: list[Message]) -> dict[str, Any]:
        """A row with these messages and this chat's template inputs."""
        row: dict[str, Any] = {"messages": messages}
        for name, value in (("tools", self.tools), ("documents", self.documents)):
            if value is not None:
                row[name] = value
        return row | ({"chat_template_kwargs": dict(self.template_kwargs)} if self.template_kwargs else {})


@dataclass(frozen=True)
class Text:
    """Plain text: a prompt, a completion, or both.  Where `ends`, the tokenizer's end token follows the completion."""

    prompt: str | None
    completion: str | None
    ends: bool = True


def parse_row(
    record: Mapping[str, Any], where: str, *, chat: bool = False, template_kwargs: Mapping[str, Any] | None = None
) -> Chat | Text:
    """The content of a row.  `where` names its file and line in errors.

    `chat`: a plain `prompt` is the user's turn of a chat.  `template_kwargs`: variables of the chat template, which a
    row's own `chat_template_kwargs` override.  Raises RedrafterError.
    """
    row = {name: value for name, value in record.items() if value is not None}
    _refuse_unreadable(row, where)
    found = _chat(row, where, chat=chat)
    system = _system(row, where)
    inputs = _template_inputs(row, where, template_kwargs or {})
    if found is None:
        text = _text(row, where)
        for name, value in {"system": system, **inputs}.items():
            if value:
                name = "chat_template_kwargs (or --template-kwargs)" if name == "template_kwargs" else name
                raise RedrafterError(
                    f'{where}: {name} needs a chat, and the row is plain text: give "messages" (or --chat, where there '
                    "is such an option)."
                )
        return text
    messages = found.messages
    _refuse_conflicts(row, messages, where)
    if system:
        first = text_of(messages[0]) if messages[0]["role"] == "system" else None
        if first not in (None, system):
            raise RedrafterError(f'{where}: the row has a "system" column and another system message: remove one.')
        if first is None:
            messages = [{"role": "system", "content": system}, *messages]
            found = replace(found, given=found.given + bool(found.given))
    return replace(found, messages=messages, **inputs)


def metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that a new answer does not replace: what is not text, and the questions as they were."""
    replaced = {*_TEXT, *_TOKENS, *(("input", "output", "history") if "instruction" in record else ())} - {"turns"}
    return {name: value for name, value in record.items() if name not in replaced}


def read_template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Variables for a chat template, as an object or as JSON text.  Raises RedrafterError."""
    value = _decoded(value, name)
    if not isinstance(value, dict):
        raise RedrafterError(f'{name} must be a JSON object, such as {{"enable_thinking": false}}.')
    reserved = sorted(_RESERVED & value.keys())
    if reserved:
        raise RedrafterError(f"{name} cannot set {', '.join(reserved)}: only variables of the chat template.")
    return value


def _refuse_unreadable(row: dict[str, Any], where: str) -> None:
    """Raises RedrafterError for strings that are no text and for columns that no format here can use."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RedrafterError(f"{where}: the row holds half a character (a lone surrogate), which is no text.") from None
    for name in _MEDIA:
        if row.get(name):
            raise RedrafterError(f'{where}: the row has "{name}", and only text is supported.')
    if row.get("functions") or row.get("function_call"):
        raise RedrafterError(f'{where}: "functions" and "function_call" are not supported: give "tools".')


def _chat(row: dict[str, Any], where: str, *, chat: bool) -> Chat | None:
    """The conversation of a row without its system column; None if it is plain text."""
    found: dict[str, list[Message]] = {}
    for name in (*_CHATS, *(name for name in ("prompt", *_ANSWERS) if isinstance(row.get(name), list))):
        if name in row:
            found[name] = read_messages(row[name], name, where)
    prompt, answers = found.pop("prompt", None), [found.pop(name) for name in _ANSWERS if name in found]
    if prompt is not None:
        if any(name in row and not isinstance(row[name], list) for name in _ANSWERS):
            raise RedrafterError(f"{where}: a prompt of messages needs an answer of messages, not of text.")
        whole = [one if one[: len(prompt)] == prompt else prompt + one for one in answers]
        found |= {f"prompt {number}": one for number, one in enumerate(whole)}
    elif answers and "completion" in row and isinstance(row["completion"], list):
        raise RedrafterError(f'{where}: a "completion" of messages needs a "prompt" of messages.')
    else:
        found |= {f"answer {number}": one for number, one in enumerate(answers)}
    chats = list(found.values()) or ([prompt] if prompt else [])
    if any(one != chats[0] for one in chats) or (prompt and chats[0][: len(prompt)] != prompt):
        raise RedrafterError(f"{where}: the row holds two different conversations: remove one.")
    turns = _turns(row, where)
    if chats:
        asked = [text_of(one) for one in chats[0] if one["role"] == "user"]
        if turns is not None and asked != turns[: len(asked)]:
            raise RedrafterError(f'{where}: "turns" and the messages hold different user turns: remove one.')
        return Chat(chats[0], given=len(prompt or ()))
    if turns is not None:
        return Chat([{"role": "user", "content": turn} for turn in turns], only_user=True)
    return _instruction(row, where) if "instruction" in row else _asked(row, where) if chat else None


def _turns(row: dict[str, Any], where: str) -> list[str] | None:
    turns = row.get("turns")
    if turns is None:
        return None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise RedrafterError(f'{where}: "turns" must be a list of the user\'s turns as text.')
    return turns


def _instruction(row: dict[str, Any], where: str) -> Chat:
    """Alpaca's columns: the instruction and, on the next lines, its input are the user's turn, the output an answer."""
    for name in ("history", "context"):
        if row.get(name):
            raise RedrafterError(f'{where}: "{name}" beside "instruction" is not supported: give "messages".')
    asked = "\n".join(part for part in (_string(row, "instruction", where), _string(row, "input", where)) if part)
    messages = [{"role": "user", "content": asked}]
    answer = _answer({**row, "completion": row["output"]} if "output" in row else row, where)
    return Chat(messages + ([] if answer is None else [{"role": "assistant", "content": answer}]))


def _asked(row: dict[str, Any], where: str) -> Chat | None:
    """A plain prompt as the user's turn of a chat."""
    prompt = _string(row, "prompt", where)
    if prompt is None:
        return None
    answer = _answer(row, where)
    messages = [{"role": "user", "content": prompt}]
    return Chat(messages + ([] if answer is None else [{"role": "assistant", "content": answer}]))


def _answer(row: dict[str, Any], where: str) -> str | None:
    """The one answer that a row's columns hold as text."""
    answers = {_string(row, name, where) for name in _ANSWERS if name in row}
    if len(answers) > 1:
        raise RedrafterError(f"{where}: the row holds several answers: keep one of {', '.join(_ANSWERS)}.")
    return answers.pop() if answers else None


def _text(row: dict[str, Any], where: str) -> Text:
    """A row of plain text."""
    prompt, text, answer = _string(row, "prompt", where), _string(row, "text", where), _answer(row, where)
    if prompt is None and (answer is not None or text is None):
        columns = ", ".join(list(row)[:8]) or "none"
        reason = f'"{next(n for n in _ANSWERS if n in row)}" needs a "prompt"' if answer is not None else ""
        raise RedrafterError(f"{where}: {reason or f'a row needs {FORMATS}; its columns are {columns}'}.")
    if answer is not None:
        if text not in (None, answer, f"{prompt}{answer}"):
            raise RedrafterError(f'{where}: "text" and the answer differ: remove one.')
        return Text(prompt, answer)
    ours = "finish_reason" in row or "finish_reasons" in row
    if prompt and text and text.startswith(prompt) and not ours:
        raise RedrafterError(
            f'{where}: "text" begins with "prompt", so it may or may not hold it: give the answer as "completion".'
        )
    return Text(prompt, text, ends=prompt is None or text is None)


def _string(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RedrafterError(f'{where}: "{name}" must be text, not {json.dumps(value, default=str)[:40]}.')
    return value


def _system(row: dict[str, Any], where: str) -> str | None:
    texts = {_string(row, name, where) for name in _SYSTEM} - {None, ""}
    if len(texts) > 1:
        raise RedrafterError(f"{where}: {' and '.join(_SYSTEM)} differ: remove one.")
    return texts.pop() if texts else None


def _refuse_conflicts(row: dict[str, Any], messages: list[Message], where: str) -> None:
    """Raises RedrafterError where columns of text beside a chat say something else than the chat."""
    asked = {text_of(one).strip() for one in messages if one["role"] == "user"}
    answer = text_of(messages[-1]).strip() if messages[-1]["role"] == "assistant" else None
    for name in ("prompt", "instruction", *_ANSWERS, "text"):
        value = row.get(name)
        if isinstance(value, list) or (name == "instruction" and not any(n in row for n in (*_CHATS, "turns"))):
            continue
        text = (_string(row, name, where) or "").strip()
        agrees = text in asked if name in ("prompt", "instruction") else text == answer
        if text and not agrees:
            raise RedrafterError(f'{where}: the row is a chat, and "{name}" holds other text: remove one of them.')


def _template_inputs(row: dict[str, Any], where: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`tools`, `documents` and `template_kwargs` of a chat."""
    inputs: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = _decoded(row.get(name), f'{where}: "{name}"')
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise RedrafterError(f'{where}: "{name}" must be a list of JSON objects.')
        inputs[name] = value
    own = row.get("chat_template_kwargs")
    own = {} if own is None else read_template_kwargs(own, f'{where}: "chat_template_kwargs"')
    return {**inputs, "template_kwargs": {**defaults, **own}}


def _decoded(value: Any, name: str) -> Any:
    """A value that some data sets keep as JSON text; an empty text is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise RedrafterError(f"{name} is text that is not JSON.") from None
