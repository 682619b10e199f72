"""Tool calls in a text that arrives in pieces.

Guarantees that the content which is passed on is the content of the parsed message, except for whitespace around calls,
and that no part of a call is passed on as content.  Does not know requests or the engine.
"""

from __future__ import annotations

from typing import Any

from redrafter.engine.text import Detokenizer
from redrafter.server.tools import ToolCall, ToolParser


class MarkedDetokenizer(Detokenizer):
    """Keeps the markers of tool calls, which usually are special tokens."""

    def __init__(self, parser: ToolParser):
        super().__init__(parser.tokenizer)
        self._parser = parser

    def decode(self, tokens: list[int], **options: Any) -> str:
        """As in the base class."""
        return self._parser.decode(tokens, **options)


class CallReader:
    """Separates the content of one answer from its calls.  `most`: calls that are kept; None for all."""

    def __init__(self, parser: ToolParser, *, most: int | None = None):
        self._parser, self._most = parser, most
        self._text, self._shown = "", 0

    def push(self, text: str) -> str:
        """The content that can be shown now: nothing from the first text on that may be a call."""
        self._text += text
        if self._parser.may_be_call(self._text):
            return ""
        begin, self._shown = self._shown, len(self._text)
        return self._text[begin:]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the content, and the calls."""
        message = self._parser.parse(self._text)
        shown = self._text[: self._shown]
        if message.tool_calls:  # their content is stripped
            shown = shown.lstrip()
        return (message.content or "")[len(shown) :], message.tool_calls[: self._most]
