"""The decode step, the state that it advances, and how rows enter it.

Guarantees that drafted and undrafted decoding are the same function of tensors with fixed shapes; without a proposer, a
step is autoregressive decoding.  A step does not synchronize with the device unless a processor must see the text.
Does not know the loop around it, nor when rows finish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise, at_positions
from redrafter.core.tree import DraftTree, chain
from redrafter.decoding.sampling import Sampler, TargetTokens
from redrafter.decoding.verify import walk
from redrafter.errors import RedrafterError
from redrafter.proposers import Proposer
from redrafter.targets.target import Target

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass; limits the memory of masks and activations."""


@dataclass(frozen=True)
class Row:
    """One text to write."""

    number: int
    prompt: list[int]
    seed: int
    """Seed of the sampling noise; unused in greedy decoding."""
    budget: int
    """Maximum number of new tokens."""


@dataclass(frozen=True)
class State:
    """Everything that a step passes to the next one, in tensors that are updated in place.  Rows are independent."""

    rows: RowState
    """The texts.  The last token, the root, was chosen by the target and is not yet in the cache."""
    context: Float[Tensor, "B positions state"]
    """The target's hidden states at the last positions; the target chose the root from the last of them."""
    cache: SlotCache
    memory: SlotCache | None
    """The proposer's memory, with extra slots for its drafts."""

    def set_visible(self, slots: int) -> None:
        """Limits attention to the first `slots` of the cache."""
        self.cache.window.visible = slots
        if self.memory is not None:
            self.memory.window.visible = slots + self.memory.slots - self.cache.slots

    def end(self, slot: int) -> None:
        """Frees a slot.  It stays at its beginning, which attention always sees, until another row enters."""
        self.rows.alive[slot], self.rows.length[slot] = 0, 1

    def insert_rows(self, slots: list[int], other: State) -> None:
        """Copies the rows of another state, with at most as many slots of text, into the given slots."""
        self.cache.insert_rows(slots, other.cache)
        if self.memory is not None and other.memory is not None:
            self.memory.insert_rows(slots, other.memory)
        index = torch.tensor(slots, device=self.context.device)
        self.context.index_copy_(0, index, other.context)
        for name, own in vars(self.rows).items():
            new = getattr(other.rows, name)
            (own[:, : new.shape[1]] if new.ndim == 2 else own).index_copy_(0, index, new)


@dataclass(frozen=True)
class Emission:
    """The output of one step."""

    report: Int[Tensor, "B report"]
    """Everything that the host reads of a step: per row, the numbers of accepted and of drafted tokens, `following`,
    and whether the score of each of these tokens is finite."""
    following: Int[Tensor, "B path"]
    """Accepted drafted tokens, then the target's next token.  Later entries, and those after an end token, are
    undefined."""
    path: Int[Tensor, "B path"]
    """The node after which each token was chosen."""
    choice: TargetTokens
    logits: Float[Tensor, "B N V"]


@dataclass(frozen=True)
class Decoder:
    """The parts of a step: the target, a proposer (None for autoregressive decoding) and a sampler."""

    target: Target
    proposer: Proposer | None
    sampler: Sampler

    @property
    def length(self) -> int:
        """L, the largest number of drafted tokens on a path; 0 without drafting."""
        return 0 if self.proposer is None else self.proposer.length

    @property
    def size(self) -> int:
        """N, the number of nodes of a tree."""
        return 1 if self.proposer is None else self.proposer.size

    def step(self, state: State) -> Emission:
        """Draft, verify, keep: one forward pass of the target over one tree per row.  Updates the state."""
        rows = state.rows
        noise = self.sampler.noise(rows, depths=self.length + 1, vocabulary=self.target.vocab_size)
        tree = self.draft(state, noise)
        hidden, logits = self.target.forward(tree, rows.length, state.cache)
        choice = self.sampler.choose(noise, tree, logits, rows)
        path, accepted = walk(tree, choice.tokens, length=self.length)
        if self.length:  # a path of the root alone is in place already
            state.cache.keep(path, rows.length)
        emitted = _emission(accepted, tree.valid[:, 1:].sum(dim=1), path, choice, logits)
        index = torch.arange(self.length + 1, device=path.device)
        following = emitted.following
        if self.sampler.lazy:
            following = following.clamp(min=0)  # -1 if the walk stopped at the end of a text
        rows.text.scatter_(1, rows.length[:, None] + 1 + index, following)
        states = at_positions(hidden, path)
        state.context.copy_(_latest(state.context, states, accepted))
        rows.length.add_(rows.alive * (accepted + 1))
        return emitted

    def draft(self, state: State, noise: SamplingNoise) -> DraftTree:
        """The tree to verify."""
        root, target = state.rows.root, self.target
        if self.proposer is None:
            return chain(root[:, None])
        proposed = self.proposer.propose(state.memory, state.rows, state.context, noise)
        if proposed.size > self.proposer.size:
            raise RedrafterError(
                f"{type(self.proposer).__name__} proposed a tree of {proposed.size} nodes; its size is "
                f"{self.proposer.size}."
            )
        tree = proposed.bounded(root, length=self.length, vocabulary=target.vocab_size)
        return tree.trimmed() if target.device.type == "cpu" else tree

    def prefill(self, entering: list[Row], state: State) -> Emission:
        """Fills all slots of a state: runs the prompts, chunk by chunk as chains, and chooses each row's first
        token."""
        rows, target = state.rows, self.target
        lengths = torch.tensor([len(row.prompt) for row in entering], device=target.device)
        prompts = [torch.tensor(row.prompt) for row in entering]
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(target.device)
        rows.row.copy_(torch.tensor([row.number for row in entering]))
        rows.seed.copy_(torch.tensor([row.seed for row in entering]))
        rows.text[:, : padded.shape[1]] = padded
        rows.length.copy_(lengths - 1)
        rows.alive.fill_(1)
        state.context.zero_()
        logits = self._run_prompts(padded, lengths, state)
        noise = self.sampler.noise(rows, depths=1, vocabulary=target.vocab_size)
        choice = self.sampler.choose(noise, chain(rows.root[:, None]), logits, rows)
        rows.text.scatter_(1, lengths[:, None], choice.tokens)
        rows.length.add_(1)
        none = torch.zeros_like(lengths)
        return _emission(none, none, none[:, None], choice, logits)

    def _run_prompts(
        self, padded: Int[Tensor, "B P"], lengths: Int[Tensor, " B"], state: State
    ) -> Float[Tensor, "B 1 V"]:
        """Runs padded prompts and returns the logits after each row's last token."""
        logits: Tensor | None = None
        for start in range(0, padded.shape[1], PREFILL_CHUNK):
            tokens = padded[:, start : start + PREFILL_CHUNK]
            last = lengths - 1 - start
            select = last.clamp(0, tokens.shape[1] - 1)
            state.set_visible(start + tokens.shape[1])
            begin = torch.full_like(lengths, start)
            hidden, output = self.target.forward(chain(tokens), begin, state.cache, select[:, None])
            if self.proposer is not None:
                self.proposer.read(state.memory, state.rows, hidden, start)
            unfinished = (last >= 0)[:, None, None]  # rows whose prompt did not end in an earlier chunk
            state.context.copy_(torch.where(unfinished, _latest(state.context, hidden, select), state.context))
            logits = output if logits is None else torch.where(unfinished, output, logits)
        assert logits is not None
        return logits

    def admit(self, state: State, slots: list[int], entering: list[Row]) -> Emission:
        """Rows enter the given slots of a running batch.  Other rows are not affected."""
        if len(slots) == len(state.context):
            return self.prefill(entering, state)
        longest = max(len(row.prompt) for row in entering)
        entered = self.empty(batch=len(slots), slots=longest + 1)
        emitted = self.prefill(entering, entered)
        state.insert_rows(slots, entered)
        return emitted

    @torch.inference_mode()  # compiled code distinguishes inference tensors, so all states must consist of them
    def empty(self, *, batch: int, slots: int) -> State:
        """A state of `batch` free slots for texts of `slots` positions each."""
        target = self.target

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=target.device)

        positions = 1 if self.proposer is None else self.proposer.positions
        rows = RowState(zeros(batch), zeros(batch), zeros(batch, slots), zeros(batch), zeros(batch))
        context = zeros(batch, positions, target.state_size, dtype=target.dtype)
        cache = target.new_cache(batch=batch, slots=slots)
        memory = None if self.proposer is None else self.proposer.memory(batch=batch, slots=slots)
        return State(rows, context, cache, memory)


def _latest(
    before: Float[Tensor, "B positions state"], after: Float[Tensor, "B M state"], end: Int[Tensor, " B"]
) -> Float[Tensor, "B positions state"]:
    """The last `positions` states up to and including entry `end` of `after`."""
    index = end[:, None] + 1 + torch.arange(before.shape[1], device=end.device)
    return at_positions(torch.cat((before, after), dim=1), index)


def _emission(
    accepted: Int[Tensor, " B"],
    drafted: Int[Tensor, " B"],
    path: Int[Tensor, "B path"],
    choice: TargetTokens,
    logits: Float[Tensor, "B N V"],
) -> Emission:
    """The target's token after each node of the path is the token of the next node."""
    following = choice.tokens.gather(1, path)
    report = torch.cat((accepted[:, None], drafted[:, None], following, choice.is_finite.gather(1, path)), dim=1)
    return Emission(report, following, path, choice, logits)
