"""Response bodies of OpenAI's API.  Optional fields that were not set are left out of the JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PredictionDetails(BaseModel):
    """Drafted tokens that the model kept, and those that it did not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: PredictionDetails


class TopToken(BaseModel):
    """A token and its log probability; `bytes` is null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenInfo(TopToken):
    """A generated token, and the most likely ones in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """Log probabilities of a chat's answer."""

    content: list[TokenInfo]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class Function(BaseModel):
    """A called function; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class ChunkToolCall(MessageToolCall):
    """A call of a tool in a chunk; `index` is its place among the calls of the answer."""

    index: int


class AssistantMessage(BaseModel):
    """The answer in a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ChunkToolCall] | None = None


class StepDetails(BaseModel):
    """One step: how many `tokens` it wrote, the first `accepted` of which were among the `drafted` ones.

    `pieces`: the text of each token, and what was held back if the answer ends here.
    """

    tokens: int
    accepted: int
    drafted: int
    pieces: list[str]


class ChunkChoice(BaseModel):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A piece of a streamed chat answer; the last one may hold the usage instead of choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    redrafter: StepDetails | None = None


class CompletionChoice(BaseModel):
    """A completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer to a completion request, or a piece of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    redrafter: StepDetails | None = None


class Model(BaseModel):
    """The served model; `max_model_len` is the maximum number of tokens per request, prompt included."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "redrafter"
    max_model_len: int


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """`status` is "ok" with HTTP status 200; otherwise the status is 503."""

    status: Literal["ok", "draining", "dead"]
