"""Noise that is a function of its place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.core.noise import gumbel, row_seeds

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
    high, low = (h ^ 1 << 31) >> 9, h & 511
    return -math.log(-math.log(1 - high / 2**23) + (512 - low) / 2**32)


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
    blocks = [gumbel(torch.arange(64), torch.full((64, 1), position), 2**16).aminmax() for position in range(8)]
    least, most = (torch.stack(values) for values in zip(*blocks, strict=True))  # of 2**25 draws; NaN if one is
    assert -2.8 < least.min() < -2.6
    assert 15 < most.max() < 22.2  # the largest of so many is below 15 with odds of exp(-10)


def test_the_tail_is_exponential_at_full_resolution():
    """Of n values of exp(-noise), as many lie below a limit as should, and they differ.

    Poisson counts within 4 standard deviations: odds of a false alarm below 1e-4 for each limit.
    """
    vocabulary, blocks = 2**17, 64
    found = []
    for block in range(blocks):
        exponential = (-gumbel(torch.tensor([11]), torch.arange(8)[None] + 8 * block, vocabulary)).exp()
        found.append(exponential[exponential < 1e-4])
    smallest = torch.cat(found)
    for limit in (1e-4, 1e-5, 1e-6, 2e-7):  # 23 bits are multiples of 1.2e-7
        expected = vocabulary * 8 * blocks * limit
        assert abs(int((smallest < limit).sum()) - expected) < 4 * math.sqrt(expected)
    smallest = smallest[smallest < 1e-6]  # about 67 of 4,295 steps of 2**-32: half a pair coincides
    assert len(smallest.unique()) > len(smallest) - 6  # Poisson(0.52): 1e-5


def test_tokens_of_little_probability_are_drawn_as_often_as_they_should_be():
    """131,071 tokens share 12 in 1,000.  A count from Poisson(12) lies outside 3 to 25 with odds below 1e-3."""
    vocabulary, rest, draws = 2**17, 12e-3, 1_000
    scores = torch.full((vocabulary,), math.log(rest / (vocabulary - 1)))
    scores[0] = math.log(1 - rest)
    drawn = [
        (gumbel(torch.tensor([1234]), torch.arange(start, start + 8)[None], vocabulary)[0] + scores).argmax(dim=-1)
        for start in range(0, draws, 8)
    ]
    assert 3 <= torch.cat(drawn).ne(0).sum() <= 25


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
