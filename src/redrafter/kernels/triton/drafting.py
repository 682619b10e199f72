"""Kernels for drafting: top-k, beam search, trees and the drafter's activations.

Guarantees the results of the PyTorch references, up to rounding: `plain_topk` (`redrafter.kernels.topk`),
`plain_extend_beams` (`redrafter.proposers.beam_search`), `plain_prefix_tree` and `plain_most_probable`
(`redrafter.core.tree`), `silu_add` (`redrafter.kernels.activation`) and `plain_moved`
(`redrafter.proposers.fused_drafter`).  Imported on first use, because it needs triton.  Runs on the current device and
does not synchronize with it.

Candidates are ranked by one 64-bit integer: the bits of the score in an order that integers preserve, then the index,
so that ties are decided and one bitonic sort moves both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # least columns per program
CANDIDATES = 4096  # limit per row on what its chunks pass on; more columns use larger chunks
LOWEST = tl.constexpr(-(1 << 63))  # below the rank of every score
ELEMENTS = 1024  # per program
OWN, OTHERS = 32, 256  # entries that a program ranks, and that it compares with at once


def _power(number: int) -> int:
    return max(2, 1 << (number - 1).bit_length())


def _warps(elements: int) -> int:
    """Warps to sort that many elements."""
    return max(1, min(8, elements // 256)) if elements < 8192 else 16


@triton.jit
def _ranked(score, place):
    """The rank of a score at an index.  NaN ranks as minus infinity, -0.0 as 0.0."""
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def _score_of(rank):
    bits = (rank >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _place_of(rank):
    return (0x7FFFFFFF - (rank & 0x7FFFFFFF)).to(tl.int32)


@triton.jit(do_not_specialize=["columns", "chunks"])
def _best_of_chunk(
    scores, ranks, tops, totals, stride, columns, chunks, CHUNK: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The K best scores of a chunk of a row, the largest one and the sum of exponentials relative to it."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    there = column < columns
    score = tl.load(scores + row * stride + column, mask=there, other=float("-inf")).to(tl.float32)
    highest = tl.max(tl.where(score == score, score, float("-inf")), 0)
    highest = tl.where(highest == float("-inf"), -1e30, tl.where(highest == float("inf"), 0.0, highest))
    place = row * chunks + chunk
    tl.store(tops + place, highest)
    tl.store(totals + place, tl.sum(tl.exp(score - highest), 0))
    best = tl.topk(tl.where(there, _ranked(score, column), LOWEST), K)
    tl.store(ranks + place * K + tl.arange(0, K), best)


@triton.jit(do_not_specialize=["chunks", "width"])
def _best_of_row(
    ranks, tops, totals, values, ids, logsumexp, chunks, width,
    CANDIDATES: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The best scores of all chunks of a row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    highest = tl.load(tops + row * chunks + c, mask=c < chunks, other=-1e30)
    total = tl.load(totals + row * chunks + c, mask=c < chunks, other=0.0)
    top = tl.max(highest, 0)
    tl.store(logsumexp + row, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))
    i = tl.arange(0, CANDIDATES)
    best = tl.topk(tl.load(ranks + row * chunks * K + i, mask=i < chunks * K, other=LOWEST), K)
    k = tl.arange(0, K)
    tl.store(values + row * width + k, _score_of(best), mask=k < width)
    tl.store(ids + row * width + k, _place_of(best).to(tl.int64), mask=k < width)


def topk(scores: Tensor, width: int, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, ids and log-sum-exp of `redrafter.kernels.topk.topk`, in two launches.  `chunk` is for experiments."""
    rows, columns = scores.shape
    if width > columns:
        raise ValueError(f"width {width} exceeds the {columns} columns")
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    k = _power(width)
    chunk = chunk or max(min(CHUNK, _power(columns)), k, _power(triton.cdiv(columns * k, CANDIDATES)))
    chunks = triton.cdiv(columns, chunk)
    device = scores.device
    ranks = torch.empty((rows, chunks, k), dtype=torch.int64, device=device)
    tops, totals = torch.empty((2, rows, chunks), dtype=torch.float32, device=device)
    _best_of_chunk[(chunks, rows)](
        scores, ranks, tops, totals, scores.stride(0), columns, chunks, CHUNK=chunk, K=k, num_warps=_warps(chunk)
    )
    values = torch.empty((rows, width), dtype=torch.float32, device=device)
    ids = torch.empty((rows, width), dtype=torch.int64, device=device)
    logsumexp = torch.empty((rows,), dtype=torch.float32, device=device)
    candidates = _power(chunks * k)
    _best_of_row[(rows,)](
        ranks, tops, totals, values, ids, logsumexp, chunks, width,
        CANDIDATES=candidates, CHUNKS=_power(chunks), K=k, num_warps=_warps(candidates),
    )  # fmt: skip
    return values, ids, logsumexp


@triton.jit
def _path_score(values, logsumexp, scores, row, entry, entries, beams_above, width):
    """The score of an entry: the score of its beam plus that of its token."""
    there = entry < entries
    beam = row * beams_above + tl.where(there, entry // width, 0)
    gain = tl.load(values + row * entries + entry, mask=there, other=0.0) - tl.load(logsumexp + beam)
    return tl.load(scores + beam) + tl.where(gain > 0, 0.0, gain)  # rounding must not lift a child above its parent


@triton.jit(do_not_specialize=["beams_above", "width", "position"])
def _extend_beams(
    values, ids, logsumexp, names, beams, scores, above,
    level_tokens, level_parents, level_scores, new_beams, new_scores, new_above, parents,
    beams_above, width, position,
    NAMED: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Ranks OWN entries of a row; those that fewer than `width` others surpass become beams."""
    row = tl.program_id(1).to(tl.int64)
    entries = beams_above * width
    entry = tl.program_id(0) * OWN + tl.arange(0, OWN)
    there = entry < entries
    beam = tl.where(there, entry // width, 0)
    score = _path_score(values, logsumexp, scores, row, entry, entries, beams_above, width)
    token = tl.load(ids + row * entries + entry, mask=there, other=0)
    if NAMED:
        token = tl.load(names + token)
    tl.store(level_tokens + row * entries + entry, token, mask=there)
    tl.store(level_parents + row * entries + entry, tl.load(above + row * beams_above + beam), mask=there)
    tl.store(level_scores + row * entries + entry, score, mask=there)

    rank = _ranked(score, entry)
    place = tl.zeros([OWN], tl.int32)
    for start in range(0, entries, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = _ranked(_path_score(values, logsumexp, scores, row, other, entries, beams_above, width), other)
        surpasses = (other < entries)[None, :] & (theirs[None, :] > rank[:, None])
        place += tl.sum(surpasses.to(tl.int32), 1)
    kept = there & (place < width)
    out = row * width + place
    tl.store(new_scores + out, _score_of(rank), mask=kept)
    tl.store(new_above + out, entry.to(tl.int64), mask=kept)
    tl.store(parents + out, beam.to(tl.int64), mask=kept)
    step = tl.arange(0, BLOCK_L)
    read = (row * beams_above + beam)[:, None] * position + step[None, :]
    begun = tl.load(beams + read, mask=(step < position)[None, :] & kept[:, None], other=0)
    write = out[:, None] * (position + 1) + step[None, :]
    tokens = tl.where((step == position)[None, :], token[:, None], begun)
    tl.store(new_beams + write, tokens, mask=(step <= position)[None, :] & kept[:, None])


def extend_beams(
    values: Tensor,
    ids: Tensor,
    logsumexp: Tensor,
    names: Tensor | None,
    beams: Tensor,
    scores: Tensor,
    above: Tensor,
) -> tuple[Tensor, ...]:
    """The level's tokens, parents and scores, and the new beams, their scores, entries and parents, in one launch.

    See `redrafter.proposers.beam_search.extend_beams`; at most 64 beams.
    """
    batch, beams_above, position = beams.shape
    width = values.shape[1]
    entries = beams_above * width
    device = beams.device
    level_tokens, level_parents = torch.empty((2, batch, entries), dtype=torch.int64, device=device)
    level_scores = torch.empty((batch, entries), dtype=torch.float32, device=device)
    new_beams = torch.empty((batch, width, position + 1), dtype=torch.int64, device=device)
    new_scores = torch.empty((batch, width), dtype=torch.float32, device=device)
    new_above, parents = torch.empty((2, batch, width), dtype=torch.int64, device=device)
    _extend_beams[(triton.cdiv(entries, OWN), batch)](
        values, ids, logsumexp, ids if names is None else names,
        beams if position else ids, scores.contiguous(), above.contiguous(),
        level_tokens, level_parents, level_scores, new_beams, new_scores, new_above, parents,
        beams_above, width, position,
        NAMED=names is not None, OWN=OWN, OTHERS=min(OTHERS, _power(entries)), BLOCK_L=_power(position + 1),
    )  # fmt: skip
    return level_tokens, level_parents, level_scores, new_beams, new_scores, new_above, parents


def _blank_tree(batch: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tokens, parents, depth, valid and ancestors of trees without nodes, in one zeroed allocation."""
    numbers, flags = 3 * batch * size, batch * size * (size + 1)
    memory = torch.zeros(8 * numbers + flags, dtype=torch.uint8, device=device)
    tokens, parents, depth = memory[: 8 * numbers].view(torch.int64).view(3, batch, size)
    valid, ancestors = memory[8 * numbers :].view(torch.bool).split((batch * size, batch * size * size))
    return tokens, parents, depth, valid.view(batch, size), ancestors.view(batch, size, size)


@triton.jit
def _own_and_root(ancestors, row, size, NODES: tl.constexpr):
    """Marks the root and the node itself as ancestors of every node, including padding."""
    n = tl.arange(0, NODES)
    tl.store(ancestors + (row * size + n) * size, 1, mask=n < size)
    tl.store(ancestors + (row * size + n) * size + n, 1, mask=n < size)


@triton.jit(do_not_specialize=["width"])
def _prefix_tree(
    root, beams, tokens, parents, depth, valid, ancestors, width,
    LENGTH: tl.constexpr, W: tl.constexpr, L: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Merges the beams of a row into a prefix tree.  The outputs are zero before."""
    row = tl.program_id(0).to(tl.int64)
    size = 1 + width * LENGTH
    w = tl.arange(0, W)
    step = tl.arange(0, L)
    there = w < width
    both = there[:, None] & there[None, :]
    same = both  # equal prefixes
    node = tl.zeros([W], tl.int32)  # of each beam at this depth
    path = tl.zeros([W, L], tl.int32)  # of each beam at all depths so far
    count = tl.sum(node, 0)
    first = row * size
    tl.store(tokens + first, tl.load(root + row))
    tl.store(valid + first, 1)
    _own_and_root(ancestors, row, size, NODES)
    for at in tl.static_range(LENGTH):
        token = tl.load(beams + (row * width + w) * LENGTH + at, mask=there, other=0)
        same = same & (token[:, None] == token[None, :])
        owner = tl.min(tl.where(same, w[None, :], W), 1)  # the first beam with this prefix
        owns = there & (owner == w)
        number = count + tl.cumsum(owns.to(tl.int32), 0)  # in order of depth, then beam
        count += tl.sum(owns.to(tl.int32), 0)
        above = node
        node = tl.sum(tl.where(w[None, :] == owner[:, None], number[None, :], 0), 1)
        path = tl.where((step == at)[None, :], node[:, None], path)
        tl.store(tokens + first + number, token, mask=owns)
        tl.store(parents + first + number, above.to(tl.int64), mask=owns)
        tl.store(depth + first + number, at + 1, mask=owns)
        tl.store(valid + first + number, 1, mask=owns)
        seen = ancestors + (first + number)[:, None] * size + path
        tl.store(seen, 1, mask=owns[:, None] & (step <= at)[None, :])


def prefix_tree(root: Tensor, beams: Tensor) -> tuple[Tensor, ...]:
    """Tokens, parents, depth, valid and ancestors, as of `redrafter.core.tree.prefix_tree`."""
    batch, width, length = beams.shape
    tree = _blank_tree(batch, 1 + width * length, beams.device)
    tokens, parents, depth, valid, ancestors = tree
    block = _power(width)
    _prefix_tree[(batch,)](
        root.contiguous(), beams.contiguous(), tokens, parents, depth,
        valid.view(torch.int8), ancestors.view(torch.int8), width,
        LENGTH=length, W=block, L=_power(length), NODES=_power(1 + width * length), num_warps=_warps(block * block),
    )  # fmt: skip
    return tree


@triton.jit(do_not_specialize=["first", "each", "entries", "size"])
def _most_probable(
    root, level_tokens, level_parents, level_scores, numbers, tokens, parents, depth, valid, ancestors, log_probs,
    first, each, entries, size,
    DEPTHS: tl.constexpr, ENTRIES: tl.constexpr, K: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Builds the tree of the best `size - 1` candidates of a row.  The outputs but `log_probs` are zero before."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    there = entry < entries
    read = row * entries + entry
    score = tl.load(level_scores + read, mask=there, other=float("-inf"))
    rank = tl.where(there, _ranked(score, entry), LOWEST)
    k = tl.arange(0, K)
    last = tl.max(tl.where(k == size - 2, tl.topk(rank, K), LOWEST), 0)  # the rank of the last candidate in the tree
    kept = there & (rank >= last) & (score > float("-inf"))
    number = tl.cumsum(kept.to(tl.int32), 0)  # in order of depth, then entry
    tl.store(numbers + read, number, mask=there)
    below = tl.where(entry < first, 1, 2 + (entry - first) // each)
    start = tl.where(below > 2, first + (below - 3) * each, 0)  # start of the level above
    parent = tl.load(level_parents + read, mask=kept & (below > 1), other=0).to(tl.int32) + start
    node = row * size + number
    tl.store(tokens + row * size, tl.load(root + row))
    tl.store(valid + row * size, 1)
    tl.store(tokens + node, tl.load(level_tokens + read, mask=kept, other=0), mask=kept)
    tl.store(depth + node, below.to(tl.int64), mask=kept)
    tl.store(valid + node, 1, mask=kept)
    tl.store(log_probs + row * size, 0.0)
    tl.store(log_probs + node, score, mask=kept)
    tl.debug_barrier()  # all numbers are written
    above = tl.load(numbers + row * entries + parent, mask=kept & (below > 1), other=0)
    tl.store(parents + node, above.to(tl.int64), mask=kept)
    tl.debug_barrier()  # all parents are written
    _own_and_root(ancestors, row, size, NODES)
    n = tl.arange(0, NODES)
    at = n.to(tl.int64)
    for _ in tl.static_range(DEPTHS - 1):
        at = tl.load(parents + row * size + at, mask=n < size, other=0)
        tl.store(ancestors + (row * size + n) * size + at, 1, mask=n < size)


def most_probable(
    root: Tensor, levels: tuple[Tensor, Tensor, Tensor], first: int, each: int, depths: int, size: int
) -> tuple[Tensor, ...]:
    """Tokens, parents, depth, valid, ancestors and log-probabilities, as of `redrafter.core.tree.most_probable`.

    `levels` holds the concatenated tokens, parents and scores of a level of `first` candidates and levels of `each`
    candidates.  `size` is at least 2 and at most 1 plus the number of candidates.
    """
    batch, entries = levels[0].shape
    tree = _blank_tree(batch, size, root.device)
    numbers = torch.empty((batch, entries), dtype=torch.int32, device=root.device)
    log_probs = torch.empty((batch, size), dtype=torch.float32, device=root.device)
    block = _power(entries)
    _most_probable[(batch,)](
        root.contiguous(), *levels, numbers, *tree[:3], *(flag.view(torch.int8) for flag in tree[3:]), log_probs,
        first, each, entries, size,
        DEPTHS=depths, ENTRIES=block, K=_power(size - 1), NODES=_power(size), num_warps=_warps(block),
    )  # fmt: skip
    return *tree, log_probs


@triton.jit
def _silu_add(
    x, more, residual, out, columns, stride_x, stride_m, stride_o,
    MORE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # the other axes are limited to 65,535 programs
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    value = tl.load(x + row * stride_x + at, mask=there, other=0.0).to(tl.float32)
    if MORE:
        value += tl.load(more + row * stride_m + at, mask=there, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value))
    if RESIDUAL:
        value += tl.load(residual + row * stride_o + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, value, mask=there)


def silu_add(x: Tensor, more: Tensor | None, residual: Tensor | None) -> Tensor:
    """`residual + SiLU(x + more)` for equal shapes, in one launch."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = [as_rows(x if one is None else one) for one in (x, more, residual)]
    count, columns = rows[0].shape
    _silu_add[(count, triton.cdiv(columns, ELEMENTS))](
        *rows, out, columns, *(one.stride(0) for one in rows),
        MORE=more is not None, RESIDUAL=residual is not None, BLOCK=ELEMENTS, num_warps=4,
    )  # fmt: skip
    return out


def as_rows(x: Tensor) -> Tensor:
    """A 2-D view with a dense last dimension, or a copy if there is none."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit(do_not_specialize=["beams", "stride_tb", "stride_tw"])
def _moved(
    table, rows, tokens, parents, carried, context, out,
    beams, columns, first, stride_tb, stride_tw, stride_b, stride, stride_c,
    NAMED: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a beam's state; with BESIDE, of `first` context elements followed by the state."""
    beam = tl.program_id(1)
    b, w = (beam // beams).to(tl.int64), beam % beams
    to = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = to - first
    there = (at >= 0) & (at < columns)
    place = tl.load(tokens + b * stride_tb + w * stride_tw)
    parent = tl.load(parents + beam)
    if NAMED:
        place = tl.load(rows + place)
    value = tl.load(table + place * columns + at, mask=there, other=0.0).to(tl.float32)
    value += tl.load(carried + b * stride_b + parent * stride + at, mask=there, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value))
    if BESIDE:
        known = tl.load(context + b * stride_c + to, mask=to < first, other=0.0).to(tl.float32)
        value = tl.where(to < first, known, value)
    tl.store(out + beam.to(tl.int64) * (first + columns) + to, value, mask=to < first + columns)


def moved(
    table: Tensor,
    rows: Tensor | None,
    tokens: Tensor,
    parents: Tensor,
    carried: Tensor,
    context: Tensor | None = None,
) -> Tensor:
    """The state of `redrafter.proposers.fused_drafter.FusedDrafter.moved`, behind the `context` if given."""
    batch, beams = tokens.shape
    columns, first = carried.shape[2], 0 if context is None else context.shape[2]
    carried = carried if carried.stride(2) == 1 else carried.contiguous()
    beside = carried if context is None else as_rows(context)
    out = torch.empty((batch, beams, first + columns), dtype=carried.dtype, device=carried.device)
    _moved[(triton.cdiv(first + columns, ELEMENTS), batch * beams)](
        table, table if rows is None else rows, tokens, parents.contiguous(), carried, beside, out,
        beams, columns, first, *tokens.stride(), carried.stride(0), carried.stride(1), beside.stride(0),
        NAMED=rows is not None, BESIDE=context is not None, BLOCK=ELEMENTS, num_warps=4,
    )  # fmt: skip
    return out
