"""The kernel of `redrafter.kernels.kv_write`.  Imported on first use, because it needs triton."""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Positions per program."""


@triton.jit
def _kv_write(
    keys, values, slots, rows, key, value,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    from_kb, from_kh, from_kq, from_kd, from_vb, from_vh, from_vq, from_vd,
    heads, positions, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < positions
    slot = tl.load(slots + b * positions + row, mask=there, other=0)
    d = tl.arange(0, BLOCK)
    to = tl.load(rows + b) if MAPPED else b.to(tl.int64)
    b, h = b.to(tl.int64), h.to(tl.int64)
    inside = there[:, None] & (d < K)[None, :]
    part = tl.load(key + b * from_kb + h * from_kh + row[:, None] * from_kq + d[None, :] * from_kd, mask=inside)
    tl.store(keys + to * stride_kb + h * stride_kh + slot[:, None] * stride_ks + d[None, :], part, mask=inside)
    inside = there[:, None] & (d < V)[None, :]
    part = tl.load(value + b * from_vb + h * from_vh + row[:, None] * from_vq + d[None, :] * from_vd, mask=inside)
    tl.store(values + to * stride_vb + h * stride_vh + slot[:, None] * stride_vs + d[None, :], part, mask=inside)


def launch(keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None, key: Tensor, value: Tensor) -> None:
    """See `redrafter.kernels.kv_write`; runs on the current device.  The last dimension of the buffers is dense."""
    batch, heads, positions, size = key.shape
    block = triton.next_power_of_2(max(size, value.shape[-1]))
    _kv_write[(batch * heads, triton.cdiv(positions, ROWS))](
        keys, values, slots.contiguous(), slots if rows is None else rows.contiguous(), key, value,
        *keys.stride()[:3], *values.stride()[:3], *key.stride(), *value.stride(),
        heads, positions, K=size, V=value.shape[-1], BLOCK=block, ROWS=ROWS, MAPPED=rows is not None,
    )  # fmt: skip
