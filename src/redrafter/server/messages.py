"""The messages of a chat, as clients send them and as chat templates expect them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from redrafter.server.fields import Strict, described


def _only_text(value: Any) -> Any:
    """Names the first part of a message's content that is not text."""
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"has a part of type {kind}, and only text is supported")
    return value


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """A call of a function; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call of a tool in an earlier answer of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A message of a chat.  Those after `tool_call_id` occur in answers that clients send back, and must be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[
            str | Annotated[list[TextPart], Field(min_length=1)],
            described("must be a string or a list of text parts"),
        ]
        | None,
        BeforeValidator(_only_text),
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("needs a content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: the content as one text, arguments of calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message = {
            "role": self.role,
            "content": content,
            "name": self.name,
            "tool_calls": [_call_for_template(call) for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }
        return {name: value for name, value in message.items() if value is not None}


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Any = json.loads(call.function.arguments)
    except ValueError:  # a model may have written it
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})
