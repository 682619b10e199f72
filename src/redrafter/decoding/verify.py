"""Verification: which drafted tokens the target would have written itself.

Acceptance is exact for every tree that a proposer may return.  Each written token is the target's own choice; a drafted
token is accepted only if it equals that choice and the target saw exactly its path.  A node whose fields contradict its
parent's is never accepted.  Does not know how the target's tokens were chosen.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from redrafter.core.tree import DraftTree
from redrafter.kernels import has_kernels

MAX_KERNEL_NODES = 128
"""The largest tree that the kernel supports: it holds the ancestor matrix in registers."""


def walk(
    tree: DraftTree, choice: Int[Tensor, "B N"], *, length: int
) -> tuple[Int[Tensor, "B path"], Int[Tensor, " B"]]:
    """The longest path from the root on which every token is the target's choice.

    `choice[b, n]` is the target's token after node n; `length` limits the depth of accepted nodes.  Returns the nodes
    of the path by depth (`path = length + 1`; entry 0 is the root, entries beyond the end of the path are 0) and the
    number of accepted drafted tokens.  That number is -1 if the root is malformed: with another depth or other
    ancestors, the target did not choose after the text.

    Siblings may hold the same token.  Of paths of equal length, the one that ends at the smallest node is returned.
    """
    if not has_kernels(choice.device) or tree.size > MAX_KERNEL_NODES:
        return plain_walk(tree, choice, length=length)
    from redrafter.kernels.triton import verify

    with torch.cuda.device_of(choice):
        return verify.walk(tree.tokens, tree.parents, tree.depth, tree.valid, tree.ancestors, choice, length)


def plain_walk(
    tree: DraftTree, choice: Int[Tensor, "B N"], *, length: int
) -> tuple[Int[Tensor, "B path"], Int[Tensor, " B"]]:
    """`walk` in PyTorch, for any device."""
    size = tree.size
    node = torch.arange(size, device=choice.device)
    parents = tree.parents.clamp(0, size - 1)
    matches = tree.consistent() & (tree.depth <= length) & ((node == 0) | (tree.tokens == choice.gather(1, parents)))
    accepted = (matches[:, None] | ~tree.ancestors).all(dim=2) & matches
    last = torch.where(accepted, tree.depth * size - node, -size).argmax(
        dim=1, keepdim=True
    )  # the deepest, then the smallest
    on_path = tree.ancestors.gather(1, last[..., None].expand(-1, 1, size))[:, 0] & accepted
    index = torch.where(on_path, tree.depth, length + 1)
    path = choice.new_zeros((len(choice), length + 2)).scatter_(1, index, node.expand_as(choice))[:, : length + 1]
    return path, torch.where(accepted[:, 0], tree.depth.gather(1, last)[:, 0], -1)
