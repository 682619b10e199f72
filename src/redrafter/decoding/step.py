"""One step of decoding and the state that it advances; how rows enter it.

Promises that drafted and undrafted decoding are one function over fixed-shape tensors: without a proposer the step is
autoregressive decoding.  It asks the device no question unless a processor must see the text.  Does not know the loop
around it, nor where rows end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState
from redrafter.core.tree import chain
from redrafter.decoding.sampling import Sampler, TargetTokens
from redrafter.decoding.verify import walk
from redrafter.engine.request import Row
from redrafter.errors import RedrafterError
from redrafter.proposers import Proposer
from redrafter.targets.target import Target

PREFILL_CHUNK = 512
"""Prompt tokens that one run of the target takes in; bounds the memory of masks and activations."""


@dataclass(frozen=True)
class State:
    """All that one step hands to the next, in tensors that it writes in place; rows are independent."""

    place: RowState
    """Where each row's text stands; its last token, the root, was chosen by the target and is not yet in the cache."""
    context: Float[Tensor, "B positions state"]
    """The target's hidden states at the last positions, the last of which is the one that it chose the root from."""
    cache: SlotCache
    memory: SlotCache | None
    """The proposer's own, with as many slots more than the cache as its drafts need."""

    def set_visible(self, slots: int) -> None:
        """Attention need not look beyond the first `slots` of the cache from now on."""
        self.cache.window.visible = slots
        if self.memory is not None:
            self.memory.window.visible = slots + self.memory.slots - self.cache.slots

    def end(self, slot: int) -> None:
        """The row of a slot has ended: it stays at its beginning, which attention always sees, until another enters."""
        self.place.alive[slot], self.place.length[slot] = 0, 1

    def insert_rows(self, slots: list[int], other: State) -> None:
        """Takes over the rows of a state, which has no more slots of text than this one, as the given rows."""
        self.cache.insert_rows(slots, other.cache)
        if self.memory is not None and other.memory is not None:
            self.memory.insert_rows(slots, other.memory)
        rows = torch.tensor(slots, device=self.context.device)
        self.context.index_copy_(0, rows, other.context)
        for name, own in vars(self.place).items():
            new = getattr(other.place, name)
            (own[:, : new.shape[1]] if new.ndim == 2 else own).index_copy_(0, rows, new)


@dataclass(frozen=True)
class Emission:
    """What one step wrote."""

    report: Int[Tensor, "B report"]
    """All that the host reads of a step: for each row the numbers of drafted tokens accepted and of those
    drafted, `following`, and whether each of those is is_finite."""
    following: Int[Tensor, "B path"]
    """Accepted drafted tokens, then the target's own next one; what comes after it, or after an end token, is not
    defined."""
    path: Int[Tensor, "B path"]
    """The node after which each token was chosen."""
    choice: TargetTokens
    logits: Float[Tensor, "B N V"]


def step(target: Target, proposer: Proposer | None, sampler: Sampler, state: State) -> Emission:
    """Draft, verify, keep: one run of the target over one tree a row.  Advances the state in place."""
    length = 0 if proposer is None else proposer.length
    place = state.place
    draw = sampler.draw(place, depths=length + 1, vocabulary=target.vocab_size)
    if proposer is None:
        tree = chain(place.root[:, None])
    else:
        proposed = proposer.propose(state.memory, place, state.context, draw)
        if proposed.size > proposer.size:
            raise RedrafterError(
                f"{type(proposer).__name__} proposed a tree of {proposed.size} nodes; its size is {proposer.size}."
            )
        tree = proposed.bounded(place.root, length=length, vocabulary=target.vocab_size)
    if target.device.type == "cpu":
        tree = tree.trimmed()
    hidden, logits = target.forward(tree, place.length, state.cache)
    choice = sampler.choose(draw, tree, logits, place)
    path, accepted = walk(tree, choice.tokens, length=length)
    if length:  # a path of the root alone already sits where it belongs
        state.cache.keep(path, place.length)
    emitted = _emission(accepted, tree.valid[:, 1:].sum(dim=1), path, choice, logits)
    index = torch.arange(length + 1, device=path.device)
    written = emitted.following
    if sampler.lazy:
        written = written.clamp(min=0)  # -1 where the walk broke off at the end of a text
    place.text.scatter_(1, place.length[:, None] + 1 + index, written)
    along = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
    state.context.copy_(_latest(state.context, along, accepted))
    place.length.add_(place.alive * (accepted + 1))
    return emitted


def prefill(target: Target, proposer: Proposer | None, sampler: Sampler, rows: list[Row], state: State) -> Emission:
    """Rows enter all slots of a state, in place: runs their prompts, chunk by chunk as chains, and chooses the first
    token of each.
    """
    place, device = state.place, target.device
    lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
    prompts = [torch.tensor(row.prompt) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    place.row.copy_(torch.tensor([row.number for row in rows]))
    place.seed.copy_(torch.tensor([row.seed for row in rows]))
    place.text[:, : padded.shape[1]] = padded
    place.length.copy_(lengths - 1)
    place.alive.fill_(1)
    state.context.zero_()
    logits: Tensor | None = None
    for start in range(0, padded.shape[1], PREFILL_CHUNK):
        tokens = padded[:, start : start + PREFILL_CHUNK]
        last = lengths - 1 - start
        select = last.clamp(0, tokens.shape[1] - 1)
        state.set_visible(start + tokens.shape[1])
        hidden, found = target.forward(chain(tokens), torch.full_like(lengths, start), state.cache, select[:, None])
        if proposer is not None:
            proposer.read(state.memory, place, hidden, start)
        here = (last >= 0)[:, None, None]  # rows whose prompt has not ended before this chunk
        state.context.copy_(torch.where(here, _latest(state.context, hidden, select), state.context))
        logits = found if logits is None else torch.where(here, found, logits)
    assert logits is not None
    draw = sampler.draw(place, depths=1, vocabulary=target.vocab_size)
    choice = sampler.choose(draw, chain(place.root[:, None]), logits, place)
    place.text.scatter_(1, lengths[:, None], choice.tokens)
    place.length.add_(1)
    none = torch.zeros_like(lengths)
    return _emission(none, none, none[:, None], choice, logits)


def admit(
    target: Target, proposer: Proposer | None, sampler: Sampler, state: State, slots: list[int], rows: list[Row]
) -> Emission:
    """Rows enter the given slots of a running batch, in place; its other rows do not notice."""
    if len(slots) == len(state.context):
        return prefill(target, proposer, sampler, rows, state)
    longest = max(len(row.prompt) for row in rows)
    entered = empty(target, proposer, batch=len(slots), slots=longest + 1)
    emitted = prefill(target, proposer, sampler, rows, entered)
    state.insert_rows(slots, entered)
    return emitted


@torch.inference_mode()  # compiled code tells such tensors from others, so all states must be of one kind
def empty(target: Target, proposer: Proposer | None, *, batch: int, slots: int) -> State:
    """A state of `batch` free slots for texts of `slots` positions each."""

    def none() -> Tensor:
        return torch.zeros(batch, dtype=torch.long, device=target.device)

    positions = 1 if proposer is None else proposer.positions
    text = torch.zeros((batch, slots), dtype=torch.long, device=target.device)
    context = torch.zeros((batch, positions, target.state_size), dtype=target.dtype, device=target.device)
    cache = target.new_cache(batch=batch, slots=slots)
    memory = None if proposer is None else proposer.memory(batch=batch, slots=slots)
    return State(RowState(none(), none(), text, none(), none()), context, cache, memory)


def _latest(
    before: Float[Tensor, "B positions state"], after: Float[Tensor, "B M state"], end: Int[Tensor, " B"]
) -> Float[Tensor, "B positions state"]:
    """The states of as many positions as before, up to each row's `end` in those that follow."""
    index = end[:, None] + 1 + torch.arange(before.shape[1], device=end.device)
    return torch.cat((before, after), dim=1).gather(1, index[..., None].expand(-1, -1, before.shape[-1]))


def _emission(
    accepted: Int[Tensor, " B"],
    drafted: Int[Tensor, " B"],
    path: Int[Tensor, "B path"],
    choice: TargetTokens,
    logits: Float[Tensor, "B N V"],
) -> Emission:
    """The choice after each node of the path is the next node's token."""
    following = choice.tokens.gather(1, path)
    report = torch.cat((accepted[:, None], drafted[:, None], following, choice.is_finite.gather(1, path)), dim=1)
    return Emission(report, following, path, choice, logits)
