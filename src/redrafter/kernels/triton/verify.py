"""The kernel of `redrafter.decoding.verify.walk`: one program per row.  Imported on first use, because it needs
triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _walk(
    tokens, parents, depths, valid, ancestors, choice, path, accepted, size, length,
    NODES: tl.constexpr, DEPTHS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES)
    there = node < size
    tokens, parents, depths, valid, choice = (
        tokens + row * size, parents + row * size, depths + row * size, valid + row * size, choice + row * size,
    )  # fmt: skip
    ancestors += row * size * size
    depth = tl.load(depths + node, mask=there, other=-1).to(tl.int32)
    parent = tl.load(parents + node, mask=there, other=0)
    inside = there & (parent >= 0) & (parent < size)
    parent = tl.where(inside, parent, 0)
    above = tl.load(depths + parent).to(tl.int32)
    chosen = tl.load(tokens + node, mask=there, other=-1) == tl.load(choice + parent)
    chosen = chosen & inside & (tl.load(valid + node, mask=there, other=0) != 0) & (depth == above + 1)
    matches = ((node == 0) & (depth == 0)) | ((node > 0) & chosen & (depth <= length))

    other = tl.arange(0, NODES)
    both = there[:, None] & (other < size)[None, :]
    own = tl.load(ancestors + node[:, None] * size + other[None, :], mask=both, other=0) != 0
    its = tl.load(ancestors + parent[:, None] * size + other[None, :], mask=both, other=0) != 0
    expected = (other[None, :] == node[:, None]) | (
        (node > 0)[:, None] & (its | (other[None, :] == parent[:, None]))
    )  # for the root only the root itself
    differs = tl.sum(((own != expected) & both).to(tl.int32), 1)
    matches = matches & (differs == 0)
    # transposed, to compare with every node's ancestors
    across = tl.sum(tl.where(node[:, None] == other[None, :], matches.to(tl.int32)[:, None], 0), 0)
    missing = tl.sum((own & (across == 0)[None, :]).to(tl.int32), 1)
    kept = matches & (missing == 0)

    rank = tl.where(kept, depth * NODES + (NODES - 1 - node), -1)
    best = tl.max(rank, 0)
    last = tl.where(best >= 0, NODES - 1 - best % NODES, 0)
    on_path = kept & (tl.load(ancestors + last * size + node, mask=there, other=0) != 0)
    level = tl.arange(0, DEPTHS)
    found = tl.sum(tl.where(on_path[None, :] & (depth[None, :] == level[:, None]), node[None, :], 0), 1)
    tl.store(path + row * (length + 1) + level, found.to(tl.int64), mask=level <= length)
    tl.store(accepted + row, tl.where(best >= 0, best // NODES, -1).to(tl.int64))


def walk(
    tokens: Tensor, parents: Tensor, depth: Tensor, valid: Tensor, ancestors: Tensor, choice: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """See `redrafter.decoding.verify.walk`; runs on the current device."""
    batch, size = tokens.shape
    path = choice.new_empty((batch, length + 1))
    accepted = choice.new_empty(batch)
    flags = valid.view(torch.uint8), ancestors.view(torch.uint8)
    fields = (field.contiguous() for field in (tokens, parents, depth, *flags))
    nodes = triton.next_power_of_2(size)
    _walk[(batch,)](
        *fields, choice.contiguous(), path, accepted, size, length,
        NODES=nodes, DEPTHS=triton.next_power_of_2(length + 1), num_warps=max(1, min(8, nodes // 16)),
    )  # fmt: skip
    return path, accepted
