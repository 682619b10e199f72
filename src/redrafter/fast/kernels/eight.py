"""The product of a few rows with weights of 8 bits in Triton.

Promises what `redrafter.fast.eight.EightBit.plain` gives, up to rounding.  Imports triton, so it is imported on first
use.  The weights become the dtype of the rows, which holds them exactly, on their way to the tensor cores; sums are in
float32, and scaled there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.fast.kernels.drafting import as_rows

ROWS = 64  # of a program, at most
FEW = 16  # rows that one instruction of the tensor cores takes, at least
MANY_COLUMNS = 16_384  # from which on wider blocks still leave no processor without work


class Tiling(NamedTuple):
    """How a program goes about its work: powers of two, of weights in a block; blocks in flight; warps."""

    columns: int
    inner: int
    stages: int
    warps: int


# Of the other numbers triton must know whether 16 divides them, or it loads weights byte by byte.
@triton.jit(do_not_specialize=["rows"])
def _product(
    x, weight, scale, bias, out, rows, stride, N, K,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of rows and columns; WHOLE: blocks of the inner dimension divide it."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (m < rows)[:, None]
    read = tl.where(n < N, n, 0)  # what is read beyond the last column is not written
    x_ptr = x + m[:, None].to(tl.int64) * stride + k[None, :]
    w_ptr = weight + read[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if WHOLE:
            part = tl.load(x_ptr, mask=inside, other=0.0)
            w = tl.load(w_ptr)
        else:
            left = (k < K - start)[None, :]
            part = tl.load(x_ptr, mask=inside & left, other=0.0)
            w = tl.load(w_ptr, mask=left, other=0)
        total = tl.dot(part, tl.trans(w.to(part.dtype)), total, input_precision="ieee")
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    total *= tl.load(scale + read)[None, :]
    if BIAS:
        total += tl.load(bias + read).to(tl.float32)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], total, mask=inside & (n < N)[None, :])


def tiling_for(rows: int, columns: int, bytes_each: int) -> Tiling:
    """The fastest blocks of an H200 for rows of 2 bytes a number; of wider numbers half as many fit.

    `docs/log.md`, 2026-11-25, has the figures; `benchmarks/products.py --trial` tries others.
    """
    tile = Tiling(32, 256, 4, 4) if rows <= FEW and columns < MANY_COLUMNS else Tiling(64, 128, 3, 4)
    return tile if bytes_each <= 2 else tile._replace(inner=tile.inner // 2)


def product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """As `redrafter.fast.eight.EightBit.plain`, on the current device; `tiling` is for trials."""
    columns, inner = weight.shape
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    given = as_rows(x)
    rows = len(given)
    if not rows:
        return out
    tile = tiling or tiling_for(rows, columns, x.element_size())
    height = max(FEW, min(ROWS, triton.next_power_of_2(rows)))
    _product[(triton.cdiv(rows, height), triton.cdiv(columns, tile.columns))](
        given, weight.contiguous(), scale, scale if bias is None else bias, out, rows, given.stride(0), columns, inner,
        BIAS=bias is not None, WHOLE=inner % tile.inner == 0, STAGES=tile.stages,
        BLOCK_M=height, BLOCK_N=tile.columns, BLOCK_K=tile.inner, num_warps=tile.warps,
    )  # fmt: skip
    return out
