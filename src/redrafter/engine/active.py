"""A row that occupies a slot: cuts the results of steps where the row finishes.

Does not know other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteria

from redrafter.core.rows import precise
from redrafter.engine.pending import StepResult
from redrafter.engine.request import Task
from redrafter.engine.results import Event, FinishReason, TokenLogprob
from redrafter.errors import RedrafterError


@dataclass(eq=False)
class ActiveRow:
    """A row in a slot."""

    task: Task
    slot: int
    left: int = field(init=False)
    """Tokens that it may still write."""
    committed: int = field(init=False)
    """Cache slots that it uses once its prompt is read."""
    written: list[int] = field(default_factory=list)
    """Its new tokens."""
    scores: list[Tensor] = field(default_factory=list)
    """Scores [1, V] of its tokens, for stopping criteria that read them."""

    def __post_init__(self) -> None:
        self.left, self.committed = self.task.row.budget, self.to_read

    @property
    def to_read(self) -> int:
        """Tokens of the prompt to read before the first step: all but the last."""
        return len(self.task.row.prompt) - 1

    def outcome(self, result: StepResult, index: int, text: Int[Tensor, "B S"]) -> Event | Exception:
        """What a step brought: an event, or why the row cannot continue.

        `index` is the row's index in the step, `text` the texts of all slots.
        """
        try:
            event = self._event(result, index, text)
        except Exception as error:  # of any kind: it ends this row alone
            return error
        self.committed += result.reports[index][0] + 1
        return event

    def _event(self, result: StepResult, index: int, text: Int[Tensor, "B S"]) -> Event:
        row, emitted, task = self.task.row, result.emitted, self.task
        if row.processors is not None and row.processors.error is not None:
            raise row.processors.error
        report = result.reports[index]
        accepted, drafted, path = report[0], report[1], len(report) // 2 - 1
        count = min(accepted + 1, self.left)
        tokens, is_finite = report[2 : 2 + count], report[2 + path : 2 + path + count]
        begin = len(row.prompt) + row.budget - self.left
        if accepted < 0:
            raise RedrafterError(
                f"The proposer returned a malformed tree for row {row.number}, position {begin}: node 0 must have "
                "depth 0 and no ancestor but itself."
            )
        reason: FinishReason | None = None
        for count, token in enumerate(tokens, start=1):
            if not is_finite[count - 1]:
                raise self._no_token(emitted.logits[index, emitted.path[index, count - 1]], begin + count - 1)
            if token in task.ends:
                reason = "eos"
            elif task.criteria:
                if task.output_scores:
                    self.scores.append(precise(emitted.choice.scores[index, emitted.path[index, count - 1]])[None])
                reason = self._stopped(text[self.slot : self.slot + 1, : begin + count])
            if reason is not None:
                tokens = tokens[:count]
                break
        self.left -= len(tokens)
        self.written += tokens
        if reason is None and self.left == 0:
            reason = "length"
        event = Event(row.number, tokens, min(accepted, len(tokens)), drafted, reason)
        if task.output_scores or task.output_logits or row.logprobs is not None:
            self._add_details(event, result, index)
        return event

    def _add_details(self, event: Event, result: StepResult, index: int) -> None:
        """Adds scores, logits and log-probabilities, if they are requested."""
        emitted, count = result.emitted, len(event.tokens)
        if self.task.output_scores:
            event.scores = precise(emitted.choice.scores[index, emitted.path[index, :count]])
        if self.task.output_logits:
            event.logits = precise(emitted.logits[index, emitted.path[index, :count]])
        most = self.task.row.logprobs
        if most is not None and result.logprobs is not None:
            event.logprobs = [
                _logprob(token, values, most)
                for token, values in zip(event.tokens, result.logprobs[index], strict=False)
            ]

    def _stopped(self, text: Int[Tensor, "1 T"]) -> FinishReason | None:
        """Whether a stopping criterion ends the row after this text.  Criteria receive scores if they are requested."""
        scores = tuple(self.scores) if self.task.output_scores else None
        return "stop" if any(_holds(criterion, text, scores) for criterion in self.task.criteria) else None

    def _no_token(self, logits: Tensor, position: int) -> RedrafterError:
        """The error for a position at which the largest score is not finite."""
        where = f"row {self.task.row.number}, position {position}"
        if bool(logits.max().isfinite()):
            return RedrafterError(f"The settings leave no token to choose at {where}.")
        return RedrafterError(f"The model's logits for {where} hold NaN or infinity.")


def _logprob(token: int, values: list[float], most: int) -> TokenLogprob:
    """One token's entry of `Emission.logprobs`, cut to the `most` most likely tokens."""
    count = (len(values) - 1) // 2
    likely = [(int(one), value) for value, one in zip(values[1 : 1 + count], values[1 + count :], strict=True)]
    return TokenLogprob(token, values[0], likely[:most])


def _holds(criterion: StoppingCriteria, text: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
    result = criterion(text, scores)  # a tensor, or a bool, which transformers allows too
    return bool(torch.as_tensor(result).all())
