"""Draft trees: the candidates of one step, as tensors of fixed shapes on the device.

Dynamic tree attention (arXiv 2403.09919, section 3.3): beams that share a prefix are merged into a prefix tree by
tensor operations at run time.  The functions here guarantee that node 0 is the root, that parents precede children,
that siblings hold different tokens and that padding comes last.  Proposers may build trees without these properties:
decoding keeps only nodes that are `consistent`.  Does not know the proposers or the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redrafter.errors import RedrafterError
from redrafter.kernels import has_kernels

MAX_BEAMS, MAX_DEPTH, MAX_CANDIDATES = 64, 16, 1 << 14
"""Limits of the kernels; PyTorch builds larger trees."""


@dataclass(frozen=True)
class DraftTree:
    """A batch of trees of N nodes each; rows with fewer nodes are padded at the end."""

    tokens: Int[Tensor, "B N"]
    parents: Int[Tensor, "B N"]
    """Node index of the parent; 0 for the root itself and for padding."""
    depth: Int[Tensor, "B N"]
    """Distance from the root; 0 for padding."""
    valid: Bool[Tensor, "B N"]
    ancestors: Bool[Tensor, "B N N"]
    """`ancestors[b, n, m]`: node m is n or lies between n and the root.  Padding sees itself and the root."""
    log_probs: Float[Tensor, "B N"] | None = None
    """The proposer's estimate of the log-probability that a node is accepted, undefined for padding; None if unknown.

    At most that of the parent.  Decoding ignores it."""

    @property
    def size(self) -> int:
        """N, nodes counting the root and padding."""
        return self.tokens.shape[1]

    def consistent(self) -> Bool[Tensor, "B N"]:
        """Marks valid nodes whose depth and ancestors are those of their parent plus the node itself.

        The root is consistent if it has depth 0 and no other ancestor.  If a node and all its ancestors are consistent,
        the chain of its parents begins at the root.
        """
        parents = self.parents.clamp(0, self.size - 1)
        node = torch.arange(self.size, device=parents.device)
        root = node == 0
        inside = (self.parents == parents) & self.valid
        below = (self.depth == self.depth.gather(1, parents) + 1) & inside
        itself = node[:, None] == node
        inherited = self.ancestors.gather(1, parents[..., None].expand_as(self.ancestors)) | (
            parents[..., None] == node
        )
        expected = itself | (inherited & ~root[:, None])
        return torch.where(root, self.depth == 0, below) & (self.ancestors == expected).all(dim=2)

    def bounded(self, root: Int[Tensor, " B"], *, length: int, vocabulary: int) -> DraftTree:
        """The same trees with this root and all values in range.  Raises RedrafterError for wrong shapes or dtypes."""
        batch, size = len(root), self.size
        shapes = {name: (batch, size) for name in ("tokens", "parents", "depth", "valid")} | {
            "ancestors": (batch, size, size)
        }
        for name, shape in shapes.items():
            field: Tensor = getattr(self, name)
            dtype = torch.bool if name in ("valid", "ancestors") else torch.long
            if (field.shape, field.dtype, field.device) != (shape, dtype, root.device):
                raise RedrafterError(
                    f"The proposer's tree has {name} of shape {tuple(field.shape)} and {field.dtype} on "
                    f"{field.device}; expected {shape} and {dtype} on {root.device}."
                )
        tokens = torch.cat((root[:, None], self.tokens[:, 1:].clamp(0, vocabulary - 1)), dim=1)
        return replace(self, tokens=tokens, depth=self.depth.clamp(0, length), log_probs=None)

    def padded(self, size: int) -> DraftTree:
        """With padding up to `size` nodes and without `log_probs`."""
        missing = size - self.size
        if not missing:
            return self
        pad = torch.nn.functional.pad
        ancestors = pad(self.ancestors, (0, missing, 0, missing))
        ancestors[:, self.size :, 0] = True
        ancestors.diagonal(dim1=1, dim2=2)[:, self.size :] = True
        tokens, parents, depth, valid = (
            pad(one, (0, missing)) for one in (self.tokens, self.parents, self.depth, self.valid)
        )
        return DraftTree(tokens, parents, depth, valid, ancestors)

    def trimmed(self) -> DraftTree:
        """Without padding that no row needs and without `log_probs`.

        Synchronizes with the device, so it is meant for the CPU.
        """
        node = torch.arange(self.size, device=self.valid.device)
        size = 1 + int((self.valid * node).max())
        if size == self.size:
            return self
        return DraftTree(
            self.tokens[:, :size],
            self.parents[:, :size],
            self.depth[:, :size],
            self.valid[:, :size],
            self.ancestors[:, :size, :size],
        )


def concatenated(first: DraftTree, second: DraftTree) -> DraftTree:
    """The rows of both batches of trees, without `log_probs`.  Trees of fewer nodes are padded."""
    size = max(first.size, second.size)
    both = first.padded(size), second.padded(size)
    names = ("tokens", "parents", "depth", "valid", "ancestors")
    return DraftTree(*(torch.cat([getattr(one, name) for one in both]) for name in names))


def chain(tokens: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"] | None = None) -> DraftTree:
    """A chain of tokens: a chunk of a prompt, or with N = 1 the root alone, which is autoregressive decoding.

    `valid` marks at least one token at the front of each row; default: all.
    """
    batch, size = tokens.shape
    index = torch.arange(size, device=tokens.device)
    full = DraftTree(
        tokens=tokens,
        parents=(index - 1).clamp(min=0).expand(batch, size),
        depth=index.expand(batch, size),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        ancestors=(index[:, None] >= index).expand(batch, size, size),
    )
    if valid is None:
        return full
    padding = (index[:, None] == index) | (index == 0)  # ancestors of padding
    return DraftTree(
        tokens=torch.where(valid, tokens, 0),
        parents=torch.where(valid, full.parents, 0),
        depth=torch.where(valid, full.depth, 0),
        valid=valid,
        ancestors=torch.where(valid[..., None], full.ancestors, padding),
    )


def parallel_chains(root: Int[Tensor, " B"], beams: Int[Tensor, "B W L"]) -> DraftTree:
    """W separate chains of L tokens below `root`: always N = 1 + W·L nodes, numbered by depth, then beam.

    Siblings may hold the same token.
    """
    batch, width, length = beams.shape
    node = torch.arange(1 + width * length, device=beams.device)
    own = (node[:, None] >= node) & ((node[:, None] - node) % width == 0)  # the node and its ancestors in the same beam
    tokens = torch.cat((root[:, None], beams.transpose(1, 2).flatten(1)), dim=1)
    return DraftTree(
        tokens=tokens,
        parents=(node - width).clamp(min=0).expand_as(tokens),
        depth=((node + width - 1) // width).expand_as(tokens),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        ancestors=((own & (node > 0)) | (node == 0)).expand(batch, -1, -1),
    )


def prefix_tree(root: Int[Tensor, " B"], beams: Int[Tensor, "B W L"]) -> DraftTree:
    """Merges W beams of L tokens, all continuations of `root`, into prefix trees of N = 1 + W·L nodes with padding.

    Of all beams that agree up to a depth, the first one owns the node there.  Nodes are numbered by depth, then beam.
    """
    width, length = beams.shape[1:]
    if not has_kernels(beams.device) or width > MAX_BEAMS or not 0 < length <= MAX_DEPTH:
        return plain_prefix_tree(root, beams)
    from redrafter.kernels.triton import drafting

    with torch.cuda.device_of(beams):
        return DraftTree(*drafting.prefix_tree(root, beams))


def plain_prefix_tree(root: Int[Tensor, " B"], beams: Int[Tensor, "B W L"]) -> DraftTree:
    """`prefix_tree` in PyTorch, for any device."""
    batch, width, length = beams.shape
    device = beams.device
    same = (beams[:, :, None] == beams[:, None]).cumprod(dim=-1).bool()  # [B, W, W, L]: equal prefixes
    owner = same.int().argmax(dim=2).transpose(1, 2)  # [B, L, W]: the first beam with this prefix
    owned = owner == torch.arange(width, device=device)
    number = owned.flatten(1).cumsum(dim=1)  # [B, L·W]: node numbers of owners, in order of depth
    node = number.view(batch, length, width).gather(2, owner)  # [B, L, W]: the node of every beam at every depth
    above = torch.cat((node.new_zeros(batch, 1, width), node[:, :-1]), dim=1)

    size = 1 + width * length
    place = torch.where(owned.flatten(1), number, size)  # beams that own no node write into a column that is cut off
    depths = torch.arange(1, length + 1, device=device)[:, None].expand(batch, length, width)
    source = torch.stack((beams.transpose(1, 2), above, depths, torch.ones_like(above))).flatten(2)
    fields = source.new_zeros(4, batch, size + 1).scatter_(2, place.expand(4, -1, -1), source)[..., :size]
    tokens, parents, depth, valid = fields.unbind()
    tokens[:, 0], valid[:, 0] = root, 1
    return DraftTree(tokens, parents, depth, valid.bool(), ancestors_of(parents, max_depth=length))


def most_probable(
    root: Int[Tensor, " B"],
    levels: Sequence[tuple[Int[Tensor, "B _"], Int[Tensor, "B _"], Float[Tensor, "B _"]]],
    *,
    size: int,
) -> DraftTree:
    """The tree of the `size - 1` most probable candidates, which has the largest expected acceptance length.

    A level holds tokens, parents (entries of the level above) and path scores of the candidates at one depth; siblings
    hold different tokens.  A child scores at most as high as its parent, so the best candidates include their parents.
    Candidates with probability 0 become padding.  Nodes are numbered by depth, then entry.
    """
    counts = [level[0].shape[1] for level in levels]
    size = min(size, 1 + sum(counts))
    fits = size > 1 and sum(counts) <= MAX_CANDIDATES and len(counts) <= MAX_DEPTH and len(set(counts[1:])) <= 1
    if not has_kernels(root.device, levels[0][2].dtype) or not fits:
        return plain_most_probable(root, levels, size=size)
    from redrafter.kernels.triton import drafting

    tokens, parents, scores = (torch.cat([level[i] for level in levels], dim=1) for i in range(3))
    with torch.cuda.device_of(root):
        return DraftTree(
            *drafting.most_probable(root, (tokens, parents, scores), counts[0], counts[-1], len(counts), size)
        )


def plain_most_probable(
    root: Int[Tensor, " B"],
    levels: Sequence[tuple[Int[Tensor, "B _"], Int[Tensor, "B _"], Float[Tensor, "B _"]]],
    *,
    size: int,
) -> DraftTree:
    """`most_probable` in PyTorch, for any device."""
    tokens, scores = (torch.cat([level[i] for level in levels], dim=1) for i in (0, 2))
    count = tokens.shape[1]
    starts = [sum(level[0].shape[1] for level in levels[:i]) for i in range(len(levels))]
    above = [torch.full_like(level[1], count) if i == 0 else level[1] + starts[i - 1] for i, level in enumerate(levels)]
    parents = torch.cat(above, dim=1)  # `count` represents the root
    depth = torch.cat([torch.full_like(level[0], i + 1) for i, level in enumerate(levels)], dim=1)

    return selected(root, tokens, parents, depth, scores, size=size, max_depth=len(levels))


def selected(
    root: Int[Tensor, " B"],
    tokens: Int[Tensor, "B M"],
    parents: Int[Tensor, "B M"],
    depth: Int[Tensor, "B M"],
    scores: Float[Tensor, "B M"],
    *,
    size: int,
    max_depth: int,
) -> DraftTree:
    """The tree of the `size - 1` candidates with the best scores; see `most_probable`.

    Candidates follow their parents; a parent M is the root.
    """
    count = tokens.shape[1]
    order = scores.sort(dim=1, descending=True, stable=True).indices  # stable: parents precede children of equal score
    order = order[:, : size - 1]
    kept = torch.where(scores.gather(1, order) > -torch.inf, order, count).sort(dim=1).values  # padding comes last
    number = kept.new_zeros((len(root), count + 1))
    number.scatter_(1, kept, torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept))
    number[:, count] = 0
    valid = kept < count
    place = kept.clamp(max=count - 1)

    def nodes(values: Tensor, first: Tensor) -> Tensor:
        return torch.cat((first[:, None].to(values.dtype), torch.where(valid, values.gather(1, place), 0)), dim=1)

    none = torch.zeros_like(root)
    above_nodes = nodes(number.gather(1, parents), none)
    return DraftTree(
        nodes(tokens, root),
        above_nodes,
        nodes(depth, none),
        torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1),
        ancestors_of(above_nodes, max_depth=max_depth),
        nodes(scores, none),
    )


def ancestors_of(parents: Int[Tensor, "B N"], *, max_depth: int) -> Bool[Tensor, "B N N"]:
    """Each node's ancestors including itself, found by following `parents` for `max_depth` steps."""
    batch, size = parents.shape
    node = torch.arange(size, device=parents.device).expand(batch, size)
    found = parents.new_zeros((batch, size, size), dtype=torch.bool).scatter_(2, node[..., None], True)
    for _ in range(max_depth):
        node = parents.gather(1, node)
        found.scatter_(2, node[..., None], True)
    return found


def tree_mask(
    tree: DraftTree, length: Int[Tensor, " B"], *, slots: int, window: int | None = None
) -> Bool[Tensor, "B N slots"]:
    """The slots that each node attends to: committed ones (below `length`) and its ancestors, at `length` + node.

    `window` limits attention to positions at most `window - 1` back.  The position of a committed slot is its index;
    the position of a node is `length` + depth.
    """
    index = torch.arange(slots, device=length.device) - length[:, None]  # [B, S]: the node in each slot
    node = index.clamp(0, tree.size - 1)
    in_tree = (index >= 0) & (index < tree.size)
    own = tree.ancestors.gather(2, node[:, None].expand(-1, tree.size, -1)) & in_tree[:, None]
    mask = own | (index < 0)[:, None]
    if window is not None:
        distance = torch.where(in_tree, tree.depth.gather(1, node), index)  # of the slot's position from `length`
        mask = mask & (tree.depth[:, :, None] - distance[:, None] < window)
    return mask
