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

from redrafter.drafter import RecurrentDrafter, activated
from redrafter.fast import has_kernels

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
        if names is None:
            return cls(weight, table, None)
        rows = torch.zeros(config.vocab_size, dtype=torch.long, device=names.device)
        return cls(weight, table, rows.index_copy_(0, names, torch.arange(len(names), device=names.device)))

    def added(self, read: Float[Tensor, "B 1 exit"] | None) -> Tensor:
        """What every product of a draft adds: `read`, as `drafter.read` gives it; of one row as a bias."""
        assert read is not None  # other heads are not joined
        return nn.functional.pad(read.flatten(), (len(self.weight) - read.shape[-1], 0)) if len(read) == 1 else read

    def products(
        self, state: Float[Tensor, "B beams hidden"], added: Tensor
    ) -> tuple[Float[Tensor, "B beams hidden"], Float[Tensor, "B beams exit"]]:
        """`U s` for the next step, without bias, and what the head's first layer gives."""
        hidden = state.shape[-1]
        both = nn.functional.linear(state, self.weight, added if added.ndim == 1 else None)
        carried, first = both[..., :hidden], both[..., hidden:]
        return carried, first if added.ndim == 1 else first + added

    def moved(
        self,
        tokens: Int[Tensor, "B beams"],
        parents: Int[Tensor, "B beams"],
        carried: Float[Tensor, "B above hidden"],
    ) -> Float[Tensor, "B beams hidden"]:
        """The state after the tokens, drafted ones, from `carried` of the beam that each continues."""
        if not has_kernels(carried.device, carried.dtype):
            return self.plain_moved(tokens, parents, carried)
        from redrafter.fast.kernels import drafting

        with torch.cuda.device_of(carried):
            return drafting.moved(self.table, self.rows, tokens, parents, carried)

    def plain_moved(
        self,
        tokens: Int[Tensor, "B beams"],
        parents: Int[Tensor, "B beams"],
        carried: Float[Tensor, "B above hidden"],
    ) -> Float[Tensor, "B beams hidden"]:
        """As `moved`, on any device."""
        known = self.table[tokens if self.rows is None else self.rows[tokens]]
        return activated(known, carried.gather(1, parents[..., None].expand_as(known)))
