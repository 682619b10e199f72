"""The decode loop: rows enter free slots, and each step yields one event per row.

Guarantees that every row of a request finishes, in any order of entry.  Does not know how a step is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteria

from redrafter.core.rows import precise
from redrafter.decoding.step import Emission, Row
from redrafter.engine.request import Request
from redrafter.engine.results import Event, FinishReason
from redrafter.engine.runner import Runner, StepResult
from redrafter.errors import RedrafterError
from redrafter.kernels import kernels_enabled
from redrafter.utils.memory import within_memory


class Scheduler:
    """Assigns the rows of a request to slots and cuts steps into events."""

    def __init__(self, request: Request):
        self._request = request
        self._waiting = iter(request.rows)
        self._active: dict[int, ActiveRow] = {}
        """The row in each slot."""

    def events(self) -> Iterator[Event]:
        """Decodes all rows.  Raises RedrafterError if memory runs out, with the settings to lower."""
        request = self._request
        remedy = f"lower batch_size (now {request.batch}), max_new_tokens or the beams that are drafted"
        device = request.target.device
        with within_memory(device, remedy):
            runner = self._runner()
        while True:
            with within_memory(device, remedy):  # left before each event: the caller may never resume
                events = self._advance(runner)
            if events is None:
                return
            yield from events

    def _runner(self) -> Runner:
        request, decoder = self._request, self._request.decoder
        longest = max(len(row.prompt) + row.budget for row in request.rows)
        slots = longest + 2 * decoder.length + 1 + decoder.size  # the last two steps may exceed the budget
        with kernels_enabled(request.fast):
            state = decoder.empty(batch=request.batch, slots=slots)
        ahead = not request.output_scores and not request.output_logits
        return Runner(decoder, state, fast=request.fast, compile=request.compile, ahead=ahead)

    def _advance(self, runner: Runner) -> list[Event] | None:
        """Admits rows or runs a step; None after the last one."""
        free = (slot for slot in range(self._request.batch) if slot not in self._active)
        entering = dict(zip(free, self._waiting, strict=False))
        if entering:
            rows = {slot: ActiveRow(row, slot, row.budget, len(row.prompt)) for slot, row in entering.items()}
            self._active |= rows
            owners = list(enumerate(rows.values()))
            return self._events(runner, runner.admit(list(entering), list(entering.values()), owners), entered=True)
        if not self._active:
            return None
        rows = dict(self._active)
        committed = max(row.committed for row in rows.values())
        result = runner.step(list(rows.items()), committed, lambda tokens: any(r.left > tokens for r in rows.values()))
        return self._events(runner, result, entered=False)

    def _events(self, runner: Runner, result: StepResult, *, entered: bool) -> list[Event]:
        events = []
        for index, owner in result.owners:
            row: ActiveRow = owner
            if self._active.get(row.slot) is not row:
                continue  # it finished in an earlier step
            report = result.reports[index]
            event = row.event(self._request, report, runner.state.rows.text, result.emitted, index)
            row.committed += 0 if entered else report[0] + 1
            if event.finish_reason is not None:
                del self._active[row.slot]
                runner.end(row.slot)
            events.append(event)
        return events


@dataclass
class ActiveRow:
    """A row that occupies a slot."""

    row: Row
    slot: int
    left: int
    """Tokens that it may still write."""
    committed: int
    """Cache slots that it uses."""
    scores: list[Tensor] = field(default_factory=list)
    """Scores [1, V] of its tokens, for stopping criteria that read them."""

    def event(self, request: Request, report: list[int], text: Tensor, emitted: Emission, index: int) -> Event:
        """Cuts the tokens of one step where the row finishes.  `index` is the row's index in the emission."""
        accepted, drafted, *following = report
        tokens, is_finite = following[: len(following) // 2], following[len(following) // 2 :]
        tokens = tokens[: min(accepted + 1, self.left)]
        begin = len(self.row.prompt) + self.row.budget - self.left
        if accepted < 0:
            raise RedrafterError(
                f"The proposer returned a malformed tree for row {self.row.number}, position {begin}: node 0 must have "
                "depth 0 and no ancestor but itself."
            )
        reason: FinishReason | None = None
        for count, token in enumerate(tokens, start=1):
            if not is_finite[count - 1]:
                raise self._no_token(emitted.logits[index, emitted.path[index, count - 1]], begin + count - 1)
            if token in request.ends:
                reason = "eos"
            elif request.criteria:
                if request.output_scores:
                    self.scores.append(precise(emitted.choice.scores[index, emitted.path[index, count - 1]])[None])
                reason = self._stopped(request, text[self.slot : self.slot + 1, : begin + count])
            if reason is not None:
                tokens = tokens[:count]
                break
        self.left -= len(tokens)
        if reason is None and self.left == 0:
            reason = "length"
        nodes = emitted.path[index, : len(tokens)]
        return Event(
            self.row.number,
            tokens,
            min(accepted, len(tokens)),
            drafted,
            reason,
            scores=precise(emitted.choice.scores[index, nodes]) if request.output_scores else None,
            logits=precise(emitted.logits[index, nodes]) if request.output_logits else None,
        )

    def _stopped(self, request: Request, text: Int[Tensor, "1 T"]) -> FinishReason | None:
        """Whether a stopping criterion ends the row after this text.  Criteria receive scores if they are requested."""
        scores = tuple(self.scores) if request.output_scores else None
        return "stop" if any(_holds(criterion, text, scores) for criterion in request.criteria) else None

    def _no_token(self, logits: Tensor, position: int) -> RedrafterError:
        """The error for a position at which the largest score is not finite."""
        where = f"row {self.row.number}, position {position}"
        if bool(logits.max().isfinite()):
            return RedrafterError(f"The settings leave no token to choose at {where}.")
        return RedrafterError(f"The model's logits for {where} hold NaN or infinity.")


def _holds(criterion: StoppingCriteria, text: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
    result = criterion(text, scores)  # a tensor, or a bool, which transformers allows too
    return bool(torch.as_tensor(result).all())
