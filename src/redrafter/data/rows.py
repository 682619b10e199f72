"""Interprets rows of data files; every command uses this reader.

`parse_row` converts a row, a JSON object, to a `Chat` (messages for the chat template) or a `Text` (plain text).  It
raises RedrafterError for a row of an unknown format and for a row that is ambiguous.  Does not know tokenizers.
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
    """A conversation and the other inputs of its chat template.

    `given`: number of messages that belong to the prompt; assistant messages among them are not learned.
    `only_user`: the row has only user messages (`turns`), each of which needs an answer.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    given: int = 0
    only_user: bool = False

    def first(self, count: int) -> Chat:
        """The chat up to its first `count` messages."""
        return replace(self, messages=self.messages[:count])

    @property
    def answers(self) -> list[int]:
        """Indices of assistant messages that answer somebody.  A greeting by the assistant is not an answer."""
        others = [i for i, one in enumerate(self.messages) if one["role"] not in ("system", "developer", "assistant")]
        begin = others[0] if others else len(self.messages)
        return [i for i, one in enumerate(self.messages) if one["role"] == "assistant" and i > begin]

    @property
    def learned(self) -> list[int]:
        """Indices of the answers to train on: after the prompt, with a `weight` and a `train` that are not 0."""
        return [
            i
            for i in self.answers
            if i >= self.given and self.messages[i].get("weight", 1) and self.messages[i].get("train", True)
        ]

    def columns(self, messages: list[Message]) -> dict[str, Any]:
        """A row with these messages and this chat's inputs of the template."""
        row: dict[str, Any] = {"messages": messages}
        for name, value in (("tools", self.tools), ("documents", self.documents)):
            if value is not None:
                row[name] = value
        return row | ({"chat_template_kwargs": dict(self.template_kwargs)} if self.template_kwargs else {})


@dataclass(frozen=True)
class Text:
    """Plain text: a prompt, a completion, or both.  `ends`: the completion is followed by the end token."""

    prompt: str | None
    completion: str | None
    ends: bool = True


def parse_row(
    record: Mapping[str, Any], where: str, *, chat: bool = False, template_kwargs: Mapping[str, Any] | None = None
) -> Chat | Text:
    """The content of a row.  `where` is its location, for errors.

    `chat`: a plain `prompt` is the user's message in a chat.  `template_kwargs`: variables of the chat template; a
    row's own `chat_template_kwargs` override them.  Raises RedrafterError.
    """
    row = {name: value for name, value in record.items() if value is not None}
    _check_supported(row, where)
    parsed = _chat(row, where, plain_prompt_is_chat=chat)
    system = _system(row, where)
    inputs = _template_inputs(row, where, template_kwargs or {})
    if parsed is None:
        text = _text(row, where)
        for name, value in {"system": system, **inputs}.items():
            if value:
                name = "chat_template_kwargs (or --template-kwargs)" if name == "template_kwargs" else name
                raise RedrafterError(
                    f'{where}: {name} needs a chat, but the row is plain text: give "messages" (or --chat, if the '
                    "command has it)."
                )
        return text
    messages = parsed.messages
    _check_consistent(row, messages, where)
    if system:
        first = text_of(messages[0]) if messages[0]["role"] == "system" else None
        if first not in (None, system):
            raise RedrafterError(f'{where}: the row has a "system" column and another system message: remove one.')
        if first is None:
            messages = [{"role": "system", "content": system}, *messages]
            parsed = replace(parsed, given=parsed.given + bool(parsed.given))
    return replace(parsed, messages=messages, **inputs)


def metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns to keep when a new answer replaces the text: all others, and `turns`."""
    replaced = {*_TEXT, *_TOKENS, *(("input", "output", "history") if "instruction" in record else ())} - {"turns"}
    return {name: value for name, value in record.items() if name not in replaced}


def read_template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Variables for a chat template, given as an object or as JSON text.  Raises RedrafterError."""
    value = _decoded(value, name)
    if not isinstance(value, dict):
        raise RedrafterError(f'{name} must be a JSON object, such as {{"enable_thinking": false}}.')
    reserved = sorted(_RESERVED & value.keys())
    if reserved:
        raise RedrafterError(f"{name} cannot set {', '.join(reserved)}: only variables of the chat template.")
    return value


def _check_supported(row: dict[str, Any], where: str) -> None:
    """Raises RedrafterError for strings that are not valid Unicode and for columns that no format supports."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RedrafterError(f"{where}: the row holds half a character (a lone surrogate): remove it.") from None
    for name in _MEDIA:
        if row.get(name):
            raise RedrafterError(f'{where}: the row has "{name}"; only text is supported.')
    if row.get("functions") or row.get("function_call"):
        raise RedrafterError(f'{where}: "functions" and "function_call" are not supported: give "tools".')


def _chat(row: dict[str, Any], where: str, *, plain_prompt_is_chat: bool) -> Chat | None:
    """The conversation of a row without its system column; None for plain text."""
    columns = (*_CHATS, *(name for name in ("prompt", *_ANSWERS) if isinstance(row.get(name), list)))
    lists = {name: read_messages(row[name], name, where) for name in columns if name in row}
    prompt, answers = lists.pop("prompt", None), [lists.pop(name) for name in _ANSWERS if name in lists]
    if prompt is not None:
        if any(name in row and not isinstance(row[name], list) for name in _ANSWERS):
            raise RedrafterError(f"{where}: a prompt of messages needs an answer of messages, not of text.")
        answers = [one if one[: len(prompt)] == prompt else prompt + one for one in answers]
    elif isinstance(row.get("completion"), list):
        raise RedrafterError(f'{where}: a "completion" of messages needs a "prompt" of messages.')
    chats = [*lists.values(), *answers] or ([prompt] if prompt else [])
    if any(one != chats[0] for one in chats) or (prompt and chats[0][: len(prompt)] != prompt):
        raise RedrafterError(f"{where}: the row holds two different conversations: remove one.")
    turns = _turns(row, where)
    if chats:
        questions = [text_of(one) for one in chats[0] if one["role"] == "user"]
        if turns is not None and questions != turns[: len(questions)]:
            raise RedrafterError(f'{where}: "turns" and the messages hold different user messages: remove one.')
        return Chat(chats[0], given=len(prompt or ()))
    if turns is not None:
        return Chat([{"role": "user", "content": turn} for turn in turns], only_user=True)
    if "instruction" in row:
        return _instruction(row, where)
    question = _string(row, "prompt", where) if plain_prompt_is_chat else None
    return None if question is None else _question_and_answer(question, _answer(row, where))


def _turns(row: dict[str, Any], where: str) -> list[str] | None:
    turns = row.get("turns")
    if turns is None:
        return None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise RedrafterError(f'{where}: "turns" must be a list of the user\'s messages as text.')
    return turns


def _instruction(row: dict[str, Any], where: str) -> Chat:
    """Alpaca's columns: instruction and input form the user's message, output is the answer."""
    for name in ("history", "context"):
        if row.get(name):
            raise RedrafterError(f'{where}: "{name}" beside "instruction" is not supported: give "messages".')
    question = "\n".join(part for part in (_string(row, "instruction", where), _string(row, "input", where)) if part)
    return _question_and_answer(
        question, _answer({**row, "completion": row["output"]} if "output" in row else row, where)
    )


def _question_and_answer(question: str, answer: str | None) -> Chat:
    messages = [{"role": "user", "content": question}]
    return Chat(messages + ([] if answer is None else [{"role": "assistant", "content": answer}]))


def _answer(row: dict[str, Any], where: str) -> str | None:
    """The answer in a row's text columns."""
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
    ours = "finish_reason" in row or "finish_reasons" in row  # written by generate or distill
    if prompt and text and text.startswith(prompt) and not ours:
        raise RedrafterError(
            f'{where}: "text" begins with "prompt", so it is unclear whether it contains it: give the answer as '
            '"completion".'
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


def _check_consistent(row: dict[str, Any], messages: list[Message], where: str) -> None:
    """Raises RedrafterError if a text column beside a chat holds text that the chat does not contain."""
    questions = {text_of(one).strip() for one in messages if one["role"] == "user"}
    answer = text_of(messages[-1]).strip() if messages[-1]["role"] == "assistant" else None
    for name in ("prompt", "instruction", *_ANSWERS, "text"):
        value = row.get(name)
        if isinstance(value, list) or (name == "instruction" and not any(n in row for n in (*_CHATS, "turns"))):
            continue
        text = (_string(row, name, where) or "").strip()
        agrees = text in questions if name in ("prompt", "instruction") else text == answer
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
    """Decodes a value that some datasets store as JSON text; None for empty text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise RedrafterError(f"{name} is text that is not JSON.") from None
