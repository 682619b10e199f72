"""The answers that a request asks for, as pieces of text in the order in which the engine generates them.

Guarantees that every submission of a request is cancelled when the request ends, for whatever reason, or its client
disconnects.  Does not know the formats of responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive
from transformers import PreTrainedTokenizerBase

from redrafter.engine.engine import Engine, EngineClosed
from redrafter.engine.results import Event, TokenLogprob
from redrafter.engine.submission import Submission
from redrafter.engine.text import Detokenizer
from redrafter.errors import RedrafterError
from redrafter.server.errors import ApiError, as_api_error, log
from redrafter.server.metrics import Metrics
from redrafter.server.responses import FinishReason, PredictionDetails, StepDetails, Usage
from redrafter.server.stop import StopCutter
from redrafter.server.tool_stream import CallReader, MarkedDetokenizer
from redrafter.server.tools import ToolCall, ToolParser

Jobs = list[tuple[list[int], dict[str, Any]]]
"""Prompts with the settings of their answers, as for `Engine.submit`."""


@dataclass(frozen=True)
class Reading:
    """How the answers to a request are read: cut at `stops`, with tool calls if there is a `parser`.

    `most_calls`: calls that are kept; None for all.  `details`: the pieces describe their steps, for which `tokenizer`
    is needed.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str] = ()
    parser: ToolParser | None = None
    most_calls: int | None = None
    details: bool = False

    def detokenizer(self) -> Detokenizer | None:
        """A detokenizer for one answer, if the engine's text does not suffice."""
        if self.parser is not None:
            return MarkedDetokenizer(self.parser)
        return Detokenizer(self.tokenizer) if self.details else None


@dataclass(frozen=True)
class Piece:
    """What one step adds to one of the answers."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    tool_calls: list[ToolCall]
    step: StepDetails | None = None


class Choice:
    """One answer: a submission and how it is read."""

    def __init__(self, index: int, submission: Submission, reading: Reading, metrics: Metrics):
        self.index, self.submission = index, submission
        self._cutter, self._timer = StopCutter(reading.stops), metrics.timer()
        self._detokenizer, self._details = reading.detokenizer(), reading.details
        self._calls = None if reading.parser is None else CallReader(reading.parser, most=reading.most_calls)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces that hold anything.  Raises ApiError if the engine fails or ends the request."""
        try:
            async for event in self.submission:
                self._timer.tokens(len(event.tokens), queued=self.submission.queued_seconds)
                piece = self._piece(event)
                if piece.text or piece.logprobs or piece.finish_reason or piece.step:
                    yield piece
                if piece.finish_reason:
                    break
        except EngineClosed as error:
            raise as_api_error(error) from error
        except RedrafterError as error:
            log.error("The engine failed to process a request: %s", error)
            raise ApiError(500, str(error), code="engine_error") from error
        self._timer.finished()

    def _piece(self, event: Event) -> Piece:
        if event.finish_reason == "cancelled":
            raise ApiError(503, "The server stopped before the answer was complete.", code="shutting_down")
        texts = self._texts(event)
        text = self._cutter.push("".join(texts))
        reason: FinishReason | None = None
        if event.finish_reason is not None:
            reason = "length" if event.finish_reason == "length" else "stop"
            text += self._cutter.rest()
        if self._cutter.found:
            reason = "stop"
            self.submission.cancel()  # if the engine, which compares tokens, has not found it
        calls: list[ToolCall] = []
        if self._calls is not None:
            text = self._calls.push(text)
            if reason is not None:
                rest, calls = self._calls.finish()
                text += rest
                reason = "tool_calls" if calls and reason == "stop" else reason
        step: StepDetails | None = None
        if self._details:
            count = len(event.tokens)
            step = StepDetails(tokens=count, accepted=event.accepted, drafted=event.drafted, pieces=texts)
        return Piece(self.index, text, event.logprobs or [], reason, calls, step)

    def _texts(self, event: Event) -> list[str]:
        """The text of each token, or of all; then what was held back, if the answer ends."""
        if self._detokenizer is None:
            return [event.text or ""]
        texts = [self._detokenizer.push(token) for token in event.tokens]
        if event.finish_reason is not None and (rest := self._detokenizer.rest()):
            texts.append(rest)
        return texts


def submit_all(engine: Engine, jobs: Jobs, reading: Reading, metrics: Metrics) -> list[Choice]:
    """Submits prompts with their settings: all of them, or none if one raises an error."""
    submissions: list[Submission] = []
    try:
        for prompt, settings in jobs:
            submissions.append(engine.submit(prompt, **settings))
    except BaseException:
        for submission in submissions:
            submission.cancel()
        raise
    return [Choice(index, submission, reading, metrics) for index, submission in enumerate(submissions)]


@asynccontextmanager
async def cancelled_on_disconnect(choices: Sequence[Choice], receive: Receive) -> AsyncIterator[None]:
    """Cancels the submissions at the end of the block, or as soon as the client disconnects.

    `receive` is that of the ASGI application, after the body was read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        _cancel(choices)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        _cancel(choices)


def _cancel(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.submission.cancel()


async def all_pieces(choices: Sequence[Choice]) -> AsyncGenerator[Piece]:
    """The pieces of all answers, as they arrive."""
    iterators = [choice.pieces() for choice in choices]
    pending = {asyncio.ensure_future(anext(one)): one for one in iterators}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                iterator = pending.pop(task)
                try:
                    yield task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(iterator))] = iterator
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def usage_of(choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> Usage:
    """The counts of finished answers; a prompt counts once, however many answers it has."""
    stats = [choice.submission.stats for choice in choices]
    prompt, new = sum(map(len, prompts)), sum(one.tokens for one in stats)
    accepted = sum(one.accepted for one in stats)
    drafted = sum(one.drafted for one in stats)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        completion_tokens_details=PredictionDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=drafted - accepted
        ),
    )
