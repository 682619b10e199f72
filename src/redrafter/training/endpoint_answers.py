"""The target's answers to prompts, from a server.

Guarantees that several requests run at a time and that every answer is yielded when it arrives.  The server does not
report token ids, so rows contain text.  Does not know HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from redrafter.data.files import Skip
from redrafter.data.messages import Message
from redrafter.errors import RedrafterError
from redrafter.training.dialogues import AnswerPlan, SamplingConfig, plan_answers
from redrafter.training.distillation import CompletedPrompt, DistillProgress, Prompt, row_labels
from redrafter.training.endpoint import BadPrompt, Endpoint

LOOK_AHEAD = 64
"""Prompts per concurrent request that may start after the oldest unanswered one."""


@dataclass(frozen=True)
class EndpointAnswers:
    """Answers prompts with a served model, `concurrency` prompts at a time.

    `seeds`: `sampling.seeds` of all prompts.  `reading`: keyword arguments `chat` and `template_kwargs` of `parse_row`.
    """

    endpoint: Endpoint
    sampling: SamplingConfig
    seeds: Sequence[int]
    concurrency: int
    reading: dict[str, Any] = field(default_factory=dict)
    progress: DistillProgress = field(default_factory=DistillProgress)
    skip: Skip | None = None
    """Receives the error message if the server rejects a first turn; by default BadPrompt is raised.  A later turn that
    is rejected ends its conversation."""

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[CompletedPrompt]:
        """Yields each prompt when it is complete, in any order."""
        gate, stopped = threading.Semaphore(self.concurrency), threading.Event()
        running: dict[Future[CompletedPrompt], Prompt] = {}  # in the order of the prompts

        def may_start() -> bool:
            numbers = [prompt.number for prompt in running.values()] or [0]
            return len(running) < 4 * self.concurrency and numbers[-1] - numbers[0] < LOOK_AHEAD * self.concurrency

        try:
            while True:
                while may_start() and (prompt := next(prompts, None)) is not None:
                    running[self._start(prompt, gate, stopped)] = prompt
                if not running:
                    return
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=lambda one: (one.exception() is not None, running[one].number)):
                    result = self._result(running.pop(future), future)
                    self.progress.tokens += result.counts["tokens"]
                    yield result
                self.progress.tick()
        finally:
            stopped.set()

    def _start(self, prompt: Prompt, gate: threading.Semaphore, stopped: threading.Event) -> Future[CompletedPrompt]:
        """Answers a prompt in a daemon thread, so that an interrupt does not wait for pending requests."""
        future: Future[CompletedPrompt] = Future()

        def run() -> None:
            with gate:
                if stopped.is_set():
                    return
                try:
                    future.set_result(self._answer(prompt))
                except Exception as error:
                    future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _result(self, prompt: Prompt, future: Future[CompletedPrompt]) -> CompletedPrompt:
        try:
            return future.result()
        except BadPrompt as error:
            message = f"{prompt.where}: {error}"
            if self.skip is None:
                raise RedrafterError(message) from None
            self.skip(message)
            return CompletedPrompt(prompt, [], Counter())

    def _answer(self, prompt: Prompt) -> CompletedPrompt:
        """Answers a prompt at all temperatures."""
        rows, counts = [], Counter[str]()
        for variant, temperature in enumerate(self.sampling.temperatures):
            seed = self.seeds[prompt.number * len(self.sampling.temperatures) + variant]
            row, tokens = self._answer_at(prompt, temperature, seed)
            cut = sum(reason == "length" for reason in row["finish_reasons"])
            rows.append(row)
            counts += Counter(rows=1, answers=len(row["finish_reasons"]), cut=cut, tokens=tokens)
        return CompletedPrompt(prompt, rows, counts)

    def _answer_at(self, prompt: Prompt, temperature: float, seed: int) -> tuple[dict[str, Any], int]:
        """One row, and the number of tokens that the server generated for it."""
        plan = plan_answers(prompt.record, prompt.where, **self.reading)
        sampling = self.sampling
        settings: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": float(temperature)}
        if temperature > 0:  # servers differ in the seeds that they accept
            optional = {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": seed % 2**31}
            settings |= {name: value for name, value in optional.items() if value is not None}
        row = row_labels(prompt, temperature)
        if plan.chat is not None:
            columns, tokens = self._converse(plan, settings)
            return row | columns, tokens
        text, reason, tokens = self.endpoint.answer(str(plan.prompt), settings)
        name = (
            "completion" if reason == "stop" else "text"
        )  # `completion` is learned with its end token, `text` without
        return row | {"prompt": plan.prompt, name: text, "finish_reasons": [reason]}, tokens

    def _converse(self, plan: AnswerPlan, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The columns of a chat row, and the number of generated tokens."""
        assert plan.chat is not None
        inputs = plan.chat.columns([])
        settings = settings | {name: value for name, value in inputs.items() if name != "messages"}
        messages: list[Message] = []
        reasons: list[str] = []
        total = 0
        for given in plan.given:
            try:
                answer, reason, tokens = self.endpoint.answer([*messages, *given], settings)
            except BadPrompt:
                if not messages:
                    raise
                break
            message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
            messages += [*given, message]
            reasons.append(reason)
            total += tokens
            if message.get("tool_calls"):  # the row's next turn does not reply to these calls
                break
        return {**inputs, "messages": messages, "finish_reasons": reasons}, total
