"""Request bodies of OpenAI's API, and the fields that vLLM adds to it.

Guarantees that a field that the server does not know is refused, and that values have the right type and range.  Does
not know the model: whether a prompt fits is checked later.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from redrafter.server.fields import (
    NewTokens,
    Penalty,
    PositiveProbability,
    Probability,
    Stop,
    Strict,
    Token,
    TokenText,
    described,
)
from redrafter.server.messages import Message

MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding; logits divided by them would overflow."""

DEFAULT_COMPLETION_TOKENS = 16
"""New tokens of `/v1/completions` if the request does not say, as in OpenAI's API."""


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the counts of tokens.  The other field is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    """The schema of `response_format`, which is always followed strictly."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('needs a json_schema if its type is "json_schema", and only then')
        return self


class StructuredOutputs(Strict):
    """vLLM's way to set the form of the answer: one of a JSON schema and a regular expression."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.json_ is None) == (self.regex is None):
            raise ValueError("needs either json or regex")
        return self


class Extras(Strict):
    """Fields of this server alone.  `details`: chunks of a stream tell which of their tokens were drafted."""

    details: bool | None = None


class GenerationRequest(Strict):
    """What both kinds of completion have in common.  A field that is null has its default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NewTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: PositiveProbability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[TokenText, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    drafter: bool | None = None
    redrafter: Extras | None = None

    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    structured_outputs: StructuredOutputs | None = None

    user: str | None = None  # from here on: accepted and ignored
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_characters(cls, value: Any) -> Any:
        """Tokenizers cannot encode lone surrogates, which JSON can express."""
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("The request holds half a character (a lone surrogate): remove it") from None
        except RecursionError:
            raise ValueError("The request is nested too deeply") from None
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(self._forms()) > 1:
            raise ValueError("response_format, guided_regex and structured_outputs exclude each other: give one")
        return self

    def _forms(self) -> list[dict[str, Any]]:
        forms: list[dict[str, Any]] = []
        if self.response_format is not None and self.response_format.type == "json_object":
            forms.append({"json_object": True})
        if self.response_format is not None and self.response_format.json_schema is not None:
            forms.append({"json_schema": self.response_format.json_schema.schema_})
        if self.guided_regex is not None:
            forms.append({"regex": self.guided_regex})
        if self.structured_outputs is not None:
            given = {"json_schema": self.structured_outputs.json_, "regex": self.structured_outputs.regex}
            forms.append({name: value for name, value in given.items() if value is not None})
        return forms

    @property
    def form(self) -> dict[str, Any] | None:
        """The form of the answer as an argument of `structured.make_processor`; None for any text."""
        return next(iter(self._forms()), None)

    @property
    def details(self) -> bool:
        """Whether chunks tell which of their tokens were drafted."""
        return bool(self.redrafter and self.redrafter.details)

    @property
    def most_calls(self) -> int | None:
        """How many tool calls an answer may have; None for any number."""
        return None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen without sampling."""
        return self.temperature is not None and self.temperature < GREEDY_BELOW

    def new_tokens(self, room: int) -> int:
        """The maximum number of new tokens, if `room` is what fits after the prompt."""
        raise NotImplementedError

    @property
    def requested_logprobs(self) -> int | None:
        """How many of the most likely tokens to report at each position; None for no log probabilities."""
        raise NotImplementedError


Prompt = Annotated[
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[Token], Field(min_length=1)]
    | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)],
    described("must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"),
]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def new_tokens(self, room: int) -> int:
        """`max_tokens`, or OpenAI's default if it fits."""
        return self.max_tokens or min(DEFAULT_COMPLETION_TOKENS, room)

    @property
    def requested_logprobs(self) -> int | None:
        """As in the base class."""
        return self.logprobs


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (limits := (self.max_tokens, self.max_completion_tokens)) and limits[0] != limits[1]:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.offered_tools and self.form is not None:
            raise ValueError('tools and a form of the answer exclude each other, unless tool_choice is "none"')
        return self

    @property
    def most_calls(self) -> int | None:
        """As in the base class."""
        return 1 if self.parallel_tool_calls is False else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def new_tokens(self, room: int) -> int:
        """The limit of the request, or all that fits."""
        return self.max_completion_tokens or self.max_tokens or room

    @property
    def requested_logprobs(self) -> int | None:
        """As in the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None
