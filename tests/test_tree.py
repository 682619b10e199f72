"""Folding against a plain trie, on random beams."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.core.tree import ancestors_of, chain, most_probable, parallel_chains, prefix_tree, tree_mask


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


def path_to(tree, row: int, node: int) -> list[int]:
    nodes = [node]
    while nodes[0] != 0:
        nodes.insert(0, int(tree.parents[row, nodes[0]]))
    return nodes


beams_strategy = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31)).map(
    lambda s: torch.randint(0, 3, s[:3], generator=torch.Generator().manual_seed(s[3]))
)


@given(beams_strategy)
def test_fold_agrees_with_a_trie(beams):
    batch, width, length = beams.shape
    root = torch.arange(7, 7 + batch)
    tree = prefix_tree(root, beams)
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
    tree = prefix_tree(torch.zeros(beams.shape[0], dtype=torch.long), beams)
    for row in range(beams.shape[0]):
        for n in range(tree.size):
            chain_of_n, node = {n, 0}, n
            while node != 0:
                node = int(tree.parents[row, node])
                chain_of_n.add(node)
            assert set(tree.ancestors[row, n].nonzero().flatten().tolist()) == chain_of_n


@given(beams_strategy)
def test_trimmed_drops_padding_alone(beams):
    tree = prefix_tree(torch.zeros(beams.shape[0], dtype=torch.long), beams)
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


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(2, 20), st.booleans(), st.integers(0, 2**31)
)
def test_the_most_probable_nodes_agree_with_a_sorted_list(batch, width, length, size, ties, seed):
    """Scores of a child are at most its parent's; some candidates have no probability, some are tied."""
    generator = torch.Generator().manual_seed(seed)
    levels, above_scores = [], torch.zeros(batch, 1)
    for depth in range(length):
        parents = (
            torch.arange(above_scores.shape[1])
            if depth == 0
            else torch.randperm(above_scores.shape[1], generator=generator)[:width]
        )
        count = len(parents) * width
        parents = parents.repeat_interleave(width).expand(batch, count)
        gain = -torch.rand(batch, count, generator=generator)
        if ties:
            gain = gain.round()
        gain[torch.rand(batch, count, generator=generator) < 0.1] = -torch.inf
        scores = above_scores.gather(1, parents) + gain
        levels.append((torch.arange(width).repeat(count // width).expand(batch, count) + 3, parents, scores))
        above_scores = scores
    root = torch.arange(7, 7 + batch)
    tree = most_probable(root, levels, size=size)
    assert torch.equal(tree.ancestors, ancestors_of(tree.parents, max_depth=length))
    for row in range(batch):
        known: list[tuple[float, tuple[int, ...]]] = []
        paths: list[tuple[int, ...]] = [()]
        for tokens, parents, scores in levels:
            paths = [(*paths[p], t) for p, t in zip(parents[row].tolist(), tokens[row].tolist(), strict=True)]
            known += zip(scores[row].tolist(), paths, strict=True)
        known.sort(key=lambda one: -one[0])  # stable: parents first
        expected = [path for score, path in known[: size - 1] if score > -torch.inf]
        nodes = [n for n in range(tree.size) if tree.valid[row, n]]
        assert nodes == list(range(len(expected) + 1)), "padding comes last"
        assert tree.tokens[row, 0] == root[row]
        assert {path_of(tree, row, node) for node in nodes[1:]} == set(expected)
        for node in nodes[1:]:
            assert tree.depth[row, node] == len(path_of(tree, row, node))
            assert tree.parents[row, node] < node
        assert not tree.depth[row][~tree.valid[row]].any()


@given(st.integers(0, 2**31), st.sampled_from([None, 1, 2, 4]))
def test_tree_mask_agrees_with_its_definition(seed, window):
    generator = torch.Generator().manual_seed(seed)
    tree = prefix_tree(torch.zeros(2, dtype=torch.long), torch.randint(0, 3, (2, 3, 3), generator=generator))
    length = torch.randint(0, 6, (2,), generator=generator)
    mask = tree_mask(tree, length, slots=18, window=window)
    for row in range(2):
        for node in range(tree.size):
            above = path_to(tree, row, node)
            for slot in range(18):
                at = slot - int(length[row])
                committed, ancestor = at < 0, at in above
                position = slot if committed else int(length[row]) + (int(tree.depth[row, at]) if ancestor else 0)
                distance = int(length[row]) + int(tree.depth[row, node]) - position
                near = window is None or distance < window
                assert bool(mask[row, node, slot]) == ((committed or ancestor) and near), (row, node, slot)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**31))
def test_beams_abreast_are_their_own_chains(width, length, seed):
    beams = torch.randint(0, 9, (2, width, length), generator=torch.Generator().manual_seed(seed))
    tree = parallel_chains(torch.tensor([3, 4]), beams)
    assert tree.size == 1 + width * length
    assert tree.valid.all()
    for row in range(2):
        assert path_of(tree, row, 0) == ()
        for beam in range(width):
            for depth in range(1, length + 1):
                node = 1 + (depth - 1) * width + beam
                assert path_of(tree, row, node) == tuple(beams[row, beam, :depth].tolist())
                assert tree.depth[row, node] == depth
    assert tree.ancestors.equal(ancestors_of(tree.parents, max_depth=length))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2))
def test_a_chain_may_be_shorter_in_some_rows(counts, spare):
    size = max(counts) + spare
    tokens = torch.randint(1, 9, (len(counts), size))
    tree = chain(tokens, torch.arange(size) < torch.tensor(counts)[:, None])
    for row, count in enumerate(counts):
        whole = chain(tokens[row : row + 1, :count])
        for name in ("tokens", "parents", "depth", "valid"):
            assert getattr(tree, name)[row, :count].equal(getattr(whole, name)[0])
            assert not getattr(tree, name)[row, count:].any()
    assert tree.ancestors.equal(ancestors_of(tree.parents, max_depth=size))
