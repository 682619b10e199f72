"""Local distillation against transformers' greedy generation from every prefix."""

from __future__ import annotations

import pytest
import torch

from conftest import greedy, tiny_model
from redrafter.targets.target import Target
from redrafter.training.continuations import continuations


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("chunk", [4, 512])
def test_continuations_equal_greedy_generation_from_every_position(family, chunk):
    """Also beyond a sliding window."""
    model = tiny_model(family)
    ids = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(1))
    found = continuations(Target(model), ids, depth=4, chunk=chunk)
    for row in range(2):
        for position in range(14):
            assert found[row, position].tolist() == greedy(model, ids[row, : position + 1].tolist(), 4), (row, position)


def test_padding_on_the_right_changes_nothing(llama):
    ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(2))
    alone = continuations(Target(llama), ids, depth=3)
    padded = continuations(Target(llama), torch.nn.functional.pad(ids, (0, 5)), depth=3)
    assert torch.equal(alone, padded[:, :9])


def test_nothing_follows_an_end_token(llama):
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(3))
    free = continuations(Target(llama), ids, depth=4)
    end = int(free[0, 5, 1])
    cut = continuations(Target(llama), ids, depth=4, ends=frozenset([end]))
    for before, after in zip(free[0].tolist(), cut[0].tolist(), strict=True):
        known = before.index(end) + 1 if end in before else 4
        assert after == before[:known] + [-1] * (4 - known)
    assert cut[0, 5].tolist()[2:] == [-1, -1]


def test_nothing_follows_the_models_last_position():
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(4))
    long, short = (
        continuations(Target(tiny_model(max_position_embeddings=positions)), ids, depth=4) for positions in (64, 12)
    )
    last_read = torch.arange(12)[:, None] + torch.arange(4)
    assert torch.equal(short, long.masked_fill(last_read > 11, -1))
