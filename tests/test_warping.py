"""Settings of each row against transformers' own processors, row by row, and against arithmetic by hand."""

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from redrafter.core import warping
from redrafter.core.rows import Features, RowSettings
from redrafter.core.warping import (
    above_min_p,
    with_occurrence_penalty,
    with_repetition_penalty,
    with_temperature,
    within_top_k,
    within_top_p,
)
from redrafter.decoding.processors import OccurrencePenalty

ROWS, NODES, VOCABULARY = 5, 3, 301
SIZES = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1}
MODEL = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=3, num_attention_heads=1, num_key_value_heads=1, **SIZES))
"""Any model, which makes a list of processors from a config."""


def scores_of(seed: int, *, sharpness: float = 3.0, forbidden: int = 0, rounded=torch.float32, step=None):
    """Scores [B, N, V].  Those that are rounded to bfloat16 or to a grid hold many ties; some are -inf."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, NODES, VOCABULARY, generator=generator) * sharpness
    scores = scores.to(rounded).to(torch.promote_types(rounded, torch.float32))
    if step is not None:
        scores = (scores * step).round() / step
    scores[..., torch.randperm(VOCABULARY, generator=generator)[:forbidden]] = -torch.inf
    return scores


any_scores = st.builds(
    scores_of,
    st.integers(0, 10**6),
    sharpness=st.floats(0.01, 30),
    forbidden=st.integers(0, VOCABULARY),
    rounded=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    step=st.sampled_from([None, 1.0, 8.0]),
)


def per_row(values):
    return st.lists(values, min_size=ROWS, max_size=ROWS)


def one_by_one(scores, made):
    """Each row's scores by its own processor of transformers; None for none."""
    expected = scores.clone()
    for row, processor in enumerate(made):
        if processor is not None:
            expected[row] = processor(None, scores[row].clone())
    return expected


def identical(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100)
@given(any_scores, per_row(st.floats(0, 1)))
def test_the_nucleus_is_that_of_transformers(scores, top_p):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warping, "NUCLEUS_SIZES", (3, 48))  # so that rows need one search, two, or a sort
        found = within_top_p(scores, torch.tensor(top_p, dtype=torch.float64))
    identical(found, one_by_one(scores, [TopPLogitsWarper(one) if one < 1 else None for one in top_p]))


@settings(max_examples=60)
@given(any_scores, per_row(st.sampled_from([0, 1, 2, 7, 50, 300, 301, 400])))
def test_the_largest_scores_are_those_of_transformers(scores, top_k):
    found = within_top_k(scores, torch.tensor(top_k), max(1, *top_k))
    identical(found, one_by_one(scores, [hf.TopKLogitsWarper(one) if one else None for one in top_k]))
    identical(within_top_k(scores, torch.tensor(top_k), 512), found)


@settings(max_examples=60)
@given(any_scores, per_row(st.one_of(st.just(0.0), st.floats(0, 1))))
def test_the_least_probability_is_that_of_transformers(scores, min_p):
    found = above_min_p(scores, torch.tensor(min_p, dtype=torch.float64))
    identical(found, one_by_one(scores, [hf.MinPLogitsWarper(one) if one else None for one in min_p]))


@settings(max_examples=40)
@given(any_scores, per_row(st.one_of(st.just(1.0), st.floats(0.05, 20))))
def test_the_temperature_is_that_of_transformers(scores, temperature):
    found = with_temperature(scores, torch.tensor(temperature, dtype=torch.float64))
    identical(found, one_by_one(scores, [hf.TemperatureLogitsWarper(one) for one in temperature]))


@settings(max_examples=40)
@given(any_scores, per_row(st.one_of(st.just(1.0), st.floats(0.1, 3))), st.integers(0, 2**31))
def test_the_repetition_penalty_is_that_of_transformers(scores, penalty, seed):
    text = torch.randint(0, VOCABULARY, (ROWS, NODES, 20), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, text, True)
    found = with_repetition_penalty(scores, seen, torch.tensor(penalty, dtype=torch.float64))
    for row, node in ((row, node) for row in range(ROWS) for node in range(NODES)):
        processor = hf.RepetitionPenaltyLogitsProcessor(penalty[row])
        identical(found[row, node], processor(text[row, node][None], scores[row, node][None].clone())[0])


@settings(max_examples=60)
@given(
    any_scores, per_row(st.sampled_from([1.0, 0.5, 1.7])), per_row(st.sampled_from([0, 3, 60])),
    per_row(st.sampled_from([1.0, 0.4, 0.95])), per_row(st.sampled_from([0.0, 0.05, 0.5])),
)  # fmt: skip
def test_settings_are_applied_in_the_order_of_transformers(scores, temperature, top_k, top_p, min_p):
    """Also if the step computes what only some rows need."""
    chosen = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    real = {name: torch.tensor(value, dtype=torch.float64) for name, value in chosen.items()}
    nothing, ones = torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.long)
    rest = {"repetition": nothing + 1, "presence": nothing, "frequency": nothing}
    own = RowSettings(sampled=ones, prompt=ones, top_k=torch.tensor(top_k), **real, **rest)
    found = Features(sampling=True, top_k=64, top_p=True, min_p=True).warp(scores, own)
    for row in range(ROWS):
        config = hf.GenerationConfig(
            do_sample=True, temperature=temperature[row], top_k=top_k[row], top_p=top_p[row], min_p=min_p[row] or None
        )
        warper = MODEL._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
        identical(found[row], warper(None, scores[row].clone()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_hold_no_numbers_are_treated_as_in_transformers(value):
    """And change no other row."""
    scores = scores_of(1)
    scores[1, 0, 7] = value
    scores[2] = value
    half, few = torch.full((ROWS,), 0.5, dtype=torch.float64), torch.full((ROWS,), 3)
    identical(within_top_p(scores, half), one_by_one(scores, [TopPLogitsWarper(0.5)] * ROWS))
    identical(within_top_k(scores, few, 3), one_by_one(scores, [hf.TopKLogitsWarper(3)] * ROWS))
    identical(above_min_p(scores, half), one_by_one(scores, [hf.MinPLogitsWarper(0.5)] * ROWS))


@settings(max_examples=20)
@given(any_scores, st.booleans())
def test_neutral_settings_change_no_score(scores, broken):
    if broken:
        scores[1, 0, 7], scores[2] = torch.nan, torch.inf
    zero, one = torch.zeros(ROWS, dtype=torch.float64), torch.ones(ROWS, dtype=torch.float64)
    seen = torch.ones_like(scores, dtype=torch.bool)
    for found in (
        with_temperature(scores, one),
        within_top_k(scores, zero.long(), 64),
        within_top_p(scores, one),
        above_min_p(scores, zero),
        with_repetition_penalty(scores, seen, one),
        with_occurrence_penalty(scores, seen.to(scores.dtype), zero, zero),
    ):
        identical(found, scores)


@pytest.mark.parametrize("top_p", [1e-4, 0.5, 0.9, 0.95])
def test_a_nucleus_of_a_large_vocabulary_is_found_without_a_sort(top_p, monkeypatch):
    """In almost all rows of scores that are as far apart as those of language models."""
    scores = torch.randn(200, 50_000, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, :200] *= 3
    expected, left = TopPLogitsWarper(top_p)(None, scores), []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda rows, **how: left.append(len(rows)) or sort(rows, **how))
    found = within_top_p(scores[:, None], torch.full((200,), top_p, dtype=torch.float64))
    assert found[:, 0].equal(expected)
    assert sum(left) < 20


def test_the_nucleus_of_other_dtypes_is_that_of_transformers():
    scores = torch.randn(20, 3000, generator=torch.Generator().manual_seed(1)) * 3.5
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = within_top_p(scores.to(dtype)[:, None], torch.full((20,), 0.9, dtype=torch.float64))
        assert found[:, 0].equal(TopPLogitsWarper(0.9)(None, scores.to(dtype)))


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 9.0])
def test_no_nucleus_depends_on_the_rows_beside_it(sharpness):
    """At a size where torch divides one row among threads, but many rows by rows."""
    logits = torch.randn(7, 1, 50_000, generator=torch.Generator().manual_seed(0)) * sharpness
    logits[1] *= 4
    limits = torch.tensor([0.9, 0.5, 1.0, 0.9, 0.99, 0.9, 0.1], dtype=torch.float64)
    together = within_top_p(logits, limits)
    for row in range(7):
        assert within_top_p(logits[row : row + 1], limits[row : row + 1]).equal(together[row : row + 1])
        alone = logits[row] if limits[row] == 1 else TopPLogitsWarper(float(limits[row]))(None, logits[row])
        identical(together[row], alone)


def test_presence_and_frequency_count_what_was_written():
    scores = torch.zeros(1, 6)
    penalty = OccurrencePenalty(2, presence=1.0, frequency=0.5)
    assert penalty(torch.tensor([[5, 5, 1, 2, 2]]), scores).tolist() == [[0, -1.5, -2, 0, 0, 0]]
    count = torch.tensor([[[0.0, 1, 2]], [[0, 1, 2]]])
    presence, frequency = torch.tensor([1.0, 0.0]), torch.tensor([0.5, -1.0])
    found = with_occurrence_penalty(torch.zeros(2, 1, 3), count, presence, frequency)
    assert found.tolist() == [[[0, -1.5, -2]], [[0, 1, 2]]]
