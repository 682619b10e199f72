"""An engine without a model: it writes a given text, two tokens per step, one of them drafted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from redrafter.engine.engine import EngineClosed, EngineFull
from redrafter.engine.results import Event, Stats, TokenLogprob
from redrafter.engine.statistics import EngineStatistics
from redrafter.engine.text import Detokenizer
from redrafter.errors import RedrafterError

STEP = 2


class FakeSubmission:
    def __init__(self, engine: FakeEngine, prompt: list[int], tokens: list[int], settings: dict[str, Any]):
        self.engine, self.prompt, self.tokens, self.settings = engine, prompt, tokens, settings
        self.stats = Stats(accepted_by_position=[0])
        self.cancelled, self.queued_seconds = False, 0.25
        self.ended: str | None = None

    def cancel(self) -> None:
        self.cancelled = True

    def end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason
            self.engine.ended(self, reason)

    async def __aiter__(self) -> AsyncIterator[Event]:
        pieces = Detokenizer(self.engine.tokenizer)
        stops = self.settings.get("stop_strings", ())
        text, left = "", list(self.tokens)
        while self.ended is None:
            await asyncio.sleep(self.engine.delay)
            while not self.engine.going.is_set() and not self.cancelled:
                await asyncio.sleep(0.002)
            if self.cancelled:
                self.end("cancelled")
                yield Event(0, [], 0, 0, "cancelled", text="")
                return
            if self.engine.failure and self.stats.steps >= 1:
                self.end("error")
                raise RedrafterError(self.engine.failure)
            tokens, added, reason = [], "", None
            while left and len(tokens) < STEP and reason is None:
                tokens.append(left.pop(0))
                added += pieces.push(tokens[-1])
                if any(stop in text + added for stop in stops):
                    reason = "stop"
                elif not left:
                    reason = "eos" if tokens[-1] == self.engine.tokenizer.eos_token_id else "length"
            if reason:
                added += pieces.rest()
            text += added
            accepted = len(tokens) - 1 if self.settings["drafter"] else 0
            event = Event(0, tokens, accepted, 3 if self.settings["drafter"] else 0, reason, text=added)
            top = self.settings["logprobs"]
            if top is not None:
                likely = [(token, -0.25 if token == 40 else float("-inf")) for token in range(40, 40 + top)]
                event.logprobs = [TokenLogprob(token, -0.5, likely) for token in tokens]
            self.stats.count(event)
            if reason:
                self.end(reason)
            yield event


class FakeEngine:
    slots, vocab_size, context_length = 2, 259, 128

    def __init__(self, tokenizer: Any, answer: str | Callable[[list[int]], str] = "Hello", **options: Any):
        self.tokenizer, self.answer = tokenizer, answer
        self.end_tokens = frozenset({tokenizer.eos_token_id})
        self.max_length, self.max_waiting = options.get("max_length") or 128, 4
        self.delay, self.failure = 0.0, ""
        self.alive, self.closed = True, False
        self.going = threading.Event()
        self.going.set()
        self.submissions: list[FakeSubmission] = []
        self.open: list[FakeSubmission] = []
        self.reasons: dict[str, int] = {}

    def submit(self, prompt: list[int], **settings: Any) -> FakeSubmission:
        if self.closed or not self.alive:
            raise EngineClosed("The engine accepts no more requests.")
        if max(prompt) >= self.vocab_size:
            raise RedrafterError("The prompt has a token outside the vocabulary.")
        if len(self.open) >= self.slots + self.max_waiting:
            raise EngineFull("All slots are taken and too many requests wait.")
        answer = self.answer if isinstance(self.answer, str) else self.answer(prompt)
        tokens = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        submission = FakeSubmission(self, prompt, tokens[: settings["max_new_tokens"]], settings)
        self.submissions.append(submission)
        self.open.append(submission)
        return submission

    def ended(self, submission: FakeSubmission, reason: str) -> None:
        self.open.remove(submission)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def statistics(self) -> EngineStatistics:
        all_stats = [one.stats for one in self.submissions]
        return EngineStatistics(
            running=min(self.slots, len(self.open)),
            waiting=max(0, len(self.open) - self.slots),
            slots=self.slots,
            requests=dict(self.reasons),
            prompt_tokens=sum(len(one.prompt) for one in self.submissions),
            generated_tokens=sum(one.tokens for one in all_stats),
            steps=sum(one.steps for one in all_stats),
            drafts=sum(one.steps for one in all_stats),
            drafted_tokens=sum(one.drafted for one in all_stats),
            accepted_tokens=sum(one.accepted for one in all_stats),
            accepted_by_position=[sum(one.accepted for one in all_stats)],
            cache_usage=0.25,
            prefix_hits=3,
            prefix_queries=7,
        )

    def drain(self, timeout: float | None = None) -> bool:
        self.closed = True
        while self.open:
            time.sleep(0.005)
        return True

    def close(self) -> None:
        self.closed, self.alive = True, False
        for submission in self.open:
            submission.cancel()

    def describe(self) -> dict[str, str]:
        return {"backend": "a fake"}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
