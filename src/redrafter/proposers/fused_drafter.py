"""The recurrent drafter's products, fewer and larger, for as long as its weights do not change.

A draft multiplies a few rows at a time, so each product costs its weights and a launch.  Two of them read one state,
the recurrence's `U s` and the state's half of the head's first layer: here they are one.  A third, the recurrence's
`W e`, has one result for each token, so all of them are known beforehand.  Promises the sums of the drafter's own
products, in another order at most.  Takes memory for the joined weights and for the table of `W e`.  Does not know
beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.kernels.product import activated, fused, product

LARGEST = 2**29
"""Bytes of a table at most."""


@dataclass(frozen=True)
class Joined:
    """Of one drafter: its `U` and the head's first layer as one weight, and what `W` gives for the tokens drafted."""

    weight: Float[Tensor, "joined hidden"]
    table: Float[Tensor, "head hidden"]
    """`W e + b` of the recurrence."""
    rows: Int[Tensor, " V"] | None
    """The table's row of each of the target's ids that can be drafted, where the draft vocabulary is its own."""
    block: bool
    """Whether the head begins with a block, whose result is added to context and state."""

    @classmethod
    def of(cls, drafter: RecurrentDrafter, embed: Callable[[Tensor], Tensor]) -> Joined | None:
        """The weights as they are now; None where nothing is joined: other forms of the head, and large tables.

        `embed` gives the embeddings of ids in the drafter's dtype.
        """
        config, reader = drafter.config, drafter.reader
        size = config.head_size * config.hidden_size * drafter.dtype.itemsize
        if not config.rnn or config.gated or reader is None or size > LARGEST:
            return None
        names = drafter.draft_vocabulary
        ids = torch.arange(config.head_size, device=drafter.device) if names is None else names
        with torch.no_grad():
            weight = torch.cat((drafter.rnn_u.weight, reader.weight[:, config.hidden_size :]))
            table = nn.functional.linear(embed(ids), drafter.rnn_w.weight, drafter.rnn_u.bias)
        block = drafter.begins_with_block
        if names is None:
            return cls(weight, table, None, block)
        rows = torch.zeros(config.vocab_size, dtype=torch.long, device=names.device)
        return cls(weight, table, rows.index_copy_(0, names, torch.arange(len(names), device=names.device)), block)

    def products(
        self,
        state: Float[Tensor, "B beams hidden"],
        seen: Float[Tensor, "B beams both"] | None,
        read: Float[Tensor, "B 1 exit"],
        *,
        last: bool = False,
    ) -> tuple[Float[Tensor, "B beams carried"], Float[Tensor, "B beams exit"]]:
        """`U s` for the next step, without bias, and what the head's projection or first block gives.

        `seen` and `read` are what the drafter's functions of these names give.  After the `last` state there is no step
        to prepare, and `U s` is empty.
        """
        begin = 0 if last else state.shape[-1]
        weight = self.weight[state.shape[-1] - begin :]
        if fused(state, weight):
            both = product(state, weight, read, onto=seen, silu=seen is not None, begin=begin)
            return both[..., :begin], both[..., begin:]
        flat = nn.functional.linear(state.flatten(0, 1), weight)  # a slice of more dimensions might be copied
        both = flat.unflatten(0, state.shape[:2])
        first = both[..., begin:]
        return both[..., :begin], first + read if seen is None else activated(first, read.expand_as(first), seen)

    def moved(
        self,
        tokens: Int[Tensor, "B beams"],
        parents: Int[Tensor, "B beams"],
        carried: Float[Tensor, "B above hidden"],
        context: Float[Tensor, "B 1 hidden"],
    ) -> tuple[Float[Tensor, "B beams hidden"], Float[Tensor, "B beams both"] | None]:
        """The state after the tokens, drafted ones, from `carried` of the beam that each continues; `drafter.seen`."""
        if not has_kernels(carried.device, carried.dtype):
            return self.plain_moved(tokens, parents, carried, context)
        from redrafter.kernels.triton import drafting

        with torch.cuda.device_of(carried):
            out = drafting.moved(self.table, self.rows, tokens, parents, carried, context if self.block else None)
        return out[..., -carried.shape[-1] :], out if self.block else None

    def plain_moved(
        self,
        tokens: Int[Tensor, "B beams"],
        parents: Int[Tensor, "B beams"],
        carried: Float[Tensor, "B above hidden"],
        context: Float[Tensor, "B 1 hidden"],
    ) -> tuple[Float[Tensor, "B beams hidden"], Float[Tensor, "B beams both"] | None]:
        """As `moved`, on any device."""
        known = self.table[tokens if self.rows is None else self.rows[tokens]]
        state = activated(known, carried.gather(1, parents[..., None].expand_as(known)))
        return state, torch.cat((context.expand_as(state), state), dim=-1) if self.block else None
