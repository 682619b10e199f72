"""Noise that is a function of its place, and the law of what is drawn with it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, decoding, generate
from redrafter.sampling import Sampler, gumbel, row_seeds
from redrafter.tree import fold

M32, M64 = 2**32 - 1, 2**64 - 1


def plain_splitmix(z: int) -> int:
    """Steele, Lea and Flood's splitmix64, https://prng.di.unimi.it/splitmix64.c."""
    z = (z + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & M64
    return z ^ z >> 31


def plain_noise(seed: int, position: int, token: int) -> float:
    """The noise by integers that do not wrap by themselves."""
    key = plain_splitmix((plain_splitmix(seed) + position) & M64)
    h = (token * 0x9E3779B9 + (key >> 32)) & M32
    h = (((h ^ h >> 16) * 0x85EBCA6B) + key) & M32
    h = ((h ^ h >> 13) * 0xC2B2AE35) & M32
    h ^= h >> 16
    return -math.log(-math.log(((h >> 9) + 0.5) / 2**23))


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 300))
def test_the_noise_agrees_with_plain_integers(seed, position, vocabulary):
    noise = gumbel(torch.tensor([seed]), torch.tensor([[position, position + 3]]), vocabulary)
    assert noise.shape == (1, 2, vocabulary)
    for token in {0, vocabulary // 2, vocabulary - 1}:
        assert noise[0, 0, token].item() == pytest.approx(plain_noise(seed, position, token), abs=1e-5)
        assert noise[0, 1, token].item() == pytest.approx(plain_noise(seed, position + 3, token), abs=1e-5)


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_the_noise_is_gumbel_along_every_axis(along):
    """Kolmogorov-Smirnov: of 10,000 right hash functions, one would fail here."""
    n = 50_000
    one = torch.tensor([[7]])
    if along == "tokens":
        noise = gumbel(torch.tensor([3]), one, n)[0, 0]
    elif along == "positions":
        noise = gumbel(torch.tensor([3]), torch.arange(n)[None], 5)[0, :, 4]
    else:
        noise = gumbel(torch.arange(n), one.expand(n, 1), 5)[:, 0, 4]
    uniform = torch.exp(-torch.exp(-noise.double())).sort().values
    distance = (uniform - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance * math.sqrt(n) < 2.23  # 2 exp(-2 · 2.23²) = 1e-4
    neighbours = torch.corrcoef(torch.stack((noise[1:], noise[:-1])))[0, 1].item()
    assert abs(neighbours) < 4.1 / math.sqrt(n)  # 4e-5


def test_the_noise_is_always_a_number():
    noise = gumbel(torch.arange(64), torch.arange(8).expand(64, 8), 2**16)  # 2**25 draws of 2**23 values
    assert noise.isfinite().all()
    assert -2.9 < noise.min() < -2.7
    assert 15 < noise.max() < 16.7


def test_seed_and_position_do_not_stand_for_each_other():
    noise = gumbel(torch.arange(4), torch.arange(4).expand(4, 4), 3)
    assert noise.flatten(0, 1).unique(dim=0).shape[0] == 16


@pytest.mark.gpu
def test_the_noise_is_the_same_on_a_gpu():
    seeds, positions = torch.tensor([3, 2**63 - 1]), torch.arange(50).expand(2, -1)
    here, there = gumbel(seeds, positions, 3000), gumbel(seeds.cuda(), positions.cuda(), 3000).cpu()
    torch.testing.assert_close(here, there, rtol=1e-5, atol=2e-6)


def test_seeds_of_rows():
    assert row_seeds([5, 6], 2) == [5, 6]
    assert len(set(row_seeds(1, 1000))) == 1000
    assert row_seeds(1, 3) == row_seeds(1, 1000)[:3]
    assert all(0 <= seed < 2**63 for seed in row_seeds(1, 1000))
    torch.manual_seed(0)
    first = row_seeds(None, 2)
    assert row_seeds(None, 2) != first
    torch.manual_seed(0)
    assert row_seeds(None, 2) == first


LAWS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("law", LAWS)
def test_the_law_is_that_of_transformers(law):
    model = tiny_model()
    config = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | law))
    processors = model._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    logits = torch.randn(2, 3, 61, generator=torch.Generator().manual_seed(0)) * 3
    draw = Sampler(do_sample=True, **law).draw(torch.tensor([1, 2]), torch.tensor([5, 6]), depths=2, vocabulary=61)
    expected = processors(torch.ones(6, 3, dtype=torch.long), logits.flatten(0, 1)).view(2, 3, 61)
    torch.testing.assert_close(draw.warp(logits), expected)
    depth = torch.tensor([[0, 1, 1], [0, 0, 1]])
    choice, score = draw.choose(logits, depth)
    for row, node in itertools.product(range(2), range(3)):
        perturbed = expected[row, node] + draw.noise[row, depth[row, node]]
        assert choice[row, node] == perturbed.argmax()
        assert score[row, node] == perturbed.max()


class Least:
    """Proposes the tokens that the drafter thinks least likely."""

    length, size = 2, 5

    def propose(self, context, root, draw):
        return fold(root, torch.tensor([[[7, 6], [6, 7]]]).expand(len(root), 2, 2))


@pytest.mark.parametrize("drafting", ["none", "untrained", "adversarial"])
def test_the_joint_law_of_three_tokens(monkeypatch, drafting):
    """Total variation from the enumerated law, within five deviations of what exact sampling shows: odds below 1e-5."""
    model = tiny_model(vocab_size=8, spread=0.2)
    prompt, n = [3, 5], 4000
    outcomes = list(itertools.product(range(8), repeat=3))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + list(outcome) for outcome in outcomes])).logits
        law = logits[:, 1:4].log_softmax(-1).gather(2, torch.tensor(outcomes)[..., None]).sum((1, 2)).exp().double()
    law = (law / law.sum()).numpy()
    torch.manual_seed(0)
    drafter = None if drafting == "none" else RecurrentDrafter.for_target(model, beam_length=2)
    if drafting == "adversarial":
        monkeypatch.setattr(decoding, "_proposer", lambda *_: Least())
    width = {"beam_width": 3} if drafting == "untrained" else {}
    out = generate(model, drafter, [prompt] * n, max_new_tokens=3, do_sample=True, seed=11, eos_token_id=(), **width)
    counts = np.zeros(512)
    for a, b, c in out.new_tokens:
        counts[64 * a + 8 * b + c] += 1
    distance = abs(counts / n - law).sum() / 2
    exact = abs(np.random.default_rng(0).multinomial(n, law, size=400) / n - law).sum(axis=1) / 2
    assert distance < exact.mean() + 5 * exact.std()
    assert exact.mean() + 5 * exact.std() < abs(np.roll(law, 1) - law).sum() / 4, "the test can tell a wrong law"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be positive to sample, not 0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not be 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not be 1.5"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], not be -0.1"),
        ({"seed": -1}, "-1 does not"),
        ({"seed": 2**63}, "between 0 and 2"),
        ({"seed": [1, 2]}, "There are 1 rows and 2 seeds"),
    ],
)
def test_impossible_values_are_refused(values, sentence):
    model = tiny_model()
    with pytest.raises(RedrafterError, match=sentence):
        generate(model, None, [[5]], do_sample=True, **values)


@pytest.mark.parametrize("values", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"seed": 3}])
def test_what_greedy_decoding_would_not_heed_is_refused(values):
    (name,) = values
    with pytest.raises(RedrafterError, match=f"{name} means nothing in greedy decoding"):
        generate(tiny_model(), None, [[5]], **values)
