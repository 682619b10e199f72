"""Noise that is a function of its place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.noise import gumbel, row_seeds

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
