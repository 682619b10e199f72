"""Reads the messages of a conversation into the form that transformers' chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from redrafter.errors import RedrafterError

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant",
    "tool": "tool",
}  # fmt: skip
"""Roles by their names in datasets, in lower case."""

SHAREGPT = {**ROLES, "observation": "tool"}
"""Values of ShareGPT's `from`.  As a `role`, "observation" stays as it is, since some chat templates use it."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def read_messages(value: Any, name: str, where: str) -> list[Message]:
    """The messages of a column `name`, which holds a list of objects or the same as JSON text.

    A message has `role` and `content`, or ShareGPT's `from` and `value`.  Unknown roles are kept, since the chat
    template may support them.  Raises RedrafterError for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RedrafterError(f'{where}: "{name}" must be a list of messages, not text.') from None
    if not isinstance(value, list):
        raise RedrafterError(f'{where}: "{name}" must be a list of messages.')
    if not value:
        raise RedrafterError(f'{where}: "{name}" is empty.')
    return [_message(one, f"{where}: message {number} of {name}") for number, one in enumerate(value, start=1)]


def text_of(message: Message) -> str:
    """The text of a message; the parts of a list are joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise RedrafterError(f'{where} must be an object with a "role" and a "content".')
    message = {name: part for name, part in value.items() if part is not None}
    if "from" in message:
        message = _sharegpt(message, where)
    elif isinstance(message.get("role"), str):
        message["role"] = ROLES.get(message["role"].lower(), message["role"])
    else:
        raise RedrafterError(f'{where} needs a "role" and a "content".')
    _check_content(message, where)
    _check_weight(message, where)
    return message


def _sharegpt(message: Message, where: str) -> Message:
    """Converts a message with `from` and `value`.  A `function_call` becomes an assistant message with tool calls."""
    speaker = message["from"]
    if "role" in message or "content" in message or not isinstance(speaker, str):
        raise RedrafterError(f'{where} needs either "role" and "content", or "from" and "value".')
    rest = {name: part for name, part in message.items() if name not in ("from", "value")}
    value = message.get("value")
    if speaker.lower() == "function_call":
        return {"role": "assistant", **rest, "tool_calls": _calls(value, where)}
    role = SHAREGPT.get(speaker.lower())
    if role is None:
        known = ", ".join([*SHAREGPT, "function_call"])
        raise RedrafterError(f"{where} is from {speaker!r}, which is not one of {known}.")
    return {"role": role, **rest, "content": value}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Converts ShareGPT's function call, or a list of calls as JSON text, to transformers' `tool_calls`."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} == call.keys() for call in calls):
        raise RedrafterError(f'{where}: a function_call must be JSON with a "name" and "arguments".')
    return [{"type": "function", "function": call} for call in calls]


def _check_content(message: Message, where: str) -> None:
    content, calls = message.get("content"), message.get("tool_calls")
    if message.get("function_call"):
        raise RedrafterError(f'{where}: "function_call" is not supported: give "tool_calls".')
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RedrafterError(f'{where}: "tool_calls" must be a list of objects.')
    if any(message.get(name) for name in _MEDIA):
        raise RedrafterError(f"{where} has an image, audio or video; only text is supported.")
    if content is None:
        if not (calls and message["role"] == "assistant"):
            raise RedrafterError(f'{where} needs a "content".')
        message.pop("content", None)
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RedrafterError(f"{where} has a part that is not text; only text is supported.")
        if not content:
            raise RedrafterError(f'{where} needs a "content".')
    elif not isinstance(content, str):
        raise RedrafterError(f'{where}: "content" must be text, not {json.dumps(content, default=str)[:40]}.')


def _check_weight(message: Message, where: str) -> None:
    """`weight` (OpenAI) and `train` (axolotl) control whether a message is learned."""
    for name in ("weight", "train"):
        if name in message and message[name] not in (0, 1):
            raise RedrafterError(f'{where}: "{name}" must be 0 or 1 (false or true).')
        if message.get(name) and message["role"] != "assistant":
            raise RedrafterError(f'{where}: "{name}" is set, but only the assistant\'s messages are learned.')
