"""Writes new keys and values into their slots, as one operator that is opaque to torch.compile.

Equivalent to two `scatter_` calls along the slots.  torch.compile would copy the complete cache for a scatter, and two
calls are two launches; the kernel writes both in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.kernels import has_kernels


@torch.library.custom_op(
    "redrafter::kv_write",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor? rows, Tensor key, Tensor value) -> ()",
)
def kv_write(keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None, key: Tensor, value: Tensor) -> None:
    """Writes `key` and `value` [B, heads, Q, size] into the slots [B, Q] of `keys` and `values` [R, heads, S, size].

    `rows` [B] are the rows of the buffers that receive them; None if they are the first B in order.
    """
    if has_kernels(keys.device, keys.dtype):
        from redrafter.kernels.triton.kv_write import launch

        with torch.cuda.device_of(keys):  # a model may be on several devices
            launch(keys, values, slots, rows, key, value)
    else:
        scatter(keys, values, slots, rows, key, value)


@kv_write.register_fake
def _(keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None, key: Tensor, value: Tensor) -> None:
    return None


def scatter(keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None, key: Tensor, value: Tensor) -> None:
    """`kv_write` in PyTorch, also for states that autocast has rounded."""
    for buffer, states in ((keys, key), (values, value)):
        states = states.to(buffer.dtype)
        if rows is None:
            buffer.scatter_(2, slots[:, None, :, None].expand_as(states), states)
        else:  # [B, Q, heads, size], as indices on both sides of a slice put their dimensions first
            buffer[rows[:, None], :, slots] = states.transpose(1, 2)
