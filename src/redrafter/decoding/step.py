"""The decode step, and how prompts are read.

Guarantees that drafted and undrafted decoding are the same function of tensors with fixed shapes; without a proposer, a
step is autoregressive decoding.  A step does not synchronize with the device unless a processor must see the text.
Prompts are read up to their last token, which is the first root: the first new token comes from a step like any other.
Does not know the loop around it, nor when rows finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.rows import PromptChunk, SamplingNoise, at_positions, precise
from redrafter.core.tree import DraftTree, chain, concatenated
from redrafter.decoding.sampling import Sampler, TargetTokens
from redrafter.decoding.state import Row, State
from redrafter.decoding.verify import walk
from redrafter.errors import RedrafterError
from redrafter.proposers import Proposer
from redrafter.targets.target import Target


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
    logprobs: Float[Tensor, "B path values"] | None
    """If requested: the log-probability of each token, then those of the most likely tokens, then their ids."""


class PromptPart(NamedTuple):
    """Tokens `start … stop - 1` of the prompt of a row in a slot."""

    slot: int
    row: Row
    start: int
    stop: int


@dataclass(frozen=True)
class Decoder:
    """The parts of a step: the target and a proposer (None for autoregressive decoding)."""

    target: Target
    proposer: Proposer | None

    @property
    def length(self) -> int:
        """L, the largest number of drafted tokens on a path; 0 without drafting."""
        return 0 if self.proposer is None else self.proposer.length

    @property
    def size(self) -> int:
        """N, the number of nodes of a tree."""
        return 1 if self.proposer is None else self.proposer.size

    def step(
        self, state: State, sampler: Sampler, reading: tuple[State, Int[Tensor, "E packed"]] | None = None
    ) -> Emission:
        """Draft, verify, keep: one forward pass of the target over one tree per row.  Updates the state.

        With `reading`, the same forward pass also reads prompt tokens, packed by `packed_parts` for N tokens per entry,
        into the complete state of which `state` is a part.  That needs the kernels for tree attention.
        """
        rows = state.rows
        noise = sampler.noise(rows, depths=self.length + 1, vocabulary=self.target.vocab_size)
        tree = self.draft(state, noise)
        if sampler.features.drafter_off and rows.drafting is not None:
            used = tree.valid & (rows.drafting == 1)[:, None]
            tree = replace(tree, valid=torch.cat((tree.valid[:, :1], used[:, 1:]), dim=1))
        if reading is None:
            hidden, logits = self.target.forward(tree, rows.length, state.cache, alive=rows.alive)
        else:
            hidden, logits = self._forward_both(tree, state, *reading)
        choice = sampler.choose(noise, tree, logits, rows)
        path, accepted = walk(tree, choice.tokens, length=self.length)
        if self.length:  # a path of the root alone is in place already
            state.cache.keep(path, rows.length)
        emitted = _emission(sampler.features.logprobs, accepted, tree.valid[:, 1:].sum(dim=1), path, choice, logits)
        index = torch.arange(self.length + 1, device=path.device)
        following = emitted.following
        if sampler.own:
            following = following.clamp(min=0)  # -1 if the walk stopped at the end of a text
        rows.text.scatter_(1, rows.length[:, None] + 1 + index, following)
        states = at_positions(hidden, path)
        new = rows.alive * (accepted + 1)  # none in slots that are free or whose prompts are being read
        state.context.copy_(_latest(state.context, states, new - 1))
        rows.length.add_(new)
        if reading is not None:
            whole, packed = reading
            whole.revive(packed[:, -2], packed[:, -1])
        return emitted

    def _forward_both(
        self, tree: DraftTree, state: State, whole: State, packed: Int[Tensor, "E packed"]
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "B N V"]]:
        """One forward pass over the trees of rows and over parts of prompts."""
        chunk, destination = _unpacked(packed)
        batch = len(tree.tokens)
        own = torch.arange(batch, device=tree.tokens.device)
        hidden, logits = self.target.forward(
            concatenated(tree, chain(chunk.tokens)),
            torch.cat((state.rows.length, chunk.begin)),
            whole.cache,
            rows=torch.cat((own, chunk.rows)),
            heads=batch,
            alive=torch.cat((state.rows.alive, torch.ones_like(chunk.rows))),
        )
        self._store(whole, chunk, destination, hidden[batch:])
        return hidden[:batch, : tree.size], logits[:, : tree.size]  # without the padding to the width of entries

    def draft(self, state: State, noise: SamplingNoise) -> DraftTree:
        """The tree to verify."""
        rows, root, target = state.rows, state.rows.root, self.target
        if self.proposer is None:
            return chain(root[:, None])
        on_cpu = target.device.type == "cpu"
        if on_cpu:  # reads the lengths, which a GPU would have to be waited for
            rows = replace(rows, text=rows.text[:, : int(rows.length.max()) + self.length + 1])
        proposed = self.proposer.propose(state.memory, rows, state.context[:, -self.proposer.positions :], noise)
        if proposed.size > self.proposer.size:
            raise RedrafterError(
                f"{type(self.proposer).__name__} proposed a tree of {proposed.size} nodes; its size is "
                f"{self.proposer.size}."
            )
        tree = proposed.bounded(root, length=self.length, vocabulary=target.vocab_size)
        return tree.trimmed() if on_cpu else tree

    def read(self, state: State, packed: Int[Tensor, "E packed"], *, from_start: bool = False) -> None:
        """Reads prompt tokens, packed by `packed_parts`.  `from_start`: all of them begin at position 0."""
        chunk, destination = _unpacked(packed, from_start)
        hidden = self.target.read_prompt(chunk, state.cache)
        self._store(state, chunk, destination, hidden)
        state.revive(packed[:, -2], packed[:, -1])

    def _store(
        self, state: State, chunk: PromptChunk, destination: Int[Tensor, " tokens"], hidden: Float[Tensor, "V N state"]
    ) -> None:
        """Writes the text, the states that the first draft reads, and the proposer's memory."""
        text, index = state.rows.text, torch.arange(chunk.tokens.shape[1], device=chunk.begin.device)
        where = chunk.rows[:, None], (chunk.begin[:, None] + index).clamp(max=text.shape[1] - 2)
        text.index_put_(where, chunk.tokens)
        text.index_put_((where[0], where[1] + 1), chunk.following)
        state.flat_context.index_copy_(0, destination, hidden.flatten(0, 1).to(state.flat_context.dtype))
        if self.proposer is not None:
            self.proposer.read(state.memory, chunk, hidden)


def packed_parts(
    parts: Sequence[PromptPart], state: State, *, width: int, entries: int | None = None
) -> Int[Tensor, "E packed"]:
    """Parts of prompts as one tensor on the host: entries of `width` tokens, padded to the number of `entries`.

    Per entry: the tokens, those after them, the rows of `State.flat_context` that receive their states, the first
    position, the slot, and whether the row is alive afterwards.
    """
    positions, nowhere = state.context.shape[1], len(state.flat_context) - 1
    count = sum(-(-(part.stop - part.start) // width) for part in parts)
    packed = torch.zeros((max(count, entries or 0), 3 * width + 3), dtype=torch.long)
    tokens, following, places, ends = packed.split((width, width, width, 3), dim=1)
    places.fill_(nowhere)
    ends[:, 0] = state.rows.text.shape[1] - width  # unused entries are written where no text reaches
    first = 0
    for slot, row, start, stop in parts:
        size = stop - start
        last = first - (-size // width)
        prompt = torch.tensor(row.prompt[start : stop + 1])
        begin = torch.arange(start, stop, width)
        own = slice(first, last)
        _filled(tokens[own], prompt[:-1])
        _filled(following[own], prompt[1:])
        place = slot * positions + positions - (len(row.prompt) - 1) + torch.arange(start, stop)
        _filled(places[own], place.where(place >= slot * positions, nowhere), nowhere)
        ends[own, 0], ends[own, 1] = begin, slot
        ends[last - 1, 2] = int(stop == len(row.prompt) - 1)
        first = last
    return packed


def _filled(lines: Int[Tensor, "lines width"], values: Int[Tensor, " size"], fill: int = 0) -> None:
    """Writes values line by line, with padding at the end of the last line."""
    lines.copy_(torch.nn.functional.pad(values, (0, lines.numel() - len(values)), value=fill).view_as(lines))


def tokens_of(parts: Sequence[PromptPart]) -> int:
    """The number of tokens in parts of prompts."""
    return sum(part.stop - part.start for part in parts)


def _unpacked(packed: Int[Tensor, "E packed"], from_start: bool = False) -> tuple[PromptChunk, Int[Tensor, " tokens"]]:
    """A chunk, and where the state of each of its tokens goes."""
    width = (packed.shape[1] - 3) // 3
    tokens, following, destination = islice(packed.split(width, dim=1), 3)
    return PromptChunk(tokens, following, packed[:, -3], packed[:, -2], from_start), destination.flatten()


def _latest(
    before: Float[Tensor, "B positions state"], after: Float[Tensor, "B M state"], end: Int[Tensor, " B"]
) -> Float[Tensor, "B positions state"]:
    """The last `positions` states up to and including entry `end` of `after`."""
    index = end[:, None] + 1 + torch.arange(before.shape[1], device=end.device)
    return at_positions(torch.cat((before, after), dim=1), index)


def _emission(
    most_likely: int | None,
    accepted: Int[Tensor, " B"],
    drafted: Int[Tensor, " B"],
    path: Int[Tensor, "B path"],
    choice: TargetTokens,
    logits: Float[Tensor, "B N V"],
) -> Emission:
    """The target's token after each node of the path is the token of the next node."""
    following = choice.tokens.gather(1, path)
    report = torch.cat((accepted[:, None], drafted[:, None], following, choice.is_finite.gather(1, path)), dim=1)
    logprobs = None
    if most_likely is not None:
        own = precise(at_positions(logits, path)).log_softmax(dim=-1)
        chosen = own.gather(2, following.clamp(min=0)[..., None])
        values, ids = own.topk(min(most_likely, own.shape[-1]), dim=-1)
        logprobs = torch.cat((chosen, values, ids.to(own.dtype)), dim=-1)  # ids below 2**24 are exact in float32
    return Emission(report, following, path, choice, logits, logprobs)
