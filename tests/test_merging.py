"""Continuations found in a text and their merging with a tree, against plain searches with lists and dictionaries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import AsksNothing
from redrafter.core.continuations import (
    ACCEPTANCE,
    ACCEPTANCE_SAMPLED,
    ALTERNATIVE,
    NGRAM,
    Continuations,
    continuations,
)
from redrafter.core.merging import merged
from redrafter.core.tree import ancestors_of, most_probable

texts = st.lists(st.integers(3, 6), min_size=1, max_size=24)


def plain_continuations(text: list[int], count: int, length: int, ngram: int) -> list[tuple[list[int], list[float]]]:
    """Every earlier place, one at a time; the longest match and then the latest place first."""
    end, places = len(text) - 1, []
    for place in range(end):
        size = 0
        while size < min(ngram, place + 1) and text[place - size] == text[end - size]:
            size += 1
        if size:
            places.append((size, place))
    found = []
    for rank, (size, place) in enumerate(sorted(places, reverse=True)[:count]):
        extended, scores, score = list(text), [], math.log(ALTERNATIVE) if rank else 0.0
        for step in range(length):
            extended.append(extended[place + 1 + step])  # may be one of its own tokens
            score += math.log(ACCEPTANCE[min(size + step, NGRAM)])
            scores.append(score)
        found.append((extended[end + 1 :], scores))
    return found


@settings(max_examples=200)
@given(
    st.lists(texts, min_size=1, max_size=4),
    st.integers(1, 5), st.integers(1, 6), st.integers(1, NGRAM), st.integers(0, 5),
)  # fmt: skip
def test_continuations_agree_with_a_plain_search(rows, count, length, ngram, spare):
    """What stands behind a text is not looked at."""
    slots = max(map(len, rows)) + spare
    text = torch.full((len(rows), slots), 3)
    for row, tokens in enumerate(rows):
        text[row, : len(tokens)] = torch.tensor(tokens)
    end = torch.tensor([len(tokens) - 1 for tokens in rows])
    found = continuations(text, end, count=count, length=length, ngram=ngram)
    for row, tokens in enumerate(rows):
        wanted = plain_continuations(tokens, count, length, ngram)
        for k in range(found.tokens.shape[1]):
            if k < len(wanted):
                assert found.tokens[row, k].tolist() == wanted[k][0]
                assert found.log_probs[row, k].tolist() == pytest.approx(wanted[k][1], abs=1e-5)
            else:
                assert found.tokens[row, k].tolist() == [-1] * length
                assert found.log_probs[row, k].tolist() == [-math.inf] * length
        assert len(wanted) <= found.tokens.shape[1] or count > slots


def test_rows_that_sample_are_less_likely_to_repeat_themselves():
    """Each row by its own setting, which the host does not read."""
    text = torch.tensor([[3, 4, 5, 3, 4]] * 2)
    end = torch.tensor([4, 4])
    with AsksNothing():
        found = continuations(text, end, count=1, length=2, sampled=torch.tensor([0, 1]))
    assert found.tokens.tolist() == [[[5, 3]]] * 2
    for row, table in enumerate((ACCEPTANCE, ACCEPTANCE_SAMPLED)):
        assert found.log_probs[row, 0].tolist() == pytest.approx([math.log(table[2]), math.log(table[2] * table[3])])
    assert all(one < other for one, other in zip(ACCEPTANCE_SAMPLED[1:], ACCEPTANCE[1:], strict=True))


def random_levels(generator: torch.Generator, batch: int, width: int, length: int):
    """Levels of candidates as of a beam search: siblings differ, children are at most as probable as their parents."""
    levels, above = [], torch.zeros(batch, 1)
    for _ in range(length):
        parents = torch.randint(above.shape[1], (batch, width), generator=generator).sort(dim=1).values
        tokens = torch.stack([torch.randperm(max(4, width), generator=generator)[:width] for _ in range(batch)])
        above = above.gather(1, parents) - torch.rand(parents.shape, generator=generator)
        levels.append((tokens, parents, above))
    return levels


def nodes_of(tree, row: int) -> dict[tuple[int, ...], float]:
    """Paths below the root with their log-probabilities."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for n in range(1, int(tree.valid[row].sum())):
        parent = int(tree.parents[row, n])
        assert parent < n
        paths[n] = (*paths[parent], int(tree.tokens[row, n]))
        assert int(tree.depth[row, n]) == len(paths[n])
    found = {path: float(tree.log_probs[row, n]) for n, path in paths.items()}
    assert len(found) == len(paths), "no path twice"
    return found


def plain_merge(tree: dict[tuple[int, ...], float], chains: list[tuple[list[int], list[float]]]) -> dict:
    """The best score of every path, walking down each continuation one token at a time."""
    best = dict(tree)
    for tokens, scores in chains:
        score = before = 0.0
        for depth in range(1, len(tokens) + 1):
            path = tuple(tokens[:depth])
            score = max(score + scores[depth - 1] - before, tree.get(path, -math.inf))
            before = scores[depth - 1]
            best[path] = max(best.get(path, -math.inf), score)
    return best


@settings(max_examples=200)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4),
    st.integers(1, 4), st.integers(1, 6), st.integers(2, 30), st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_merged_trees_hold_the_most_probable_nodes(seed, batch, width, length, count, chain, size, least):
    generator = torch.Generator().manual_seed(seed)
    levels = random_levels(generator, batch, width, length)
    tree = most_probable(torch.arange(batch) + 50, levels, size=1 + width * length)
    tokens = torch.randint(0, 4, (batch, count, chain), generator=generator)
    gains = torch.rand((batch, count, chain), generator=generator).sort(dim=1).values  # the first is the most probable
    number = torch.randint(0, count + 1, (batch,), generator=generator)
    exists = (torch.arange(count) < number[:, None])[..., None]
    tokens = torch.where(exists, tokens, -1)
    found = Continuations(tokens, torch.where(exists, -gains.cumsum(dim=2), -torch.inf))
    with AsksNothing():
        out = merged(tree, found, size=size, max_depth=max(length, chain), least=least)
    assert out.size <= size
    assert out.tokens[:, 0].tolist() == [50 + row for row in range(batch)]
    assert out.ancestors.equal(ancestors_of(out.parents, max_depth=max(length, chain)))
    for row in range(batch):
        own = [(tokens[row, k].tolist(), found.log_probs[row, k].tolist()) for k in range(int(number[row]))]
        before = nodes_of(tree, row)
        wanted = plain_merge(before, own)
        likely = [path for path in wanted if path in before or math.exp(wanted[path]) >= least]
        ranked = sorted(likely, key=lambda path: -wanted[path])
        kept = nodes_of(out, row)
        assert len(kept) == min(size, len(ranked))
        assert sorted(kept.values(), reverse=True) == pytest.approx([wanted[p] for p in ranked[: len(kept)]], abs=1e-5)
        assert all(wanted[path] == pytest.approx(score, abs=1e-5) for path, score in kept.items())
        assert not out.depth[row][~out.valid[row]].any()
