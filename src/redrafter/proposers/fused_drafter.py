"""The recurrent drafter's layers combined into fewer, larger products, valid until a weight changes.

A draft multiplies few rows at a time, so each product costs a read of its weights and a launch.  The recurrence's `U s`
and the state's half of the head's first layer read the same state: they become one product.  The recurrence's `W e` has
one result per token: a table replaces it.  Guarantees the drafter's own sums, possibly in another order.  Takes memory
for the combined weight and the table.  Does not know beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.kernels.activation import silu_add

MAX_TABLE_BYTES = 2**29


@dataclass(frozen=True)
class FusedDrafter:
    """One drafter's combined weights."""

    weight: Float[Tensor, "both hidden"]
    """`U` and the head's first layer."""
    table: Float[Tensor, "head hidden"]
    """`W e + b` of the recurrence."""
    rows: Int[Tensor, " V"] | None
    """The table's row of each target id that can be drafted; None if all can."""
    block: bool
    """Whether the head begins with a residual block."""

    @classmethod
    def of(cls, drafter: RecurrentDrafter, embed: Callable[[Tensor], Tensor]) -> FusedDrafter | None:
        """The combined weights; None for other forms of the head and for tables above MAX_TABLE_BYTES.

        `embed` returns the embeddings of ids in the drafter's dtype.
        """
        config, reader = drafter.config, drafter.reader
        size = config.head_size * config.hidden_size * drafter.dtype.itemsize
        if not config.rnn or config.gated or reader is None or size > MAX_TABLE_BYTES:
            return None
        names = drafter.draft_vocabulary
        ids = torch.arange(config.head_size, device=drafter.device) if names is None else names
        with torch.no_grad():
            weight = torch.cat((drafter.rnn_u.weight, reader.weight[:, config.hidden_size :]))
            table = nn.functional.linear(embed(ids), drafter.rnn_w.weight, drafter.rnn_u.bias)
        rows = None
        if names is not None:
            rows = torch.zeros(config.vocab_size, dtype=torch.long, device=names.device)
            rows.index_copy_(0, names, torch.arange(len(names), device=names.device))
        return cls(weight, table, rows, drafter.begins_with_block)

    def products(
        self,
        state: Float[Tensor, "B beams hidden"],
        seen: Float[Tensor, "B beams both"] | None,
        read: Float[Tensor, "B 1 exit"],
        *,
        last: bool = False,
    ) -> tuple[Float[Tensor, "B beams carried"], Float[Tensor, "B beams exit"]]:
        """`U s` for the next step, without bias, and the output of the head's projection or first block.

        `seen` and `read` are the results of the drafter's methods of these names.  For the `last` state, `U s` is
        empty.
        """
        carried = 0 if last else state.shape[-1]
        weight = self.weight[state.shape[-1] - carried :]
        both = nn.functional.linear(state.flatten(0, 1), weight)  # a slice with more dimensions might be copied
        both = both.unflatten(0, state.shape[:2])
        first = both[..., carried:]
        first = first + read if seen is None else silu_add(first, read.expand_as(first), seen)
        return both[..., :carried], first

    def moved(
        self,
        tokens: Int[Tensor, "B beams"],
        parents: Int[Tensor, "B beams"],
        carried: Float[Tensor, "B above hidden"],
        context: Float[Tensor, "B 1 hidden"],
    ) -> tuple[Float[Tensor, "B beams hidden"], Float[Tensor, "B beams both"] | None]:
        """The state after the drafted tokens, and `drafter.seen` of it.

        `carried` is `products`' first result for the beams that `parents` refers to.
        """
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
        """`moved` in PyTorch, for any device."""
        known = self.table[tokens if self.rows is None else self.rows[tokens]]
        state = silu_add(known, carried.gather(1, parents[..., None].expand_as(known)))
        return state, torch.cat((context.expand_as(state), state), dim=-1) if self.block else None
