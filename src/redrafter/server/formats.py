"""From pieces of answers to the bodies and chunks of the two kinds of responses.  Does not know the engine."""

from __future__ import annotations

import secrets
import string
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from redrafter.server.choices import Piece
from redrafter.server.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from redrafter.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    ChunkToolCall,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Function,
    MessageToolCall,
    Usage,
)
from redrafter.server.tools import ToolCall


class ChatFormat:
    """Responses of `/v1/chat/completions` to one request."""

    def __init__(self, model: str, texts: TokenTexts, *, logprobs: bool, include_usage: bool):
        self._head: dict[str, Any] = _head("chatcmpl", model)
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._texts, self._logprobs = texts, logprobs

    def opening(self, answers: int) -> Iterator[ChatChunk]:
        """The first chunk of each answer, with the role."""
        for index in range(answers):
            yield self._chunk(index, Delta(role="assistant", content=""), None, None)

    def chunk(self, piece: Piece) -> ChatChunk:
        """A piece of an answer."""
        fields: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.tool_calls:
            calls = enumerate(map(_call, piece.tool_calls))
            fields["tool_calls"] = [ChunkToolCall(index=index, **call) for index, call in calls]
        logprobs = chat_logprobs(piece.logprobs, self._texts) if piece.logprobs else None
        return self._chunk(piece.index, Delta(**fields), logprobs, piece.finish_reason, **_step(piece))

    def _chunk(self, index: int, delta: Delta, logprobs: Any, finish_reason: Any, **extras: Any) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self._head, **self._usage, **extras)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """The last chunk, with the counts of tokens."""
        return ChatChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def response(self, answers: Sequence[Piece], usage: Usage) -> ChatCompletion:
        """The complete answers."""
        choices = [
            ChatChoice(
                index=one.index,
                message=_message(one),
                logprobs=chat_logprobs(one.logprobs, self._texts) if self._logprobs else None,
                finish_reason=one.finish_reason or "stop",
            )
            for one in answers
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._head)


class CompletionFormat:
    """Responses of `/v1/completions` to one request."""

    def __init__(self, model: str, texts: TokenTexts, *, logprobs: bool, include_usage: bool):
        self._head: dict[str, Any] = _head("cmpl", model)
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._texts, self._logprobs = texts, logprobs
        self._offsets: Counter[int] = Counter()
        """Characters of the tokens of each answer so far."""

    def opening(self, answers: int) -> Iterator[Completion]:
        """Nothing precedes the text."""
        return iter(())

    def chunk(self, piece: Piece) -> Completion:
        """A piece of an answer."""
        choices = [self._choice(piece)]
        return Completion(object="text_completion", choices=choices, **self._head, **self._usage, **_step(piece))

    def usage_chunk(self, usage: Usage) -> Completion:
        """The last chunk, with the counts of tokens."""
        return Completion(object="text_completion", choices=[], usage=usage, **self._head)

    def response(self, answers: Sequence[Piece], usage: Usage) -> Completion:
        """The complete answers."""
        choices = [self._choice(one) for one in answers]
        return Completion(object="text_completion", choices=choices, usage=usage, **self._head)

    def _choice(self, piece: Piece) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if self._logprobs:
            logprobs = completion_logprobs(piece.logprobs, self._texts, offset=self._offsets[piece.index])
            self._offsets[piece.index] += sum(map(len, logprobs.tokens))
        return CompletionChoice(
            index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
        )


Format = ChatFormat | CompletionFormat


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _message(piece: Piece) -> AssistantMessage:
    """A complete answer; whitespace around tool calls is no content."""
    if not piece.tool_calls:
        return AssistantMessage(role="assistant", content=piece.text, refusal=None)
    calls = [MessageToolCall(**_call(one)) for one in piece.tool_calls]
    return AssistantMessage(role="assistant", content=piece.text.strip() or None, refusal=None, tool_calls=calls)


def _call(call: ToolCall) -> dict[str, Any]:
    """A call with an id of nine letters and digits, the only form that Mistral's templates accept."""
    name = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return {"id": name, "type": "function", "function": Function(name=call.name, arguments=call.arguments_json)}


def _step(piece: Piece) -> dict[str, Any]:
    return {} if piece.step is None else {"redrafter": piece.step}
