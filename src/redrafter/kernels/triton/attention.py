"""Tree attention: keys are split among programs, and partial results are merged.

Guarantees the results of `redrafter.core.tree_attention.reference`, up to rounding, for any content of slots that no
node sees.  Imported on first use, because it needs triton.  Does not know trees, only their bit mask.

Flash attention over split keys as in arXiv 2205.14135 and Flash-Decoding; logits are kept in base 2.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_PROCESSOR = 3  # for few queries; one for many, whose partial results are large
RESIDENT = 2  # programs that share a processor's shared memory
MAX_SPLITS, LEAST_KEYS = 32, 128  # splits of the keys; keys per split
KEYS = 32  # per block that contains tree slots: its part of the mask is in two words
STAGES = 3  # blocks in flight for few queries; one more for many
ROWS = 128  # limit on the queries of a block
SHARED_MEMORY = 96 << 10  # bytes per processor, if it is unknown


class Tiling(NamedTuple):
    """Block sizes of a program.  `rows`, and `keys` per block of committed slots, are powers of two up to 128."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _block(
    acc, top, total, q, k_base, v_base, mask_row, mask_base, depth, start, end, length, words,
    stride_ks, stride_vs, stride_mn, scale, softcap,
    TREE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One block of keys from slot `start`.  With TREE it may contain tree slots and unwritten slots."""
    slot = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    k_ptr = k_base + start.to(tl.int64) * stride_ks + tl.arange(0, BLOCK_N)[:, None] * stride_ks + d[None, :]
    v_ptr = v_base + start.to(tl.int64) * stride_vs + tl.arange(0, BLOCK_N)[:, None] * stride_vs + dv[None, :]
    if TREE:
        k = tl.load(k_ptr, mask=(slot < end)[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_ptr, mask=(slot < end)[:, None] & (dv < DV)[None, :], other=0.0)
    else:
        k = tl.load(k_ptr) if D == BLOCK_D else tl.load(k_ptr, mask=(d < D)[None, :], other=0.0)
        v = tl.load(v_ptr) if DV == BLOCK_DV else tl.load(v_ptr, mask=(dv < DV)[None, :], other=0.0)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:  # tanh; overflow gives 1
        logit = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit)))

    if TREE:
        node = slot - length
        known = (node >= 0) & (slot < end)
        word = tl.maximum(start - length, 0) // 32  # a block of at most 32 keys has its bits in two words
        low = tl.load(mask_row + 3 + word)
        high = tl.load(mask_row + 4 + word, mask=word + 1 < words, other=0)
        bits = (low | (high << 32))[:, None] >> tl.where(known, node - 32 * word, 0)[None, :]
        seen = (node < 0)[None, :] | (known[None, :] & ((bits & 1) != 0))
        if WINDOW > 0:
            at = tl.where(known, node, 0)
            distance = tl.where(node < 0, node, tl.load(mask_base + at * stride_mn + 1).to(tl.int32))
            seen = seen & (depth[:, None] - distance[None, :] < WINDOW)
        logit = tl.where(seen, logit, float("-inf"))
    else:
        if WINDOW > 0:
            logit = tl.where(depth[:, None] - (slot - length)[None, :] < WINDOW, logit, float("-inf"))

    higher = tl.maximum(top, tl.max(logit, 1))  # always finite, so that a row that sees nothing keeps 0
    weight = tl.exp2(logit - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit(do_not_specialize=["stride_mb", "stride_mn", "words", "slots", "nodes", "splits"])
def _attend(
    query, key, value, mask, sinks, out, part, tops, totals,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mn, words, slots, nodes, splits, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WHOLE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The queries of one key head, row = node * GROUP + head in group, over a split of its keys, or all (WHOLE).

    Splits consist of blocks of BLOCK_C committed keys, and of BLOCK_N keys where tree slots begin.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)  # of row and key head
    b = (pair // HEADS).to(tl.int64)
    h = pair % HEADS
    rows = nodes * GROUP
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.where(inside, row, 0)
    n = row // GROUP
    head = h * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    q_ptr = query + b * stride_qb + (head.to(tl.int64) * stride_qh + n * stride_qn)[:, None] + d[None, :]
    q = tl.load(q_ptr, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    mask_base = mask + b * stride_mb
    mask_row = mask_base + n * stride_mn
    cached = tl.load(mask_base + 2)  # the row's row of keys and values
    k_base = key + cached * stride_kb + h.to(tl.int64) * stride_kh
    v_base = value + cached * stride_vb + h.to(tl.int64) * stride_vh
    depth = tl.load(mask_row + 1).to(tl.int32)
    length = tl.minimum(tl.load(mask_base).to(tl.int32), slots)

    first = length * 0  # slots before the window are not read
    if WINDOW > 0:
        first = tl.maximum(length - (WINDOW - 1), 0)
    end = tl.minimum(length + nodes, slots)
    blocks = (end - first + BLOCK_C - 1) // BLOCK_C
    begin = split * blocks // splits
    stop = (split + 1) * blocks // splits
    committed = (length - first) // BLOCK_C  # blocks that end before the tree begins
    reached = tl.minimum(stop * BLOCK_C, end - first)

    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    for i in range(begin, tl.minimum(stop, committed)):
        acc, top, total = _block(
            acc, top, total, q, k_base, v_base, mask_row, mask_base, depth, first + i * BLOCK_C, end, length, words,
            stride_ks, stride_vs, stride_mn, scale, softcap,
            False, WINDOW, SOFTCAP, D, DV, BLOCK_C, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for i in range(tl.maximum(begin, committed) * (BLOCK_C // BLOCK_N), (reached + BLOCK_N - 1) // BLOCK_N):
        acc, top, total = _block(
            acc, top, total, q, k_base, v_base, mask_row, mask_base, depth, first + i * BLOCK_N, end, length, words,
            stride_ks, stride_vs, stride_mn, scale, softcap,
            True, WINDOW, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if WHOLE:
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(top, sink)
            acc = acc * tl.exp2(top - higher)[:, None]
            total = total * tl.exp2(top - higher) + tl.exp2(sink - higher)
        place = ((b * nodes + n) * HEADS * GROUP + head)[:, None] * DV + dv[None, :]
        tl.store(out + place, acc / total[:, None], mask=inside[:, None] & (dv < DV)[None, :])
    else:
        place = (pair.to(tl.int64) * rows + row) * splits + split
        tl.store(tops + place, top, mask=inside)
        tl.store(totals + place, total, mask=inside)
        if begin < stop:  # the merge does not read the sums of an empty split
            tl.store(part + place[:, None] * DV + dv[None, :], acc, mask=inside[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["nodes"])
def _merge(
    part, tops, totals, sinks, out, nodes,
    SINKS: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merges the splits of BLOCK_R rows."""
    pair = tl.program_id(1)
    rows = nodes * GROUP
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    inside = row < rows
    n = row // GROUP
    head = (pair % HEADS) * GROUP + row % GROUP
    place = (pair.to(tl.int64) * rows + row)[:, None] * SPLITS + s[None, :]
    there = inside[:, None] & (s < SPLITS)[None, :]
    top = tl.load(tops + place, mask=there, other=-1e30)
    total = tl.load(totals + place, mask=there, other=0.0)
    higher = tl.max(top, 1)
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(higher, sink)
    weight = tl.exp2(top - higher[:, None])
    whole = tl.sum(weight * total, 1)
    if SINKS:
        whole += tl.exp2(sink - higher)
    read = (there & (total > 0))[:, :, None] & (dv < DV)[None, None, :]
    whole = tl.where(inside, whole, 1.0)
    acc = tl.load(part + place[:, :, None] * DV + dv[None, None, :], mask=read, other=0.0)
    result = tl.sum(acc * weight[:, :, None], 1) / whole[:, None]
    b = (pair // HEADS).to(tl.int64)
    where = ((b * nodes + n) * HEADS * GROUP + head)[:, None] * DV + dv[None, :]
    tl.store(out + where, result, mask=inside[:, None] & (dv < DV)[None, :])


def splits_for(programs: int, slots: int, processors: int, rows: int) -> int:
    """Number of splits of the keys that keeps all processors busy if `programs` of that many rows run anyway."""
    each = PROGRAMS_PER_PROCESSOR if rows <= 16 else 1
    return max(1, min(each * processors // programs, slots // LEAST_KEYS, MAX_SPLITS))


def tiling_for(rows: int, sizes: int, bytes_each: int, shared_memory: int = SHARED_MEMORY) -> Tiling:
    """Block sizes for `rows` queries per key head; `sizes` is the size of a key plus that of a value.

    RESIDENT programs fit a processor's shared memory.
    """
    most = (
        (ROWS if sizes <= 256 else ROWS // 2) if bytes_each < 4 else 16
    )  # without tensor cores, registers are the limit
    height = max(16, min(most, triton.next_power_of_2(rows)))
    tile = Tiling(height, KEYS if bytes_each < 4 else KEYS // 2, 4, STAGES + (height >= 64))
    if tile.rows * sizes > 64 * 256:
        tile = tile._replace(warps=8)

    def exceeds(tile: Tiling) -> bool:
        blocks = tile.stages + (tile.rows >= 64)  # asynchronous products on Hopper keep one more
        return RESIDENT * (tile.rows // 2 + blocks * tile.keys) * sizes * bytes_each > shared_memory

    while exceeds(tile) and (tile.stages > 2 or tile.keys > 16):
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(keys=tile.keys // 2)
    return tile


@lru_cache
def _device(index: int | None) -> tuple[int, int]:
    """Number of processors of a GPU and bytes of shared memory of each; placeholders under the interpreter."""
    if index is None:
        return 8, SHARED_MEMORY
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_multiprocessor", SHARED_MEMORY)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `redrafter.core.tree_attention.tree_attention`; runs on the current device.

    `tiling` and `splits` are for experiments.
    """
    batch, heads, nodes, size = query.shape
    kv_heads, slots, value_size = value.shape[1:]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = mask.contiguous()
    group = heads // kv_heads
    rows = nodes * group
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (size, value_size))
    processors, shared_memory = _device(query.device.index if query.is_cuda else None)
    tile = tiling or tiling_for(rows, block_d + block_dv, query.element_size(), shared_memory)
    tiles = triton.cdiv(rows, tile.rows)
    reach = slots if window is None else min(slots, window + nodes)
    splits = splits or splits_for(batch * kv_heads * tiles, reach, processors, tile.rows)

    out = query.new_empty((batch, nodes, heads, value_size))
    part, tops, totals = out, out, out  # unused
    if splits > 1:
        part = torch.empty((batch, kv_heads, rows, splits, value_size), dtype=torch.float32, device=query.device)
        tops, totals = torch.empty((2, batch, kv_heads, rows, splits), dtype=torch.float32, device=query.device)
    scale, cap = scaling * math.log2(math.e), 0.0
    if softcap is not None:  # exp2 of twice the argument of tanh
        scale, cap = 2 * scale / softcap, softcap * math.log2(math.e)
    _attend[(splits, batch * kv_heads, tiles)](
        query, key, value, mask, sinks if sinks is not None else out, out, part, tops, totals,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], mask.stride(0), mask.stride(2), mask.shape[3] - 3,
        slots, nodes, splits, scale, cap,
        WINDOW=window or 0, SOFTCAP=softcap is not None, SINKS=sinks is not None, WHOLE=splits == 1,
        HEADS=kv_heads, GROUP=group, D=size, DV=value_size,
        BLOCK_M=tile.rows, BLOCK_C=tile.keys, BLOCK_N=min(tile.keys, KEYS), BLOCK_D=block_d, BLOCK_DV=block_dv,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        block_s = triton.next_power_of_2(splits)
        block_r = max(1, 4096 // (block_s * block_dv))
        _merge[(triton.cdiv(rows, block_r), batch * kv_heads)](
            part, tops, totals, sinks if sinks is not None else out, out, nodes,
            SINKS=sinks is not None, SPLITS=splits, HEADS=kv_heads, GROUP=group, DV=value_size,
            BLOCK_R=block_r, BLOCK_S=block_s, BLOCK_DV=block_dv, num_warps=4,
        )  # fmt: skip
    return out
