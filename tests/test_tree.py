"""Folding against a plain trie, on random beams."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.tree import ancestors_of, chain, fold


def paths_of_trie(beams: list[list[int]]) -> set[tuple[int, ...]]:
    """Plain reference: every distinct prefix of a beam is a node."""
    return {tuple(beam[: depth + 1]) for beam in beams for depth in range(len(beam))}


def path_of(tree, row: int, node: int) -> tuple[int, ...]:
    """The drafted tokens from the root to a node, by following parents one at a time."""
    tokens: list[int] = []
    while node != 0:
        tokens.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return tuple(tokens)


beams_strategy = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31)).map(
    lambda s: torch.randint(0, 3, s[:3], generator=torch.Generator().manual_seed(s[3]))
)


@given(beams_strategy)
def test_fold_agrees_with_a_trie(beams):
    batch, width, length = beams.shape
    root = torch.arange(7, 7 + batch)
    tree = fold(root, beams)
    assert tree.tokens.shape == (batch, 1 + width * length)
    for row in range(batch):
        nodes = [n for n in range(tree.size) if tree.valid[row, n]]
        assert nodes == list(range(len(nodes))), "padding comes last"
        assert tree.tokens[row, 0] == root[row]
        assert tree.depth[row, 0] == 0
        paths = [path_of(tree, row, n) for n in nodes[1:]]
        assert len(set(paths)) == len(paths), "no prefix twice"
        assert set(paths) == paths_of_trie(beams[row].tolist())
        for node, path in zip(nodes[1:], paths, strict=True):
            assert tree.depth[row, node] == len(path)
            assert tree.parents[row, node] < node
        assert not tree.depth[row][~tree.valid[row]].any()


@given(beams_strategy)
def test_ancestors_are_the_prefixes(beams):
    tree = fold(torch.zeros(beams.shape[0], dtype=torch.long), beams)
    for row in range(beams.shape[0]):
        for n in range(tree.size):
            chain_of_n, node = {n, 0}, n
            while node != 0:
                node = int(tree.parents[row, node])
                chain_of_n.add(node)
            assert set(tree.ancestors[row, n].nonzero().flatten().tolist()) == chain_of_n


@given(beams_strategy)
def test_trimmed_drops_padding_alone(beams):
    tree = fold(torch.zeros(beams.shape[0], dtype=torch.long), beams)
    trimmed = tree.trimmed()
    size = trimmed.size
    assert trimmed.valid.sum() == tree.valid.sum()
    assert trimmed.valid[:, -1].any()
    for name in ("tokens", "parents", "depth", "valid"):
        assert torch.equal(getattr(trimmed, name), getattr(tree, name)[:, :size])
    assert torch.equal(trimmed.ancestors, tree.ancestors[:, :size, :size])


def test_chain_is_causal():
    tree = chain(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert torch.equal(tree.ancestors[1], torch.ones(3, 3).tril().bool())
    assert tree.depth.tolist() == [[0, 1, 2]] * 2
    assert torch.equal(ancestors_of(tree.parents, max_depth=2), tree.ancestors)
