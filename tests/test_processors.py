"""Our processors against transformers' own, and against arithmetic by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from redrafter.processors import Nucleus, OccurrencePenalty


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.999), st.floats(0.1, 8), st.integers(1, 3), st.integers(0, 5))
def test_the_nucleus_is_that_of_transformers(seed, top_p, sharpness, least, forbidden):
    logits = torch.randn(5, 301, generator=torch.Generator().manual_seed(seed)) * sharpness
    logits[:, :forbidden] = -torch.inf
    slow = TopPLogitsWarper(top_p, min_tokens_to_keep=least)
    fast = Nucleus.like(slow)
    fast.looks = (3, 48)  # so that rows need one look, two, or a sort
    torch.testing.assert_close(fast(None, logits), slow(None, logits), rtol=0, atol=0)


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
