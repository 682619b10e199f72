"""Tool calls in a model's text: found, parsed, and required by a grammar.

The chat template renders the tools into the prompt (`tokenizer.apply_chat_template(messages, tools=...)`); this module
reads the calls that the model writes.  Guarantees that text which is not a complete call stays content.  Does not know
requests, streams or the engine, and does not run tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.errors import RedrafterError, reason
from redrafter.server.structured import WHITESPACE


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name and its arguments, a JSON object as text."""

    name: str
    arguments_json: str


@dataclass(frozen=True)
class ParsedMessage:
    """A message: the text without its calls, None if nothing remains, and the calls in order."""

    content: str | None
    tool_calls: list[ToolCall]


@dataclass(frozen=True)
class Form:
    """How a family of models writes calls: a marker, then `{"name": NAME, ARGUMENTS: {...}}`, then an end marker.

    `arguments` is the second key; if it is None, a call is `NAME[ARGS]{...}`.
    """

    name: str
    signs: tuple[str, ...]
    """Texts that the chat template contains."""
    marker: str
    end: str = ""
    arguments: str | None = "arguments"
    array: bool = False
    """Whether a JSON array of calls follows one marker; if not, each call has its own marker."""
    bare: bool = False
    """Whether a message may be one call without a marker."""


FORMS = (
    Form("Mistral with [ARGS]", ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]", arguments=None),
    Form("Mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", array=True),
    Form("Granite", ("<|tool_call|>",), "<|tool_call|>", array=True),
    Form("Hermes and Qwen", ("<tool_call>", "arguments"), "<tool_call>", "</tool_call>"),
    Form("Llama 3 JSON", ("ipython", '"parameters"'), "<|python_tag|>", arguments="parameters", bare=True),
)
"""The supported forms, tried in this order."""

_OTHER_FORMS = ("<function=", "<arg_key>")
"""Signs of forms that have the marker of a form above: calls in XML, whose arguments have no types."""

_ARGS = "[ARGS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]")
_SEPARATOR = re.compile(r"\s*;")
"""Llama separates several calls by semicolons."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_WHITESPACE = {"x-guidance": {"whitespace_pattern": WHITESPACE}}


def tool_parser(tokenizer: PreTrainedTokenizerBase) -> ToolParser:
    """The parser for the form of calls that a tokenizer's chat template uses.

    Raises RedrafterError if there is no chat template, or if it does not support tools or uses an unknown form.
    """
    if not tokenizer.chat_template:
        raise RedrafterError("Tools need a chat template: the tokenizer has none.")
    try:
        template = tokenizer.get_chat_template(tools=[])  # of several templates, the one for tools
    except ValueError as error:
        raise RedrafterError(f"No chat template can be chosen for tools: {reason(error)}.") from error
    if not re.search(r"\btools\b", template):
        raise RedrafterError("The model's chat template does not support tools: leave out tools.")
    if not any(sign in template for sign in _OTHER_FORMS):
        for form in FORMS:
            if all(sign in template for sign in form.signs):
                return ToolParser(form, tokenizer)
    known = ", ".join(form.name for form in FORMS)
    raise RedrafterError(f"The model's chat template uses an unknown form of tool calls; supported are: {known}.")


class ToolParser:
    """Reads the calls of one form.

    `[TOOL_CALLS]`, `[ARGS]`, `<|tool_call|>` and `<|python_tag|>` usually are special tokens, which detokenizers skip:
    parse the text of `decode`.  In most Hermes and Qwen tokenizers, `<tool_call>` is not special.
    """

    def __init__(self, form: Form, tokenizer: PreTrainedTokenizerBase):
        self.form = form
        self.tokenizer = tokenizer
        markers = (form.marker, form.end, _ARGS, "[CALL_ID]")
        added = tokenizer.added_tokens_decoder.items()
        self._markers = {str(token): id for id, token in added if str(token) in markers}
        self._skipped = {id for id, token in added if token.special and str(token) not in markers}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """The text of new tokens, with the form's markers and without other special tokens.  `options` as for `decode`
        of tokenizers.

        It ends with U+FFFD if the last token ends inside a character.
        """
        return str(self.tokenizer.decode([token for token in tokens if token not in self._skipped], **options))

    def may_be_call(self, text: str) -> bool:
        """Whether a text so far may contain a call, or the beginning of one, so that a stream must hold it back."""
        marker = self.form.marker
        if self.form.bare and text.lstrip()[:1] in ("", "{"):
            return True
        return marker in text or any(text.endswith(marker[:length]) for length in range(1, len(marker)))

    def parse(self, text: str) -> ParsedMessage:
        """The calls and the content of a complete text.  Malformed calls stay content."""
        marker = self.form.marker
        if self.form.bare and text.lstrip().startswith("{"):
            message = self._parse(marker + text)
            return ParsedMessage(text, []) if message.content else message
        return self._parse(text)

    def grammar(self, tools: Sequence[Mapping[str, Any]], tool_choice: Any) -> str | None:
        """A grammar for `structured.make_processor(grammar=...)` that requires the calls of OpenAI's `tool_choice`.

        "required": a call of any tool, several if the form has a marker; `{"type": "function", "function": {"name":
        NAME}}`: one call of that tool; None, "auto" and "none": no grammar, None.  Arguments follow the tool's
        `parameters`, a JSON schema.  Raises RedrafterError for malformed tools, an unknown tool or another choice.
        """
        schemas = _schemas(tools)
        if tool_choice in (None, "auto", "none"):
            return None
        if tool_choice == "required":
            if not schemas:
                raise RedrafterError('tool_choice "required" needs at least one tool.')
            return self._grammar(schemas, several=not self.form.bare)
        name = _chosen(tool_choice)
        if name not in schemas:
            raise RedrafterError(f"tool_choice names the function {name!r}, which is not among the tools.")
        return self._grammar({name: schemas[name]}, several=False)

    def _parse(self, text: str) -> ParsedMessage:
        marker = self.form.marker
        content, calls, position = [], [], 0
        while (begin := text.find(marker, position)) >= 0:
            content.append(text[position:begin])
            found, position = self._calls_at(text, begin + len(marker))
            calls += found
            if not found:
                content.append(marker)
        content.append(text[position:])
        remaining = "".join(content)
        return ParsedMessage((remaining.strip() if calls else remaining) or None, calls)

    def _calls_at(self, text: str, start: int) -> tuple[list[ToolCall], int]:
        """The calls after a marker and the position of the text after them; none, and `start`, if malformed."""
        if self.form.arguments is None:
            named = _NAMED.match(text, start)
            value, end = _json(text, named.end() if named else start)
            calls = [_call(named[1], value) if named else None]
        else:
            value, end = _json(text, start)
            calls = [_call_of(one, self.form.arguments) for one in (value if isinstance(value, list) else [value])]
        if self.form.end:
            end = _skipped(text, end)
            if not text.startswith(self.form.end, end) and end < len(text):
                return [], start
            end = min(end + len(self.form.end), len(text))
        complete = [call for call in calls if call is not None]
        if not complete or len(complete) < len(calls):
            return [], start
        if self.form.bare and (separator := _SEPARATOR.match(text, end)):
            more, end = self._calls_at(text, separator.end())
            complete += more
        return complete, end

    def _grammar(self, schemas: Mapping[str, Any], *, several: bool) -> str:
        form = self.form
        calls = []
        for name, schema in schemas.items():
            arguments = f"%json {json.dumps(schema | _WHITESPACE)}"
            head = f'{{"name": "{name}", "{form.arguments}": '
            named = f"{_string(name)} {self._token(_ARGS)} {arguments}"
            calls.append(named if form.arguments is None else f'{_string(head)} {arguments} "}}"')
        if form.array:
            inner = '"[" call (", " call)* "]"' if several else '"[" call "]"'
        else:
            inner = rf'"\n" call "\n" {self._token(form.end)}' if form.end else "call"
        block = inner if form.bare else f"{self._token(form.marker)} {inner}"
        between = r'"\n"' if form.end else ""
        blocks = f"block ({between} block)*" if several and not form.array else "block"
        return f"start: {blocks}\nblock: {block}\ncall: {' | '.join(calls)}\n"

    def _token(self, marker: str) -> str:
        """A marker in Lark syntax: by its id if it is a token, since strings may not match special tokens."""
        return f"<[{self._markers[marker]}]>" if marker in self._markers else _string(marker)


def _string(text: str) -> str:
    """A string in Lark syntax."""
    return json.dumps(text)


def _skipped(text: str, position: int) -> int:
    """The position after whitespace."""
    return len(text) - len(text[position:].lstrip())


def _json(text: str, position: int) -> tuple[Any, int]:
    """The JSON value at a position, and the position after it; None if there is no valid one."""
    try:
        return json.JSONDecoder().raw_decode(text, _skipped(text, position))
    except (ValueError, RecursionError):
        return None, position


def _call_of(value: Any, key: str) -> ToolCall | None:
    return _call(value.get("name"), value.get(key)) if isinstance(value, dict) else None


def _call(name: Any, arguments: Any) -> ToolCall | None:
    """A call, or None if it is malformed.  Some models write the arguments as JSON text."""
    if isinstance(arguments, str):
        arguments, _ = _json(arguments, 0)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(arguments, dict)):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails for half of a surrogate pair
    except ValueError:
        return None
    return ToolCall(name, text)


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schema of each tool's arguments by its name.  Raises RedrafterError for malformed tools."""
    schemas = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise RedrafterError(f'tools[{index}] must be an object with "type": "function" and a "function".')
        name, parameters = function.get("name"), function.get("parameters")
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise RedrafterError(
                f"The name of tools[{index}] must be 1 to 64 letters, digits, dots, dashes or underscores."
            )
        if parameters is not None and not isinstance(parameters, dict):
            raise RedrafterError(f"The parameters of tools[{index}] must be a JSON schema, an object.")
        schemas[name] = _NO_ARGUMENTS if parameters is None else parameters
    return schemas


def _chosen(tool_choice: Any) -> str:
    """The name of the function in a `tool_choice`."""
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RedrafterError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": NAME}}.'
        )
    return name
