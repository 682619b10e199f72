"""The walk without a loop against a walk with one, on random trees: right ones, with equal siblings, and malformed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_tree
from redrafter.core.tree import DraftTree, ancestors_of, prefix_tree
from redrafter.decoding.verify import walk


def children(tree, row: int, path: list[int]) -> list[int]:
    """Nodes below the last of a path whose fields all say that the path is what lies above them."""
    return [
        n
        for n in range(1, tree.size)
        if tree.valid[row, n]
        and tree.parents[row, n] == path[-1]
        and tree.depth[row, n] == len(path)
        and tree.ancestors[row, n].nonzero().flatten().tolist() == sorted([*path, n])
    ]


def plain_walk(tree, choice, row: int, length: int) -> list[int]:
    """Plain reference: the longest path on which every token is the target's choice; the smallest end of equals."""
    if tree.depth[row, 0] != 0 or tree.ancestors[row, 0].nonzero().flatten().tolist() != [0]:
        return []
    paths = [[0]]
    for path in paths:
        if len(path) <= length:
            chosen = choice[row, path[-1]]
            paths += [[*path, n] for n in children(tree, row, path) if tree.tokens[row, n] == chosen]
    return min(paths, key=lambda path: (-len(path), path[-1]))


def check(tree, choice, length: int) -> None:
    path, accepted = walk(tree, choice, length=length)
    assert path.shape == (len(choice), length + 1)
    for row in range(len(choice)):
        expected = plain_walk(tree, choice, row, length)
        assert accepted[row] == len(expected) - 1
        assert path[row, : len(expected)].tolist() == expected
        assert not path[row, len(expected) :].any()


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_walk_agrees_with_descending(batch, width, length, seed):
    generator = torch.Generator().manual_seed(seed)
    beams = torch.randint(0, 2, (batch, width, length), generator=generator)
    tree = prefix_tree(torch.zeros(batch, dtype=torch.long), beams)
    check(tree, torch.randint(0, 2, tree.tokens.shape, generator=generator), length)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
def test_walk_agrees_with_descending_any_tree(batch, size, length, malformed, seed):
    """Equal siblings, nodes in any order, invalid nodes between others; wrong parents, depths and ancestors."""
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(batch, size, vocabulary=2, malformed=malformed, generator=generator)
    check(tree, torch.randint(0, 2, tree.tokens.shape, generator=generator), length)


def test_equal_siblings_are_counted_once():
    parents, depth = torch.tensor([[0, 0, 0, 2]]), torch.tensor([[0, 1, 1, 2]])
    tree = DraftTree(torch.tensor([[5, 9, 9, 7]]), parents, depth, depth >= 0, ancestors_of(parents, max_depth=2))
    path, accepted = walk(tree, torch.tensor([[9, 3, 7, 0]]), length=2)
    assert (path.tolist(), accepted.tolist()) == ([[0, 2, 3]], [2])  # the second of them goes on
    path, accepted = walk(tree, torch.tensor([[9, 3, 3, 0]]), length=2)
    assert (path.tolist(), accepted.tolist()) == ([[0, 1, 0]], [1])


def test_a_node_whose_parent_is_not_among_its_ancestors_is_not_kept():
    parents = torch.tensor([[0, 0, 1]])
    ancestors = torch.eye(3, dtype=torch.bool)[None].clone()
    ancestors[..., 0] = True  # node 2 did not see node 1
    tree = DraftTree(torch.tensor([[1, 1, 1]]), parents, torch.tensor([[0, 1, 2]]), parents >= 0, ancestors)
    assert walk(tree, torch.ones(1, 3, dtype=torch.long), length=2)[1].tolist() == [1]


def test_a_root_that_saw_something_else_is_reported():
    parents = torch.zeros(2, 2, dtype=torch.long)
    depth = torch.tensor([[0, 1], [1, 2]])
    tree = DraftTree(parents + 1, parents, depth, depth >= 0, torch.ones(2, 2, 2, dtype=torch.bool).tril())
    assert walk(tree, parents + 1, length=2)[1].tolist() == [1, -1]


def test_an_invalid_node_is_not_kept():
    parents, depth = torch.tensor([[0, 0]]), torch.tensor([[0, 1]])
    valid = torch.tensor([[True, False]])
    tree = DraftTree(torch.tensor([[5, 9]]), parents, depth, valid, ancestors_of(parents, max_depth=1))
    assert walk(tree, torch.tensor([[9, 9]]), length=1)[1].tolist() == [0]
