"""The product of a few rows with weights of 16 or 8 bits, and what follows it, in one launch of Triton.

Promises what `redrafter.kernels.product.plain` gives, up to rounding.  Imports triton, so it is imported on first use.
Weights of 8 bits become the dtype of the rows, which holds them exactly, on their way to the tensor cores; sums are in
float32, and scaled, activated and added to there, so that they are rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.kernels.triton.drafting import as_rows

ROWS = 64  # of a program, at most
FEW = 16  # rows that one instruction of the tensor cores takes, at least
BUSY = 128  # programs that leave few of a GPU's processors, 132 of an H100, without work
MANY_COLUMNS = 16_384  # from which on wider blocks still give every processor work
SMALL = 2**23  # numbers of a weight that the second cache keeps for a draft's next product with it


class Tiling(NamedTuple):
    """How a program goes about its work: powers of two, of rows and weights in a block; blocks in flight; warps.

    A lone row is multiplied and summed without tensor cores.
    """

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int


# Of the other numbers triton must know whether 16 divides them, or it loads weights one by one.
@triton.jit(do_not_specialize=["rows", "each"])
def _product(
    x, weight, scale, bias, onto, out, rows, each, begin, stride_x, stride_w, stride_o, N, K,
    SCALE: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ONTO: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of rows and columns; WHOLE: blocks of the inner dimension divide it.

    A row of the bias serves `each` rows; before the column `begin` there is nothing but the product.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (m < rows)[:, None]
    read = tl.where(n < N, n, 0)  # what is read beyond the last column is not written
    w_ptr = weight + read[:, None].to(tl.int64) * stride_w + k[None, :]
    if BLOCK_M == 1:
        x_ptr = x + tl.program_id(0).to(tl.int64) * stride_x + k
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if WHOLE:
                part = tl.load(x_ptr)
                w = tl.load(w_ptr)
            else:
                left = k < K - start
                part = tl.load(x_ptr, mask=left, other=0.0)
                w = tl.load(w_ptr, mask=left[None, :], other=0)
            products += part.to(tl.float32)[None, :] * w.to(tl.float32)
            x_ptr += BLOCK_K
            w_ptr += BLOCK_K
        total = tl.sum(products, 1)[None, :]
    else:
        x_ptr = x + m[:, None].to(tl.int64) * stride_x + k[None, :]
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
    if SCALE:
        total *= tl.load(scale + read)[None, :]
    m = m[:, None].to(tl.int64)
    n = n[None, :]
    written = inside & (n < N)
    after = n >= begin
    if BIAS:
        place = bias + m // each * (N - begin) + n - begin
        total += tl.load(place, mask=written & after, other=0.0).to(tl.float32)
    if SILU:
        total = tl.where(after, total / (1.0 + tl.exp(-total)), total)
    if ONTO:
        total += tl.load(onto + m * stride_o + n - begin, mask=written & after, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, total, mask=written)


def tiling_for(rows: int, weight: Tensor, wide: bool = False) -> Tiling:
    """The fastest blocks of an H100 and an H200; `wide`: of rows of more than 2 bytes a number half as many fit.

    `docs/log.md`, 2026-11-25 and 26, has figures; weights that were not measured are cut so that few processors are
    idle.  `benchmarks/products.py --trial` tries others.
    """
    columns, inner = weight.shape
    eight = weight.element_size() == 1
    least = 64  # columns that a block keeps, where it is cut
    if rows == 1 and not (eight or wide):
        tile = Tiling(1, 8, 1024, 3, 8) if columns * inner >= 2**25 else Tiling(1, 16, 256, 4, 4)
        least = 4
    elif rows > FEW or columns >= MANY_COLUMNS:
        tile = Tiling(max(FEW, min(ROWS, triton.next_power_of_2(rows))), 64, 128, 3 if eight else 4, 4)
    elif not eight and columns * inner <= SMALL:
        tile = Tiling(FEW, 32, 128, 3, 4) if columns >= 2048 else Tiling(FEW, 16, 256, 3, 4)
    else:
        tile = Tiling(FEW, 32, 256, 4, 4) if eight or columns < 8192 else Tiling(FEW, 32, 128, 4, 4)
        least = 16
    while tile.columns > least and triton.cdiv(columns, tile.columns) < BUSY:
        tile = tile._replace(columns=tile.columns // 2)
    return tile._replace(inner=tile.inner // 2) if wide else tile


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    onto: Tensor | None = None,
    silu: bool = False,
    begin: int = 0,
    tiling: Tiling | None = None,
) -> Tensor:
    """As `redrafter.kernels.product.plain`, on the current device; `tiling` is for trials."""
    columns, inner = weight.shape
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    given = as_rows(x)
    rows = len(given)
    if not rows:
        return out
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = tiling or tiling_for(rows, weight, x.element_size() > 2)
    added = given if onto is None else as_rows(onto)
    biases = given if bias is None else bias.reshape(-1, columns - begin).contiguous()
    _product[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
        given, weight, given if scale is None else scale, biases, added, out,
        rows, max(1, rows // len(biases)), begin, given.stride(0), weight.stride(0), added.stride(0), columns, inner,
        SCALE=scale is not None, BIAS=bias is not None, SILU=silu, ONTO=onto is not None,
        WHOLE=inner % tile.inner == 0, STAGES=tile.stages,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, num_warps=tile.warps,
    )  # fmt: skip
    return out
