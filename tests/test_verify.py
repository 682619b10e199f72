"""The walk without a loop against a walk with one, on random trees and choices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.tree import fold
from redrafter.verify import walk


def plain_walk(tree, choice, row: int) -> list[int]:
    """Plain reference: go from the root to the child that holds the choice, until there is none."""
    path = [0]
    while True:
        following = [
            n
            for n in range(1, tree.size)
            if tree.valid[row, n] and tree.parents[row, n] == path[-1] and tree.tokens[row, n] == choice[row, path[-1]]
        ]
        if not following:
            return path
        (child,) = following  # siblings differ
        path.append(child)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_walk_agrees_with_descending(batch, width, length, seed):
    generator = torch.Generator().manual_seed(seed)
    beams = torch.randint(0, 2, (batch, width, length), generator=generator)
    tree = fold(torch.zeros(batch, dtype=torch.long), beams)
    choice = torch.randint(0, 2, tree.tokens.shape, generator=generator)
    path, accepted = walk(tree, choice, length=length)
    assert path.shape == (batch, length + 1)
    for row in range(batch):
        expected = plain_walk(tree, choice, row)
        assert accepted[row] == len(expected) - 1
        assert path[row, : len(expected)].tolist() == expected
        assert not path[row, len(expected) :].any()
