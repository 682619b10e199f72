"""Our processors against transformers' own, and against arithmetic by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from redrafter.decoding.processors import Nucleus, OccurrencePenalty


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0, 1), st.floats(0.01, 30), st.integers(1, 60), st.integers(0, 301),
    st.sampled_from([-torch.inf, -1e4]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([None, 1.0, 8.0]),
)  # fmt: skip
def test_the_nucleus_is_that_of_transformers(seed, top_p, sharpness, least, forbidden, fill, rounded, step):
    """Scores rounded to bfloat16 or to a grid hold many ties."""
    logits = torch.randn(5, 301, generator=torch.Generator().manual_seed(seed)) * sharpness
    logits = logits.to(rounded).to(torch.promote_types(rounded, torch.float32))
    if step is not None:
        logits = (logits * step).round() / step
    logits[:, torch.randperm(301, generator=torch.Generator().manual_seed(seed))[:forbidden]] = -torch.inf
    slow = TopPLogitsWarper(top_p, fill, min_tokens_to_keep=least)
    fast = Nucleus.like(slow)
    fast.looks = (3, 48)  # so that rows need one look, two, or a sort
    torch.testing.assert_close(fast(None, logits), slow(None, logits), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("top_p", [1e-4, 0.5, 0.9, 0.95])
def test_a_nucleus_of_a_large_vocabulary_is_found_without_a_sort(top_p, monkeypatch):
    """In almost all rows of scores that are as far apart as those of language models."""
    scores = torch.randn(60, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, :200] *= 3
    slow = TopPLogitsWarper(top_p)
    expected, left = slow(None, scores), []
    sort = TopPLogitsWarper.__call__
    monkeypatch.setattr(
        TopPLogitsWarper, "__call__", lambda one, ids, row: left.append(len(row)) or sort(one, ids, row)
    )
    assert Nucleus.like(slow)(None, scores).equal(expected)
    assert sum(left) < 6


def test_the_nucleus_of_other_dtypes_is_that_of_transformers():
    scores = torch.randn(20, 3000, generator=torch.Generator().manual_seed(1)) * 3.5
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        slow = TopPLogitsWarper(0.9)
        assert Nucleus.like(slow)(None, scores.to(dtype)).equal(slow(None, scores.to(dtype)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_hold_no_numbers_are_treated_as_in_transformers(value):
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)) * 3.5
    scores[1, 7] = value
    scores[2] = -torch.inf
    slow = TopPLogitsWarper(0.9)
    torch.testing.assert_close(Nucleus.like(slow)(None, scores), slow(None, scores), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 9.0])
def test_no_nucleus_depends_on_the_rows_beside_it(sharpness):
    """At a size where torch divides one row among threads, but many rows by rows."""
    logits = torch.randn(7, 50_000, generator=torch.Generator().manual_seed(0)) * sharpness
    logits[1] *= 4
    warper = Nucleus(0.9)
    together = warper(None, logits)
    for row in range(7):
        assert warper(None, logits[row : row + 1]).equal(together[row : row + 1])
    torch.testing.assert_close(together, TopPLogitsWarper(0.9)(None, logits), rtol=0, atol=0)


def test_presence_and_frequency_count_what_was_written():
    scores = torch.zeros(1, 6)
    penalty = OccurrencePenalty(2, presence=1.0, frequency=0.5)
    assert penalty(torch.tensor([[5, 5, 1, 2, 2]]), scores).tolist() == [[0, -1.5, -2, 0, 0, 0]]
