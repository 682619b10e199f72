"""One step of decoding and the state that it advances; how rows enter it.

Promises that drafted and undrafted decoding are one function over fixed-shape tensors: without a proposer the step is
autoregressive decoding.  It asks the device no question unless a processor must see the text.  Does not know the loop
around it, nor where rows end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.cache import SlotCache
from redrafter.proposers import Proposer
from redrafter.request import Row
from redrafter.sampling import Choice, Place, Sampler
from redrafter.target import Target
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


def _latest(
    before: Float[Tensor, "B positions state"], after: Float[Tensor, "B M state"], end: Int[Tensor, " B"]
) -> Float[Tensor, "B positions state"]:
    """The states of as many positions as before, up to each row's `end` in those that follow."""
    index = end[:, None] + 1 + torch.arange(before.shape[1], device=end.device)
    return torch.cat((before, after), dim=1).gather(1, index[..., None].expand(-1, -1, before.shape[-1]))


def empty(target: Target, cache: SlotCache, batch: int, slots: int, positions: int) -> State:
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
