"""Processes completion requests: from a checked body to a response, streamed or not.

Guarantees that neither tokenizing nor compiling a grammar blocks the event loop, and that a failure after the first
byte of a stream is reported as an event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from redrafter.engine.engine import Engine
from redrafter.server.choices import (
    Choice,
    Jobs,
    Piece,
    Reading,
    all_pieces,
    cancelled_on_disconnect,
    submit_all,
    usage_of,
)
from redrafter.server.errors import ApiError, as_api_error, log
from redrafter.server.formats import ChatFormat, CompletionFormat, Format
from redrafter.server.logprobs import TokenTexts
from redrafter.server.metrics import Metrics
from redrafter.server.prompts import constraint_of, parser_of, prompts_of, settings_of
from redrafter.server.protocol import ChatRequest, GenerationRequest
from redrafter.server.structured import make_processor


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers.

    `model_name`: name of the model in requests.  `api_key`: required as a bearer token under `/v1`; None for no check.
    `max_body_bytes`: limit on a request's body.  `max_answers`: limit on the answers of one request (prompts times
    `n`).  `allowed_origins`: origins whose pages may call the server from a browser.
    """

    model_name: str
    api_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    max_answers: int = 256
    allowed_origins: Sequence[str] = ()


@dataclass(frozen=True)
class _Plan:
    """A checked request.  `constraint`: what restricts its answers, as an argument of `make_processor`."""

    prompts: list[list[int]]
    jobs: Jobs
    constraint: Mapping[str, Any] | None
    reading: Reading


class Service:
    """The engine, its tokenizer and what requests need beside them.

    `draining`: the server is about to stop and accepts no new requests.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings):
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.metrics = Metrics(engine, settings.model_name)
        self.created = int(time.time())
        self.draining = False
        self._texts = TokenTexts(tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # one, as tokenizers are not made for several
        self._compiling = ThreadPoolExecutor(1, "grammars")  # so that a slow grammar delays grammars only

    def check_model(self, name: str | None) -> None:
        """Raises ApiError if a request names another model."""
        if name not in (None, self.settings.model_name):
            message = f"The model {name} does not exist; this server has {self.settings.model_name}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def respond(self, body: GenerationRequest, request: Request) -> BaseModel | StreamingResponse:
        """The response to a request.  Raises ApiError or RedrafterError."""
        self.check_model(body.model)
        loop = asyncio.get_running_loop()
        plan = await loop.run_in_executor(self._tokenizing, self._plan, body)
        if plan.constraint is not None:
            await loop.run_in_executor(self._compiling, self._add_processors, plan.jobs, plan.constraint)
        choices = await loop.run_in_executor(
            self._tokenizing, submit_all, self.engine, plan.jobs, plan.reading, self.metrics
        )
        kind = ChatFormat if isinstance(body, ChatRequest) else CompletionFormat
        formatted: Format = kind(
            self.settings.model_name,
            self._texts,
            logprobs=body.requested_logprobs is not None,
            include_usage=body.include_usage,
        )
        if body.stream:
            events = _events(formatted, choices, plan.prompts if body.include_usage else None)
            return EventStream(events, choices)
        async with cancelled_on_disconnect(choices, request.receive):
            answers = await _complete(choices)
        return formatted.response(answers, usage_of(choices, plan.prompts))

    def _plan(self, body: GenerationRequest) -> _Plan:
        """What to do for a request: `n` answers for each prompt."""
        parser = parser_of(body, self.tokenizer)
        constraint = constraint_of(body, parser)
        prompts, copies = prompts_of(body, self.tokenizer, self.engine.vocab_size), body.n or 1
        answers = len(prompts) * copies
        if answers > self.settings.max_answers:
            raise ApiError(
                400, f"The request asks for {answers} answers, and the server's limit is {self.settings.max_answers}."
            )
        jobs: Jobs = []
        for prompt in prompts:
            settings = settings_of(body, prompt, self.engine)
            jobs += [(prompt, _nth(settings, copy)) for copy in range(copies)]
        reading = Reading(self.tokenizer, body.stops, parser, body.most_calls, details=body.details)
        return _Plan(prompts, jobs, constraint, reading)

    def _add_processors(self, jobs: Jobs, constraint: Mapping[str, Any]) -> None:
        """Restricts every answer by a processor of its own, as processors follow one text."""
        for _, settings in jobs:
            processor = make_processor(
                self.tokenizer, self.engine.vocab_size, end_tokens=self.engine.end_tokens, **constraint
            )
            settings["logits_processor"] = [processor]


def _nth(settings: dict[str, Any], copy: int) -> dict[str, Any]:
    """The settings of one of several answers to a prompt: consecutive seeds."""
    seed = settings.get("seed")
    return settings | ({} if seed is None else {"seed": (seed + copy) % 2**63})


async def _complete(choices: Sequence[Choice]) -> list[Piece]:
    """The answers, each as one piece."""
    parts: list[list[Piece]] = [[] for _ in choices]
    async with aclosing(all_pieces(choices)) as pieces:
        async for piece in pieces:
            parts[piece.index].append(piece)
    return [
        Piece(
            index,
            "".join(one.text for one in own),
            [token for one in own for token in one.logprobs],
            own[-1].finish_reason,
            own[-1].tool_calls,
        )
        for index, own in enumerate(parts)
    ]


async def _events(
    formatted: Format, choices: Sequence[Choice], usage_for: list[list[int]] | None
) -> AsyncIterator[str]:
    """Server-sent events; `usage_for` are the prompts if the last one holds the counts of tokens."""
    try:
        for chunk in formatted.opening(len(choices)):
            yield _event(chunk)
        async with aclosing(all_pieces(choices)) as pieces:
            async for piece in pieces:
                yield _event(formatted.chunk(piece))
        if usage_for is not None:
            yield _event(formatted.usage_chunk(usage_of(choices, usage_for)))
    except Exception as error:  # the status is already sent
        if not isinstance(error, ApiError):
            log.error("A request failed.", exc_info=error)
        yield _event(as_api_error(error).body)
    yield "data: [DONE]\n\n"


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


class EventStream(StreamingResponse):
    """A stream of server-sent events that cancels its submissions when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], choices: Sequence[Choice]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with cancelled_on_disconnect(self._choices, receive):
            await self.stream_response(send)
