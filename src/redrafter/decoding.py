"""Decoding: generate ⊃ stream ⊃ step.

Promises the target's own text: drafted and undrafted decoding are the same loop over the same step, and without a
proposer the step is autoregressive decoding.  `step` is a function of fixed-shape tensors that asks the device no
question unless a processor must see the text; the loop around it makes one small read a step.  Does not know files,
prompts as text or commands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from redrafter.cache import SlotCache
from redrafter.drafter import RecurrentDrafter
from redrafter.errors import RedrafterError
from redrafter.fast.compiled import compiled, of_any_length
from redrafter.fast.graph import Captured
from redrafter.fast.packed import quicker
from redrafter.proposers import Proposer
from redrafter.request import Request, Row, request
from redrafter.results import Event, FinishReason, Generation, Stats, finished
from redrafter.sampling import Choice, Place, Sampler
from redrafter.target import Target
from redrafter.text import with_text
from redrafter.tree import chain
from redrafter.verify import walk

PREFILL_CHUNK = 512
"""Prompt tokens that one run of the target takes in; bounds the memory of masks and activations."""


@dataclass(frozen=True)
class State:
    """All that one step hands to the next, in tensors that it writes in place; rows are independent."""

    place: Place
    """Where each row's text stands; its last token, the root, was chosen by the target and is not yet in the cache."""
    context: Float[Tensor, "B positions state"]
    """The target's hidden states at the last positions, the last of which is the one that it chose the root from."""
    cache: SlotCache


@dataclass(frozen=True)
class Emission:
    """What one step wrote."""

    report: Int[Tensor, "B report"]
    """All that the host reads of a step: for each row the numbers of drafted tokens accepted and of those
    drafted, `following`, and whether each of those is sound."""
    following: Int[Tensor, "B path"]
    """Accepted drafted tokens, then the target's own next one; what comes after it is not defined."""
    path: Int[Tensor, "B path"]
    """The node after which each token was chosen."""
    choice: Choice
    logits: Float[Tensor, "B N V"]


def step(target: Target, proposer: Proposer | None, sampler: Sampler, state: State) -> Emission:
    """Draft, verify, keep: one run of the target over one tree a row.  Advances the state in place."""
    length = 0 if proposer is None else proposer.length
    place = state.place
    root = place.text.gather(1, place.length[:, None])[:, 0]
    draw = sampler.draw(place, depths=length + 1, vocabulary=target.vocab_size)
    tree = chain(root[:, None]) if proposer is None else proposer.propose(state.context.flatten(1), root, draw)
    if root.device.type == "cpu":
        tree = tree.trimmed()
    hidden, logits = target.forward(tree, place.length, state.cache)
    choice = sampler.choose(draw, tree, logits, place)
    path, accepted = walk(tree, choice.tokens, length=length)
    if length:  # a path of the root alone already sits where it belongs
        state.cache.keep(path, place.length)
    emitted = _emission(accepted, tree.valid.sum(dim=1) - 1, path, choice, logits)
    index = torch.arange(length + 1, device=path.device)
    place.text.scatter_(1, place.length[:, None] + 1 + index, emitted.following)
    along = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
    state.context.copy_(_latest(state.context, along, accepted))
    place.length.add_(place.alive * (accepted + 1))
    return emitted


def prefill(
    target: Target, sampler: Sampler, rows: list[Row], cache: SlotCache, *, slots: int, positions: int = 1
) -> tuple[State, Emission]:
    """Runs the rows' prompts, chunk by chunk as chains, and chooses the first token of each.

    `slots` hold a row's text; the state keeps what the target knows at the last `positions`.
    """
    device = target.device
    lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
    prompts = [torch.tensor(row.prompt) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    context = torch.zeros((len(rows), positions, target.state_size), dtype=target.dtype, device=device)
    logits: Tensor | None = None
    for start in range(0, padded.shape[1], PREFILL_CHUNK):
        tokens = padded[:, start : start + PREFILL_CHUNK]
        last = lengths - 1 - start
        select = last.clamp(0, tokens.shape[1] - 1)
        cache.window.visible = start + tokens.shape[1]
        hidden, found = target.forward(chain(tokens), torch.full_like(lengths, start), cache, select)
        here = (last >= 0)[:, None, None]  # rows whose prompt has not ended before this chunk
        context = torch.where(here, _latest(context, hidden, select), context)
        logits = found if logits is None else torch.where(here, found, logits)
    assert logits is not None
    place = Place(
        row=torch.tensor([row.number for row in rows], device=device),
        seed=torch.tensor([row.seed for row in rows], device=device),
        text=torch.nn.functional.pad(padded, (0, slots - padded.shape[1])),
        length=lengths - 1,
        alive=torch.ones_like(lengths),
    )
    end = chain(place.text.gather(1, place.length[:, None]))
    choice = sampler.choose(sampler.draw(place, depths=1, vocabulary=target.vocab_size), end, logits, place)
    place.text.scatter_(1, lengths[:, None], choice.tokens)
    none = torch.zeros_like(lengths)
    emitted = _emission(none, none, none[:, None], choice, logits)
    return State(replace(place, length=lengths), context, cache), emitted


def admit(target: Target, sampler: Sampler, state: State, slots: list[int], rows: list[Row]) -> Emission:
    """Rows enter the given slots of a running batch, in place; its other rows do not notice."""
    every = len(slots) == len(state.context)
    longest = max(len(row.prompt) for row in rows)
    cache = state.cache if every else target.new_cache(batch=len(slots), slots=longest)
    slots_of_text, positions = state.place.text.shape[1], state.context.shape[1]
    entered, emitted = prefill(target, sampler, rows, cache, slots=slots_of_text, positions=positions)
    if not every:
        state.cache.adopt(slots, cache)
    places = torch.tensor(slots, device=state.context.device)
    state.context.index_copy_(0, places, entered.context)
    for name, old in vars(state.place).items():
        old.index_copy_(0, places, getattr(entered.place, name))
    return emitted


def stream(
    model: nn.Module,
    drafter: RecurrentDrafter | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Decoding of a batch, an event for every row that a step advanced.

    `model` is a causal language model of transformers, or PEFT's wrapper around one.  `input_ids` is a padded tensor
    [B, P] with its `attention_mask`, or a list of rows of any lengths.  `drafter=None` or `beam_length=0` decodes
    autoregressively.  `settings` are all that a `GenerationConfig` can say, and

    - `generation_config`: such a config; what is set nowhere is taken from the model's own, as in `model.generate`;
    - `beam_width`, `beam_length` (drafted tokens only), `node_budget`: told none of them, what `redrafter tune`
      found fastest for the batch, or else what the drafter was made for;
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
    return _stream(request(model, drafter, input_ids, attention_mask, **settings))


def path_of(model: nn.Module) -> dict[str, str]:
    """How a model's steps are decoded on its device, in words, found out by taking a few of them."""
    asked = request(model, None, [[0]], max_new_tokens=6)
    state = _empty(asked.target, asked.target.new_cache(batch=1, slots=16), 1, 16, 1)
    with _stepping(asked, state) as advance, torch.inference_mode():
        admit(asked.target, asked.sampler, state, [0], asked.rows)
        for _ in range(4):
            state.cache.window.visible = 16
            advance()
    return {
        "a step": "one CUDA graph" if advance.refused is None else f"call by call, for {advance.refused}",
        "attention": "kernels for trees" if asked.target.packs else "the model's own, with a mask",
    }


def generate(
    model: nn.Module,
    drafter: RecurrentDrafter | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> Generation:
    """Decoding of a batch: the text that the model writes alone, in fewer runs of it.

    Arguments as for `stream`.  `streamer` is one of transformers', for a single row.
    """
    begin = time.perf_counter()
    asked = request(model, drafter, input_ids, attention_mask, **settings)
    if streamer is not None and len(asked.rows) > 1:
        raise RedrafterError(f"A streamer takes one row, not {len(asked.rows)}; use stream() for more.")
    events = _stream(asked) if streamer is None else _fed(streamer, asked)
    ended = sorted(finished(events, rows=len(asked.rows), positions=asked.length), key=lambda one: one.row)
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


def _stream(asked: Request) -> Iterator[Event]:
    events = _within_memory(asked)
    return events if asked.tokenizer is None else with_text(events, asked.tokenizer)


def _within_memory(asked: Request) -> Iterator[Event]:
    """The events; memory that runs out is told with what to lower."""
    try:
        yield from _events(asked)
    except torch.OutOfMemoryError as error:
        raise RedrafterError(
            f"The memory of {asked.target.device} is full: lower batch_size (now {asked.batch}), max_new_tokens or the "
            "beams that are drafted."
        ) from error


def _fed(streamer: BaseStreamer, asked: Request) -> Iterator[Event]:
    """The events of a single row, its tokens handed on to a streamer as they come."""
    streamer.put(torch.tensor([asked.rows[0].prompt]))
    for event in _stream(asked):
        streamer.put(torch.tensor(event.tokens))
        yield event
    streamer.end()


def _events(asked: Request) -> Iterator[Event]:
    """The loop: rows enter free slots; one step, one small read, one event for each row that is still alive."""
    target, sampler, size = asked.target, asked.sampler, asked.size
    reach = max(len(row.prompt) + row.budget for row in asked.rows)
    slots = reach + asked.length + size  # a last step may accept more than the row may still write
    state = _empty(target, target.new_cache(batch=asked.batch, slots=slots), asked.batch, slots, asked.positions)
    waiting = iter(asked.rows)
    taken: dict[int, _Writing] = {}
    with _stepping(asked, state) as advance:
        while True:
            entering = dict(zip((slot for slot in range(asked.batch) if slot not in taken), waiting, strict=False))
            if entering:
                taken |= {slot: _Writing(row, slot, row.budget, len(row.prompt)) for slot, row in entering.items()}
                places = {slot: place for place, slot in enumerate(entering)}
                with torch.inference_mode():
                    emitted = admit(target, sampler, state, list(entering), list(entering.values()))
                    reports = emitted.report.tolist()
            elif taken:
                places = {slot: slot for slot in taken}
                with torch.inference_mode():
                    captured = advance.refused is None  # then what it sees cannot grow with the text
                    seen = slots if captured else max(one.committed for one in taken.values()) + size
                    state.cache.window.visible = seen
                    emitted = advance()
                    reports = emitted.report.tolist()
                for slot, one in taken.items():
                    one.committed += reports[slot][0] + 1
            else:
                return
            events = []
            for slot, place in places.items():
                event = taken[slot].event(asked, reports[place], state.place.text, emitted, place)
                if event.finish_reason is not None:
                    del taken[slot]
                    with torch.inference_mode():
                        state.place.alive[slot] = 0
                events.append(event)
            del emitted  # its logits are not kept while the caller looks at the events
            yield from events


@contextmanager
def _stepping(asked: Request, state: State) -> Iterator[Captured[Emission]]:
    """The step of a call, made as fast as it was asked to be; the model is as it was when this is left.

    Raises RedrafterError where somebody moves the model meanwhile.
    """
    target = asked.target
    layers = target.decoder_layers if asked.compile else []
    weight = target.embed.weight.data_ptr()
    if layers:
        of_any_length(state.cache)

    def plain() -> Emission:
        with compiled(layers):
            return step(target, asked.proposer, asked.sampler, state)

    def unmoved() -> bool:
        return target.embed.weight.data_ptr() == weight

    advance = Captured(plain, target.device, wanted=asked.fast and not asked.sampler.lazy, valid=unmoved)
    drafters = asked.proposer.modules if asked.proposer else ()
    captured = advance.refused is None
    with target.evaluating(), quicker(target.model, *drafters, captured=captured) if asked.fast else nullcontext():
        yield advance


@dataclass
class _Writing:
    """A row that holds a slot."""

    row: Row
    slot: int
    left: int
    """Tokens that it may still write."""
    committed: int
    """Its slots of the cache."""

    def event(self, asked: Request, report: list[int], text: Tensor, emitted: Emission, place: int) -> Event:
        """Cuts the row's tokens of one step where the row ends; `place` is its place in the emission."""
        accepted, drafted, *following = report
        tokens, sound = following[: len(following) // 2], following[len(following) // 2 :]
        tokens = tokens[: min(accepted + 1, self.left)]
        begin = len(self.row.prompt) + self.row.budget - self.left
        if not all(sound[: len(tokens)]):
            first = sound.index(0)
            where = f"row {self.row.number}, position {begin + first}"
            if bool(emitted.logits[place, emitted.path[place, first]].max().isfinite()):
                raise RedrafterError(f"The settings leave no token to choose at {where}.")
            raise RedrafterError(f"The model's logits for {where} hold NaN or infinity.")
        reason: FinishReason | None = None
        for count, token in enumerate(tokens, start=1):
            if token in asked.ends:
                reason = "eos"
            elif asked.criteria and _stops(asked.criteria, text[self.slot : self.slot + 1, : begin + count]):
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
            scores=emitted.choice.scores[place, nodes] if asked.output_scores else None,
            logits=emitted.logits[place, nodes] if asked.output_logits else None,
        )


def _stops(criteria: list[StoppingCriteria], text: Int[Tensor, "1 T"]) -> bool:
    return any(bool(criterion(text, None).all()) for criterion in criteria)


def _latest(
    before: Float[Tensor, "B positions state"], after: Float[Tensor, "B M state"], end: Int[Tensor, " B"]
) -> Float[Tensor, "B positions state"]:
    """The states of as many positions as before, up to each row's `end` in those that follow."""
    index = end[:, None] + 1 + torch.arange(before.shape[1], device=end.device)
    return torch.cat((before, after), dim=1).gather(1, index[..., None].expand(-1, -1, before.shape[-1]))


def _empty(target: Target, cache: SlotCache, batch: int, slots: int, positions: int) -> State:
    """A state whose slots are all free."""

    def none() -> Tensor:
        return torch.zeros(batch, dtype=torch.long, device=target.device)

    text = torch.zeros((batch, slots), dtype=torch.long, device=target.device)
    context = torch.zeros((batch, positions, target.state_size), dtype=target.dtype, device=target.device)
    return State(Place(none(), none(), text, none(), none()), context, cache)


def _emission(
    accepted: Int[Tensor, " B"],
    drafted: Int[Tensor, " B"],
    path: Int[Tensor, "B path"],
    choice: Choice,
    logits: Float[Tensor, "B N V"],
) -> Emission:
    """The choice after each node of the path is the next node's token."""
    following = choice.tokens.gather(1, path)
    report = torch.cat((accepted[:, None], drafted[:, None], following, choice.sound.gather(1, path)), dim=1)
    return Emission(report, following, path, choice, logits)
