"""Writing new keys and values into their slots, as one operator that torch.compile does not look into.

Promises what two `scatter_` along the slots give.  A scatter that torch.compile sees copies the whole cache, and two of
them are two launches; the kernel of `redrafter.kernels.triton.kv_write` writes both in one.  Does not know the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.kernels import has_kernels


@torch.library.custom_op(
    "redrafter::store",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor key, Tensor value) -> ()",
)
def store(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes `key` and `value` [B, heads, Q, size] into the slots [B, Q] of `keys` and `values` [B, heads, S, size]."""
    if has_kernels(keys.device, keys.dtype):
        from redrafter.kernels.triton.kv_write import launch

        with torch.cuda.device_of(keys):  # a model may be spread over several
            launch(keys, values, slots, key, value)
    else:
        scatter(keys, values, slots, key, value)


@store.register_fake
def _(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    return None


def scatter(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """The plain way, also for states that autocast has rounded."""
    for buffer, states in ((keys, key), (values, value)):
        buffer.scatter_(2, slots[:, None, :, None].expand_as(states), states.to(buffer.dtype))
