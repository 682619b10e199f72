"""Merges a draft tree with continuations of the text into one tree of the most probable nodes.

Guarantees a tree as `core.tree` does: a path occurs once, parents precede children, padding comes last.  Works on
tensors of fixed shapes and does not synchronize with the device.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.continuations import Continuations
from redrafter.core.tree import DraftTree, selected


def merged(tree: DraftTree, found: Continuations, *, size: int, max_depth: int, least: float = 0.0) -> DraftTree:
    """The `size - 1` most probable nodes of a tree that has `log_probs` and of continuations of its root.

    A node of several sources has the largest of their probabilities.  Below a node that the tree shares with a
    continuation, the continuation's tokens are as probable, given that node, as they are within the continuation.
    Continuations' own nodes with a probability below `least` are left out.  No path is longer than `max_depth`.
    """
    assert tree.log_probs is not None
    count, length = found.tokens.shape[1:]
    index = torch.arange(length, device=tree.tokens.device)
    node = _shared_nodes(tree, found.tokens)
    shared = node > 0
    scores = _scores(tree.log_probs, found.log_probs, node)
    raised = tree.log_probs.scatter_reduce(
        1, node.flatten(1), scores.where(shared, -torch.inf).flatten(1), "amax"
    )  # nodes that are not shared change nothing at the root
    first = _first_owners(found.tokens)
    owned = (first == torch.arange(count, device=index.device)[:, None]) & ~shared

    # candidates: the tree's nodes without the root, then those of the continuations by depth
    others = tree.size - 1
    root = others + count * length  # represents the root as a parent
    number = torch.where(shared, node - 1, others + index * count + first)
    above = torch.cat((torch.full_like(number[..., :1], root), number[..., :-1]), dim=2)

    def candidates(nodes: Tensor, continuations: Tensor) -> Tensor:
        return torch.cat((nodes[:, 1:], continuations.transpose(1, 2).flatten(1)), dim=1)

    if least:
        owned = owned & (scores >= math.log(least))
    probable = candidates(raised.where(tree.valid, -torch.inf), scores.where(owned, -torch.inf))
    return selected(
        tree.tokens[:, 0],
        candidates(tree.tokens, found.tokens),
        candidates(torch.where(tree.parents == 0, root, tree.parents - 1), above),
        candidates(tree.depth, (index + 1).expand_as(number)),
        probable,
        size=min(size, 1 + root),
        max_depth=max_depth,
    )


def _shared_nodes(tree: DraftTree, tokens: Int[Tensor, "B K L"]) -> Int[Tensor, "B K L"]:
    """The node of the tree that has the path of each continuation up to each token; 0 if there is none."""
    count, length = tokens.shape[1:]
    node = torch.arange(tree.size, device=tokens.device)
    column = (tree.depth - 1).clamp(0, length - 1)[:, None].expand(-1, count, -1)
    equal = (tokens.gather(2, column) == tree.tokens[:, None]) & (tree.valid & (tree.depth <= length))[:, None]
    equal = equal | (node == 0)  # [B, K, N]: a node against the token at its depth
    on_path = (equal[:, :, None] | ~tree.ancestors[:, None]).all(dim=3)
    place = torch.where(on_path, tree.depth[:, None], length + 1)
    found = tokens.new_zeros((len(tokens), count, length + 2))
    return found.scatter_(2, place, node.expand_as(place))[..., 1 : length + 1]


def _scores(
    log_probs: Float[Tensor, "B N"], along: Float[Tensor, "B K L"], node: Int[Tensor, "B K L"]
) -> Float[Tensor, "B K L"]:
    """The log-probability of each continuation up to each token, given the tree's for the nodes that they share."""
    of_tree = log_probs.gather(1, node.flatten(1)).view_as(along)
    gain = torch.where(node > 0, of_tree - along, -torch.inf)  # of the tree's estimate over the continuation's
    return along + gain.cummax(dim=2).values.clamp(min=0)


def _first_owners(tokens: Int[Tensor, "B K L"]) -> Int[Tensor, "B K L"]:
    """The first continuation that agrees with each up to each token."""
    same = (tokens[:, :, None] == tokens[:, None]).cumprod(dim=3)  # [B, K, K, L]
    return same.argmax(dim=2)
