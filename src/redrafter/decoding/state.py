"""Rows of a batch: what the host knows of each, and everything that a step passes to the next one.

Guarantees that rows are independent: one may enter, end or move while others are being decoded.  All per-row numbers
are columns of one table, so that a row enters with one transfer to the device.  Does not know how a step is computed,
nor when rows finish.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.rows import Features, RowSettings, RowState
from redrafter.decoding.sampling import RowProcessors, Sampler
from redrafter.proposers import Proposer
from redrafter.targets.target import Target


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a row that a step holds as tensors.  The defaults are neutral."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""


GREEDY = Sampling()


@dataclass(frozen=True)
class Row:
    """One text to write."""

    number: int
    prompt: list[int]
    seed: int
    """Seed of the sampling noise; unused in greedy decoding."""
    budget: int
    """Maximum number of new tokens."""
    sampling: Sampling = GREEDY
    processors: RowProcessors | None = None
    """Processors that replace `sampling` in the choice of tokens."""
    drafting: bool = True
    """Whether drafts are verified."""
    logprobs: int | None = None
    """Number of most likely tokens whose log-probabilities are reported; None for no log-probabilities."""

    @cached_property
    def features(self) -> Features:
        """What the row requires of a step."""
        own = self.sampling
        return Features(
            sampling=own.do_sample,
            top_k=own.top_k and max(64, 1 << (own.top_k - 1).bit_length()),
            top_p=own.top_p < 1,
            min_p=own.min_p > 0,
            penalties=(own.repetition, own.presence, own.frequency) != (1, 0, 0),
            bias=bool(own.bias),
            drafter_off=not self.drafting,
            logprobs=self.logprobs,
        )


def settings_of(row: Row, *, count: int, vocabulary: int, device: torch.device) -> RowSettings:
    """The sampling settings of `count` rows that are all sampled as this one."""
    table = torch.tensor([_record(row)] * count, device=device)
    bias = None
    if row.sampling.bias:
        bias = torch.zeros((count, vocabulary), device=device)
        bias[:, [*row.sampling.bias]] = torch.tensor([*row.sampling.bias.values()], device=device)
    settings = _columns(table, table, bias).settings
    assert settings is not None
    return settings


def sampler_of(rows: Mapping[int, Row]) -> Sampler:
    """The sampler for rows by slot."""
    kinds = {row.features for row in rows.values()}
    if len(kinds) == 1:
        features = kinds.pop()
    else:
        logprobs = [one.logprobs for one in kinds if one.logprobs is not None]
        features = Features(
            sampling=any(one.sampling for one in kinds),
            top_k=max(one.top_k for one in kinds),
            top_p=any(one.top_p for one in kinds),
            min_p=any(one.min_p for one in kinds),
            penalties=any(one.penalties for one in kinds),
            bias=any(one.bias for one in kinds),
            drafter_off=any(one.drafter_off for one in kinds),
            logprobs=max(logprobs) if logprobs else None,
        )
    processors = {row.processors for row in rows.values()}
    if processors == {None}:
        return Sampler(features)
    shared = processors.pop() if len(processors) == 1 else None
    if shared is not None and not shared.lazy:
        return Sampler(features, shared)
    return Sampler(features, None, {slot: row.processors for slot, row in rows.items() if row.processors is not None})


_WHOLE = ("row", "seed", "length", "alive", "drafting", "sampled", "prompt", "top_k")
_REAL = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_LENGTH, _ALIVE = _WHOLE.index("length"), _WHOLE.index("alive")


@dataclass(frozen=True)
class State:
    """The texts of a batch and what decoding needs of them, in tensors that are updated in place."""

    table: Int[Tensor, "B columns"]
    """One column for each number of a row; floating point numbers as the bits of a float64."""
    rows: RowState
    """The texts.  The last token, the root, was chosen by the target and is not yet in the cache."""
    context: Float[Tensor, "B positions state"]
    """The target's hidden states at the last positions; the target chose the root from the last of them."""
    flat_context: Float[Tensor, "entries state"]
    """`context` of all rows of the batch, and a last entry for states that nobody needs."""
    cache: SlotCache
    memory: SlotCache | None
    """The proposer's memory, with extra slots for its drafts."""

    @classmethod
    @torch.inference_mode()  # compiled code distinguishes inference tensors, so all states must consist of them
    def empty(
        cls,
        target: Target,
        proposers: Sequence[Proposer | None],
        *,
        batch: int,
        slots: int,
        cache: SlotCache | None = None,
    ) -> State:
        """A state of `batch` free slots for texts of `slots` positions each, for any of the proposers.

        Proposers with a memory must not differ in their shape.  `cache` is that of another state of the same size.
        """
        device, used = target.device, [one for one in proposers if one is not None]
        positions = max([1, *(one.positions for one in used)])
        table = torch.tensor([_FREE] * batch, device=device)
        text = torch.zeros((batch, slots), dtype=torch.long, device=device)
        flat = torch.zeros((batch * positions + 1, target.state_size), dtype=target.dtype, device=device)
        context = flat[:-1].view(batch, positions, -1)
        memory = used[0].memory(batch=batch, slots=slots) if used else None
        cache = cache or target.new_cache(batch=batch, slots=slots)
        return cls(table, _columns(table, text), context, flat, cache, memory)

    @property
    def bias(self) -> Tensor | None:
        """Added to the logits [B, V]; None if no row has a bias."""
        return None if self.rows.settings is None else self.rows.settings.bias

    @property
    def batch(self) -> int:
        """Number of slots for rows."""
        return len(self.table)

    def first(self, count: int) -> State:
        """The first `count` rows, which share their memory with this state."""
        if count == self.batch:
            return self
        table, text, bias = self.table[:count], self.rows.text[:count], self.bias
        return State(
            table,
            _columns(table, text, None if bias is None else bias[:count]),
            self.context[:count],
            self.flat_context,
            self.cache.view(slice(count)),
            None if self.memory is None else self.memory.view(slice(count)),
        )

    @torch.inference_mode()
    def with_bias(self, vocabulary: int) -> State:
        """The same state, with room for biases."""
        bias = torch.zeros((self.batch, vocabulary), dtype=torch.float32, device=self.table.device)
        return replace(self, rows=_columns(self.table, self.rows.text, bias))

    def set_visible(self, slots: int) -> None:
        """Limits attention to the first `slots` of the cache."""
        self.cache.window.visible = slots
        if self.memory is not None:
            self.memory.window.visible = slots + self.memory.slots - self.cache.slots

    @torch.inference_mode()
    def enter(self, rows: Mapping[int, Row]) -> None:
        """Rows enter slots.  They are decoded once all but the last token of their prompts is read.

        Until then, steps of other rows do not affect them: what they write into these rows lies behind the prompt.
        """
        records = self._on_device([[slot, row.prompt[-1], *_record(row)] for slot, row in rows.items()])
        slots, roots = records[:, 0], records[:, 1]
        self.table.index_copy_(0, slots, records[:, 2:])
        self.rows.text.index_put_((slots, records[:, 2 + _LENGTH]), roots)
        short = [slot for slot, row in rows.items() if len(row.prompt) <= self.context.shape[1]]
        if short:
            self.context[short] = 0
        bias = self.bias
        if bias is not None:
            for slot, row in rows.items():
                bias[slot] = 0
                if row.sampling.bias:
                    bias[slot, [*row.sampling.bias]] = torch.tensor([*row.sampling.bias.values()], device=bias.device)

    @torch.inference_mode()
    def end(self, slots: Mapping[int, int]) -> None:
        """Frees slots, which keep the given number of positions, at least 1, until other rows enter.

        Steps write behind these positions.
        """
        before, after = _FREE[:_LENGTH], _FREE[_LENGTH + 1 :]
        records = self._on_device([[slot, *before, kept, *after] for slot, kept in slots.items()])
        self.table.index_copy_(0, records[:, 0], records[:, 1:])

    def revive(self, slots: Int[Tensor, " V"], alive: Int[Tensor, " V"]) -> None:
        """Marks the slots for which `alive` is 1 as being decoded; others keep their state.  Slots may repeat."""
        self.table[:, _ALIVE].scatter_reduce_(0, slots, alive, "amax")

    @torch.inference_mode()
    def copy(self, source: int, target: int, used: int) -> None:
        """Copies the first `used` positions of a slot's text and caches to a free slot."""
        self.rows.text[target, :used] = self.rows.text[source, :used]
        self.cache.copy_row(source, target, used)
        if self.memory is not None:
            self.memory.copy_row(source, target, used)

    @torch.inference_mode()
    def move(self, source: int, target: int, used: int) -> None:
        """Moves the row of a slot, whose cache uses `used` positions, to a free slot and frees the first."""
        self.copy(source, target, used)
        self.rows.text[target] = self.rows.text[source]
        self.table[target] = self.table[source]
        self.context[target] = self.context[source]
        if self.bias is not None:
            self.bias[target] = self.bias[source]
        self.end({source: 1})

    def _on_device(self, lines: list[list[int]]) -> Int[Tensor, "lines columns"]:
        """A table from the host, without waiting for the device."""
        table, device = torch.tensor(lines), self.table.device
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _columns(table: Int[Tensor, "B columns"], text: Tensor, bias: Tensor | None = None) -> RowState:
    whole = dict(zip(_WHOLE, table.unbind(1)[: len(_WHOLE)], strict=True))
    real = dict(zip(_REAL, table[:, len(_WHOLE) :].view(torch.float64).unbind(1), strict=True))
    own = {name: whole.pop(name) for name in ("row", "seed", "length", "alive", "drafting")}
    return RowState(**own, text=text, settings=RowSettings(**whole, **real, bias=bias))


def _record(row: Row) -> list[int]:
    """The entries of a row's line in the table."""
    sampling = row.sampling
    length = len(row.prompt) - 1
    whole = [row.number, row.seed, length, int(length == 0), int(row.drafting), int(sampling.do_sample)]
    real = struct.pack(f"{len(_REAL)}d", *(getattr(sampling, name) for name in _REAL))
    return [*whole, len(row.prompt), sampling.top_k, *struct.unpack(f"{len(_REAL)}q", real)]


_FREE = _record(Row(0, prompt=[0, 0], seed=0, budget=0))
"""A free slot: settings that change no score, as a processor of all rows may refuse what is not a number."""
