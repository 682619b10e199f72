"""Decoding: generate ⊃ stream ⊃ step.

Promises the target's own text: drafted and undrafted decoding are the same loop over the same step, and without a
proposer the step is autoregressive decoding.  `step` is a function of fixed-shape tensors that never asks the device a
question; the loop around it makes one small read a step.  Does not know files, prompts as text or commands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from redrafter.cache import SlotCache
from redrafter.drafter import RecurrentDrafter
from redrafter.errors import RedrafterError
from redrafter.proposers import Proposer, RecurrentProposer
from redrafter.results import Event, FinishReason, Generation, Stats, finished
from redrafter.sampling import Sampler, row_seeds
from redrafter.target import Target
from redrafter.tree import chain
from redrafter.verify import walk

PREFILL_CHUNK = 512
"""Prompt tokens that one run of the target takes in; bounds the memory of masks and activations."""


@dataclass(frozen=True)
class State:
    """All that one step hands to the next; rows are independent."""

    root: Int[Tensor, " B"]
    """The guaranteed token: chosen by the target, not yet in the cache."""
    context: Float[Tensor, "B H"]
    """The hidden state from which the target chose it."""
    length: Int[Tensor, " B"]
    """Committed slots of the cache."""
    alive: Int[Tensor, " B"]
    """1, or 0 for a row that has ended and no longer grows."""
    seed: Int[Tensor, " B"]
    """Of the row's noise; without meaning where decoding is greedy."""
    cache: SlotCache


@dataclass(frozen=True)
class Emission:
    """What one step wrote."""

    tokens: Int[Tensor, "B path"]
    """Accepted drafted tokens, then the target's own next one; what follows is not defined."""
    accepted: Int[Tensor, " B"]
    drafted: Int[Tensor, " B"]
    sound: Int[Tensor, "B path"]
    """1 where the logits that chose the token were numbers."""


def step(target: Target, proposer: Proposer | None, sampler: Sampler, state: State) -> tuple[State, Emission]:
    """Draft, verify, keep: one run of the target over one tree a row.

    Advances `state.cache` in place and returns the rest as a new state.
    """
    length = 0 if proposer is None else proposer.length
    draw = sampler.draw(state.seed, state.length + 1, depths=length + 1, vocabulary=target.vocab_size)
    tree = chain(state.root[:, None]) if proposer is None else proposer.propose(state.context, state.root, draw)
    if state.root.device.type == "cpu":
        tree = tree.trimmed()
    hidden, logits = target.forward(tree, state.length, state.cache)
    choice, score = draw.choose(logits, tree.depth)
    path, accepted = walk(tree, choice, length=length)
    if length:  # a path of the root alone already sits where it belongs
        state.cache.keep(path, state.length)
    end = path.gather(1, accepted[:, None])
    following = choice.gather(1, path)  # the choice after each node of the path is the next node's token
    advanced = replace(
        state,
        root=following.gather(1, accepted[:, None])[:, 0],
        context=hidden.gather(1, end[..., None].expand(-1, -1, hidden.shape[-1]))[:, 0],
        length=state.length + state.alive * (accepted + 1),
    )
    sound = score.isfinite().gather(1, path).long()
    return advanced, Emission(following, accepted, tree.valid.sum(dim=1) - 1, sound)


def prefill(
    target: Target, sampler: Sampler, prompts: list[list[int]], seeds: list[int], cache: SlotCache
) -> tuple[State, Emission]:
    """Runs the prompts, chunk by chunk as chains, and chooses the first token of every row."""
    device = target.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    seed = torch.tensor(seeds, device=device)
    draw = sampler.draw(seed, lengths, depths=1, vocabulary=target.vocab_size)
    root, sound = torch.zeros_like(lengths), torch.zeros_like(lengths)
    context = torch.zeros((len(prompts), target.hidden_size), dtype=target.dtype, device=device)
    for start in range(0, padded.shape[1], PREFILL_CHUNK):
        tokens = padded[:, start : start + PREFILL_CHUNK]
        last = lengths - 1 - start
        select = last.clamp(0, tokens.shape[1] - 1)
        cache.window.visible = start + tokens.shape[1]
        hidden, logits = target.forward(chain(tokens), torch.full_like(lengths, start), cache, select)
        here = select == last  # rows whose prompt ends in this chunk
        choice, score = draw.choose(logits, torch.zeros_like(lengths)[:, None])
        root = torch.where(here, choice[:, 0], root)
        sound = torch.where(here, score[:, 0].isfinite().long(), sound)
        context = torch.where(here[:, None], hidden[:, 0], context)
    none = torch.zeros_like(lengths)
    state = State(root, context, lengths, torch.ones_like(lengths), seed, cache)
    return state, Emission(root[:, None], none, none, sound[:, None])


def admit(
    target: Target, sampler: Sampler, state: State, slots: list[int], prompts: list[list[int]], seeds: list[int]
) -> tuple[State, Emission]:
    """Prompts enter the given slots of a running batch, whose other rows do not notice."""
    if len(slots) == len(state.root):
        return prefill(target, sampler, prompts, seeds, state.cache)
    cache = target.new_cache(batch=len(slots), slots=max(map(len, prompts)))
    entered, emitted = prefill(target, sampler, prompts, seeds, cache)
    state.cache.adopt(slots, cache)
    rows = torch.tensor(slots, device=state.root.device)

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, rows, new)

    return replace(
        state,
        root=put(state.root, entered.root),
        context=put(state.context, entered.context),
        length=put(state.length, entered.length),
        seed=put(state.seed, entered.seed),
    ), emitted


def stream(
    model: PreTrainedModel,
    drafter: RecurrentDrafter | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
) -> Iterator[Event]:
    """Decoding of a batch, an event for every row that a step advanced.

    `input_ids` is a padded tensor [B, P] with its `attention_mask`, or a list of rows of any lengths.  `drafter=None`
    decodes autoregressively.  `beam_width` and `beam_length` (drafted tokens only) default to what the drafter was made
    for, `eos_token_id` to the model's own; pass `()` to go on past them.  A row ends at an end token, which is kept,
    after `max_new_tokens`, or where the model's context is full.

    Greedy, or with `do_sample` by the law of transformers' `temperature`, `top_k`, `top_p` and `min_p`.  What is drawn
    at a position depends on the row's seed, the position and the model alone, never on the drafter or on other rows.
    `seed` is one for each row, or one from which row 0, 1, … get their own; without it torch's generator gives one.

    At most `batch_size` rows (default: all) are decoded together; where one ends, the next one enters its slot.

    The arguments are checked when this is called, not at the first event.  Raises RedrafterError.
    """
    target = Target(model)
    prompts = _rows(input_ids, attention_mask)
    _check_prompts(target, prompts, max_new_tokens)
    proposer = _proposer(target, drafter, beam_width, beam_length)
    ends = _end_tokens(model, eos_token_id)
    sampler = Sampler(do_sample, temperature, top_k, top_p, min_p)
    if seed is not None and not do_sample:
        raise RedrafterError("seed means nothing in greedy decoding: ask for do_sample, or leave it out.")
    seeds = row_seeds(seed, len(prompts)) if do_sample else [0] * len(prompts)
    budget = [max_new_tokens] * len(prompts)
    if target.context_length is not None:  # the last token written is never read again, so it needs no position
        budget = [min(max_new_tokens, target.context_length + 1 - len(p)) for p in prompts]
    if batch_size is not None and batch_size < 1:
        raise RedrafterError(f"batch_size must be at least 1, not {batch_size}.")
    return _events(target, proposer, sampler, prompts, seeds, budget, ends, batch_size or len(prompts))


def generate(
    model: PreTrainedModel,
    drafter: RecurrentDrafter | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
) -> Generation:
    """Decoding of a batch: the text that the model writes alone, in fewer runs of it.

    Arguments as for `stream`; `pad_token_id` fills the rows of `sequences` (default: the model's own, else 0).
    """
    prompts = _rows(input_ids, attention_mask)
    events = stream(
        model,
        drafter,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        beam_width=beam_width,
        beam_length=beam_length,
        eos_token_id=eos_token_id,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    begin = time.perf_counter()
    positions = 0 if drafter is None else drafter.config.beam_length if beam_length is None else beam_length
    ended = sorted(finished(events, rows=len(prompts), positions=positions), key=lambda one: one.row)
    rows = [one.stats for one in ended]
    total = Stats(
        steps=sum(r.steps for r in rows),
        tokens=sum(r.tokens for r in rows),
        drafted=sum(r.drafted for r in rows),
        accepted=sum(r.accepted for r in rows),
        accepted_by_position=[sum(r.accepted_by_position[i] for r in rows) for i in range(positions)],
        seconds=time.perf_counter() - begin,
        rows=rows,
    )
    new = [one.new_tokens for one in ended]
    if pad_token_id is None:
        pad_token_id = getattr(model.generation_config, "pad_token_id", None) or 0
    sequences = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(p + n) for p, n in zip(prompts, new, strict=True)], batch_first=True, padding_value=pad_token_id
    )
    return Generation(sequences.to(model.device), new, [one.finish_reason for one in ended], total)


def _events(
    target: Target,
    proposer: Proposer | None,
    sampler: Sampler,
    prompts: list[list[int]],
    seeds: list[int],
    budget: list[int],
    ends: frozenset[int],
    batch: int,
) -> Iterator[Event]:
    """The loop: prompts enter free slots; one step, one small read, one event for each row that is still alive."""
    batch = min(batch, len(prompts))
    size = 1 if proposer is None else proposer.size
    over = 0 if proposer is None else proposer.length  # a last step may accept more than the row may still write
    reach = max(len(p) + b for p, b in zip(prompts, budget, strict=True))
    state = _empty(target, target.new_cache(batch=batch, slots=reach + over + size), batch)
    waiting = iter(range(len(prompts)))
    rows: dict[int, int] = {}  # the row in each slot that is taken
    left: dict[int, int] = {}  # tokens that each of them may still write
    committed: dict[int, int] = {}  # its slots of the cache

    def event(slot: int, accepted: int, drafted: int, tokens: list[int], sound: list[int]) -> Event:
        """Cuts a row's tokens at its end and takes note of it."""
        row = rows[slot]
        tokens = tokens[: min(accepted + 1, left[row])]
        if not all(sound[: len(tokens)]):
            position = len(prompts[row]) + budget[row] - left[row] + sound.index(0)
            raise RedrafterError(f"The model's logits for row {row}, position {position} hold NaN or infinity.")
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        if stop is not None:
            tokens = tokens[: stop + 1]
        left[row] -= len(tokens)
        reason: FinishReason | None = "eos" if stop is not None else "length" if left[row] == 0 else None
        if reason is not None:
            del rows[slot]
        return Event(row, tokens, min(accepted, len(tokens)), drafted, reason)

    with target.evaluating():
        while True:
            entering = list(zip((slot for slot in range(batch) if slot not in rows), waiting, strict=False))
            if entering:
                slots, new = [slot for slot, _ in entering], [row for _, row in entering]
                rows |= dict(entering)
                left |= {row: budget[row] for row in new}
                committed |= {row: len(prompts[row]) for row in new}
                with torch.inference_mode():
                    state, emitted = admit(
                        target, sampler, state, slots, [prompts[row] for row in new], [seeds[row] for row in new]
                    )
                    read = dict(zip(slots, _read(emitted), strict=True))
            elif rows:
                with torch.inference_mode():
                    alive = torch.tensor([int(slot in rows) for slot in range(batch)])
                    state = replace(state, alive=alive.to(target.device, non_blocking=True))
                    state.cache.window.visible = max(committed[row] for row in rows.values()) + size
                    state, emitted = step(target, proposer, sampler, state)
                    read = dict(enumerate(_read(emitted)))
                for slot, row in rows.items():
                    committed[row] += read[slot][0] + 1
            else:
                return
            yield from [event(slot, *read[slot]) for slot in read if slot in rows]


def _empty(target: Target, cache: SlotCache, batch: int) -> State:
    """A state whose slots are all free."""
    none = torch.zeros(batch, dtype=torch.long, device=target.device)
    context = torch.zeros((batch, target.hidden_size), dtype=target.dtype, device=target.device)
    return State(none, context, none, none, none, cache)


def _read(emitted: Emission) -> list[tuple[int, int, list[int], list[int]]]:
    """One read of the device: accepted and drafted tokens, tokens and their soundness, for every row."""
    path = emitted.tokens.shape[1]
    counts = torch.stack((emitted.accepted, emitted.drafted), dim=1)
    read = torch.cat((counts, emitted.tokens, emitted.sound), dim=1).tolist()
    return [(row[0], row[1], row[2 : 2 + path], row[2 + path :]) for row in read]


def _rows(input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """Prompts as lists of ids, padding removed."""
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise RedrafterError("An attention mask goes with a tensor of input ids, not with a list of rows.")
        return [list(row) for row in input_ids]
    if input_ids.ndim != 2:
        raise RedrafterError(f"input_ids must have two dimensions, rows and tokens, not {input_ids.ndim}.")
    if attention_mask is None:
        return input_ids.tolist()  # type: ignore[no-any-return]
    if attention_mask.shape != input_ids.shape:
        raise RedrafterError(
            f"The attention mask's shape {tuple(attention_mask.shape)} is not that of the input ids "
            f"{tuple(input_ids.shape)}."
        )
    kept = attention_mask.bool()
    if bool(((kept[:, 1:] != kept[:, :-1]).sum(dim=1) + kept[:, 0].int() > 2).any()):
        raise RedrafterError("The attention mask has holes: pad each row at one or both ends only.")
    return [row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)]


def _check_prompts(target: Target, prompts: list[list[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise RedrafterError("There is no prompt.")
    if max_new_tokens < 1:
        raise RedrafterError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise RedrafterError(f"The prompt of row {row} is empty; give it at least one token.")
        if target.context_length is not None and len(prompt) > target.context_length:
            raise RedrafterError(
                f"The prompt of row {row} has {len(prompt)} tokens, the model's context {target.context_length}."
            )
        if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
            raise RedrafterError(f"The prompt of row {row} holds ids outside the vocabulary of {target.vocab_size}.")


def _proposer(
    target: Target, drafter: RecurrentDrafter | None, width: int | None, length: int | None
) -> RecurrentProposer | None:
    if drafter is None:
        return None
    config = drafter.config
    target.check_drafter(config)
    width = config.beam_width if width is None else width
    length = config.beam_length if length is None else length
    if length < 1:
        raise RedrafterError(f"beam_length must be at least 1, not {length}; pass drafter=None to decode without one.")
    if not 1 <= width <= config.head_size:
        raise RedrafterError(f"beam_width must lie between 1 and the drafter's {config.head_size} tokens, not {width}.")
    if drafter.device != target.device:
        raise RedrafterError(f"The drafter is on {drafter.device}, the model on {target.device}; move one of them.")
    return RecurrentProposer(drafter, target, width, length)


def _end_tokens(model: PreTrainedModel, told: int | Sequence[int] | None) -> frozenset[int]:
    ends = getattr(model.generation_config, "eos_token_id", None) if told is None else told
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
