"""Decoding: generate ⊃ stream ⊃ step.

Promises the target's own text: drafted and undrafted decoding are the same loop over the same step.  The loop makes
one small read of the device a step.  Does not know files, prompts as text or commands.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from redrafter.core.rows import precise
from redrafter.decoding.settings import CompleteConfig
from redrafter.decoding.step import Emission, State, admit, empty, step
from redrafter.engine.compiled import compiled, of_any_length
from redrafter.engine.cuda_graph import Captured
from redrafter.engine.onednn_linear import optimize_linears
from redrafter.engine.request import Request, Row, check_rows, request
from redrafter.engine.results import Event, Finished, FinishReason, Generation, Stats, finished
from redrafter.engine.text import with_text
from redrafter.errors import RedrafterError
from redrafter.proposers import Method
from redrafter.targets.isolation import original
from redrafter.targets.locks import ModelLock
from redrafter.utils.memory import within_memory

BRIEF = 2e-3
"""Seconds of a step, below which the next is launched ahead: each hides some 0.1 ms of the host's, and the last of a
row's is lost."""


def stream(
    model: nn.Module,
    drafter: Method | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Decoding of a batch, an event for every row that a step advanced.

    `model` is a causal language model of transformers, or PEFT's or `torch.compile`'s wrapper around one.  `drafter` is
    a RecurrentDrafter, a `TwoModel`, a `PromptLookup` or any other `Method` of drafting, or a name that
    `redrafter.proposers.loading.load_method` takes: the folder or hub id of one, or "prompt-lookup"; what is named is
    loaded once for a model.  None, or `beam_length=0`, decodes autoregressively.  `input_ids` is a padded tensor or
    NumPy array [B, P] with its `attention_mask`, or a list of rows of any lengths, without padding.  Without
    `attention_mask` the padding of a tensor is found as in `model.generate`: by the padding token, if it is not an end
    token too.  `settings` are all that a `GenerationConfig` can say, and

    - `generation_config`: such a config; what is set nowhere is taken from the model's own, as in `model.generate`;
    - `beam_width`, `beam_length` (drafted tokens only), `node_budget`: told none of them, what `redrafter tune`
      found fastest for the batch, or else what the drafter was made for (`docs/methods.md` says what of others);
    - `batch_size`: rows decoded together at most (default: all); where one ends, the next one enters its slot;
    - `seed`: one for each row, or one from which row 0, 1, … get their own (default: torch's generator gives one).
      What is drawn at a position depends on the row's seed, the position and the model alone, never on the drafter
      or on other rows;
    - `logits_processor`, `stopping_criteria`: lists of transformers' objects; `prefix_allowed_tokens_fn`;
    - `presence_penalty`, `frequency_penalty`: of the tokens written, as OpenAI defines them;
    - `tokenizer`: puts text into the events; `stop_strings` need it;
    - `fast=False`: no CUDA graph of a step, nor any other means of `docs/speed.md`; the text is the same;
    - `compile=True`: where the kernels for trees run, the target's layers through torch.compile too, whose first
      step of a shape takes seconds, which the logger "redrafter" is told.

    A row ends at an end token or with a stop string, which are kept, by a criterion, after `max_new_tokens`, or
    where the model's context is full.  `docs/settings.md` lists every setting.

    The arguments are checked when this is called, not at the first event.  Raises RedrafterError.
    """
    return _stream(_request(model, drafter, input_ids, attention_mask, **settings))


def path_of(model: nn.Module) -> dict[str, str]:
    """How a model's steps are decoded on its device, in words, found out by taking a few of them."""
    asked = request(model, None, [[0]], generation_config=CompleteConfig(max_new_tokens=6))
    state = empty(asked.target, None, batch=1, slots=16)
    advance, turn = _stepping(asked, state)
    with turn, torch.inference_mode():
        admit(asked.target, None, asked.sampler, state, [0], asked.rows)
        for _ in range(4):
            state.set_visible(16)
            advance()
    return {
        "a step": "one CUDA graph" if advance.refused is None else f"call by call, for {advance.refused}",
        "attention": "kernels for trees" if asked.target.packs else "the model's own, with a mask",
    }


def generate(
    model: nn.Module,
    drafter: Method | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    streamer: BaseStreamer | None = None,
    on_row: Callable[[Finished], object] | None = None,
    **settings: Any,
) -> Generation:
    """Decoding of a batch: the text that the model writes alone, in fewer runs of it.

    Arguments as for `stream`.  `streamer` is one of transformers': it is given the prompts and then one token of every
    row at a time, as by `model.generate`, and its `end()` is called also where an error is raised, so that no reader
    waits for ever.  `on_row` is called with each row as it finishes.
    """
    begin = time.perf_counter()
    ended = []
    with ExitStack() as ending:
        if streamer is not None:
            ending.callback(streamer.end)
        asked = _request(model, drafter, input_ids, attention_mask, **settings)
        events = _stream(asked) if streamer is None else _fed(streamer, asked)
        for one in finished(events, rows=len(asked.rows), positions=asked.length):
            ended.append(one)
            if on_row is not None:
                on_row(one)
    ended.sort(key=lambda one: one.row)
    rows = [one.stats for one in ended]
    new = [one.new_tokens for one in ended]
    written = [torch.tensor(row.prompt + tokens) for row, tokens in zip(asked.rows, new, strict=True)]
    sequences = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=asked.pad)
    return Generation(
        sequences.to(asked.target.device),
        new,
        [one.finish_reason for one in ended],
        Stats.total(rows, seconds=time.perf_counter() - begin),
        texts=None if asked.tokenizer is None else [one.text for one in ended],
        scores=[one.scores for one in ended] if asked.output_scores else None,
        logits=[one.logits for one in ended] if asked.output_logits else None,
    )


def _request(model: nn.Module, drafter: Any, input_ids: Any, attention_mask: Any, **settings: Any) -> Request:
    asked = request(model, drafter, input_ids, attention_mask, **settings)
    check_rows(asked, input_ids)
    return asked


def _stream(asked: Request) -> Iterator[Event]:
    events = _within_memory(asked)
    return events if asked.tokenizer is None else with_text(events, asked.tokenizer)


def _within_memory(asked: Request) -> Iterator[Event]:
    """The events; memory that runs out is told with what to lower."""
    remedy = f"lower batch_size (now {asked.batch}), max_new_tokens or the beams that are drafted"
    events = _events(asked)
    while True:
        with within_memory(asked.target.device, remedy):  # left before each event, which the caller may never ask for
            event = next(events, None)
        if event is None:
            return
        yield event


def _fed(streamer: BaseStreamer, asked: Request) -> Iterator[Event]:
    """The events; a streamer is given the prompts [B, P], then the next token of every row, [B], once all rows have it.

    Rows that have ended are padded.  Raises RedrafterError for a streamer that refuses several rows.
    """
    prompts = [torch.tensor(row.prompt) for row in asked.rows]
    try:
        streamer.put(torch.nn.utils.rnn.pad_sequence(prompts, True, asked.pad, padding_side="left"))
    except ValueError as error:
        raise RedrafterError(f"The streamer refuses {len(prompts)} rows: {error}; stream() takes them.") from error
    waiting: list[deque[int]] = [deque() for _ in prompts]
    going = set(range(len(prompts)))
    for event in _stream(asked):
        waiting[event.row].extend(event.tokens)
        if event.finish_reason is not None:
            going.discard(event.row)
        while any(waiting) and all(waiting[row] for row in going):
            streamer.put(torch.tensor([row.popleft() if row else asked.pad for row in waiting]))
        yield event


def _events(asked: Request) -> Iterator[Event]:
    """The loop: rows enter free slots; one step, one small read, one event for each row that is still alive.

    Where steps are captured and brief, the next one is launched before the last is read; for a row that turns out to
    have ended it was in vain.
    """
    target, proposer, sampler, size = asked.target, asked.proposer, asked.sampler, asked.size
    reach = max(len(row.prompt) + row.budget for row in asked.rows)
    slots = reach + 2 * asked.length + 1 + size  # the last two steps may accept more than the row may still write
    state = empty(target, proposer, batch=asked.batch, slots=slots)
    waiting = iter(asked.rows)
    taken: dict[int, ActiveRow] = {}
    flying: deque[PendingStep] = deque()
    took = math.inf  # of the last step that was waited for, seconds
    advance, turn = _stepping(asked, state)
    while True:
        entering = dict(zip((slot for slot in range(asked.batch) if slot not in taken), waiting, strict=False))
        with turn, torch.inference_mode():
            if entering:
                rows = {slot: ActiveRow(row, slot, row.budget, len(row.prompt)) for slot, row in entering.items()}
                taken |= rows
                emitted = admit(target, proposer, sampler, state, list(entering), list(entering.values()))
                flight = PendingStep(list(enumerate(rows.values())), emitted, emitted.report)
            elif taken:
                begun, most = time.perf_counter(), 2 if _runs_ahead(asked, advance, took) else 1
                while len(flying) < most:
                    unread = len(flying) * (asked.length + 1)  # tokens, at most
                    if flying and all(one.left <= unread for one in taken.values()):
                        break
                    captured = advance.refused is None  # then what it sees cannot grow with the text
                    seen = max(one.committed for one in taken.values()) + unread + size
                    state.set_visible(slots if captured else seen)
                    flying.append(PendingStep.launched(taken, advance()))
                flight = flying.popleft()
            else:
                return
        reports = flight.read()
        if not entering and most == 1:
            took = time.perf_counter() - begun
        events = []
        for place, one in flight.rows:
            if taken.get(one.slot) is not one:
                continue  # ended by the step before
            event = one.event(asked, reports[place], state.place.text, flight.emitted, place)
            one.committed += 0 if entering else reports[place][0] + 1
            if event.finish_reason is not None:
                del taken[one.slot]
                with torch.inference_mode():
                    state.end(one.slot)
            events.append(event)
        del flight  # its logits are not kept while the caller looks at the events
        yield from events


def _runs_ahead(asked: Request, advance: Captured[Emission], took: float) -> bool:
    """Whether a step is launched before the last is read: not where more is read of it than its report."""
    return took < BRIEF and advance.replaying and not asked.output_scores and not asked.output_logits


def _stepping(asked: Request, state: State) -> tuple[Captured[Emission], ModelLock]:
    """The step of a call, optimized as the call allows, and the lock to run it under.

    Only the call's own copies of the models are changed.  Two calls do not run a model at the same time all the same:
    modules may keep state of their own, as those that accelerate offloads do.
    """
    target, proposer = asked.target, asked.proposer
    models = (target.module, *(proposer.modules if proposer else ()))
    lock = ModelLock(*map(original, models))
    layers = target.decoder_layers if asked.compile else []
    if layers:
        of_any_length(state.cache)

    def places() -> list[int]:
        return [next(chain(one.parameters(), one.buffers())).data_ptr() for one in models]

    def run() -> Emission:
        with compiled(layers):
            return step(target, proposer, asked.sampler, state)

    wanted = asked.fast and not asked.sampler.lazy
    advance = Captured(run, target.device, wanted=wanted, valid=lambda: places() == began)
    if advance.refused is None and len({one.device for model in models for one in model.parameters()}) > 1:
        advance.refuse("the model lies on several devices")
    with lock:
        if asked.fast:
            optimize_linears(*models, captured=advance.refused is None)
        if asked.fast and proposer is not None:
            proposer = proposer.quickened()
    began = places()  # merging moves weights
    return advance, lock


@dataclass(frozen=True)
class PendingStep:
    """What was launched and not yet read."""

    rows: list[tuple[int, ActiveRow]]
    """Whose it is, each with its place in the emission."""
    emitted: Emission
    report: Tensor
    landed: torch.cuda.Event | None = None
    """When the report is there."""

    @classmethod
    def launched(cls, taken: dict[int, ActiveRow], emitted: Emission) -> PendingStep:
        """A step of all rows; what the host will read of it is under way from a GPU."""
        rows = list(taken.items())
        if emitted.report.device.type != "cuda":
            return cls(rows, emitted, emitted.report)
        report = torch.empty_like(emitted.report, device="cpu", pin_memory=True)
        report.copy_(emitted.report, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(emitted.report.device))
        return cls(rows, emitted, report, landed)

    def read(self) -> list[list[int]]:
        """The report, row by row; waits for it."""
        if self.landed is not None:
            self.landed.synchronize()
        return self.report.tolist()  # type: ignore[no-any-return]


@dataclass
class ActiveRow:
    """A row that holds a slot."""

    row: Row
    slot: int
    left: int
    """Tokens that it may still write."""
    committed: int
    """Its slots of the cache."""
    scores: list[Tensor] = field(default_factory=list)
    """Those of its tokens, [1, V] each, for criteria that look at them."""

    def event(self, asked: Request, report: list[int], text: Tensor, emitted: Emission, place: int) -> Event:
        """Cuts the row's tokens of one step where the row ends; `place` is its place in the emission."""
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
                where = f"row {self.row.number}, position {begin + count - 1}"
                if bool(emitted.logits[place, emitted.path[place, count - 1]].max().isfinite()):
                    raise RedrafterError(f"The settings leave no token to choose at {where}.")
                raise RedrafterError(f"The model's logits for {where} hold NaN or infinity.")
            if token in asked.ends:
                reason = "eos"
            elif asked.criteria:
                if asked.output_scores:
                    self.scores.append(precise(emitted.choice.scores[place, emitted.path[place, count - 1]])[None])
                told = tuple(self.scores) if asked.output_scores else None
                if _stops(asked.criteria, text[self.slot : self.slot + 1, : begin + count], told):
                    reason = "stop"
            if reason is not None:
                tokens = tokens[:count]
                break
        self.left -= len(tokens)
        if reason is None and self.left == 0:
            reason = "length"
        nodes = emitted.path[place, : len(tokens)]
        return Event(
            self.row.number,
            tokens,
            min(accepted, len(tokens)),
            drafted,
            reason,
            scores=precise(emitted.choice.scores[place, nodes]) if asked.output_scores else None,
            logits=precise(emitted.logits[place, nodes]) if asked.output_logits else None,
        )


def _stops(criteria: list[StoppingCriteria], text: Int[Tensor, "1 T"], scores: tuple[Tensor, ...] | None) -> bool:
    answers = [criterion(text, scores) for criterion in criteria]  # a tensor, or as transformers allows a bool
    return any(bool(torch.as_tensor(answer).all()) for answer in answers)
