"""Values that `redrafter train` chooses if the user does not."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter
from redrafter.data.examples import Row, coverage, most_frequent, vocabulary_size_for
from redrafter.targets.target import Target
from redrafter.training.defaults import COVERAGE, default_epochs, default_vocabulary, default_width, head_parameters

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("groups", "accumulation", "epochs"),
    [(384, 1, 13), (384, 2, 20), (10, 1, 20), (2400, 1, 2), (2399, 1, 2), (1600, 1, 3), (100_000, 1, 2)],
)
def test_few_rows_get_more_epochs(groups, accumulation, epochs):
    """Enough for 600 steps of 8 rows, from 2 to 20."""
    assert default_epochs(groups, 8, accumulation).value == epochs


def rows_with(kinds: int) -> list[Row]:
    """Token i occurs 1 + 10,000 // (i + 1) times."""
    ids = [i for i in range(kinds) for _ in range(1 + 10_000 // (i + 1))]
    return [Row(ids, [True] * len(ids))]


def test_rare_tokens_are_not_drafted():
    rows = rows_with(9000)
    found = {device: default_vocabulary(rows, 49_152, device).value for device in (CPU, GPU)}
    for device, kind in ((CPU, "cpu"), (GPU, "gpu")):
        assert coverage(rows, most_frequent(rows, found[device])) >= COVERAGE[kind]
        assert coverage(rows, most_frequent(rows, found[device] - 1)) < COVERAGE[kind]
    assert found[CPU] < found[GPU] <= 9000
    assert default_vocabulary(rows, 9001, GPU).value is None, "nearly all of it"
    assert default_vocabulary(rows_with(600), 2000, CPU).value is None, "a small vocabulary"
    assert default_vocabulary(rows_with(50), 49_152, CPU).value is None, "too few tokens to draft from"
    assert vocabulary_size_for(rows, 1.0) == 9000


def test_a_head_that_is_large_for_its_target_is_narrower_on_a_cpu():
    target = Target(tiny_model(vocab_size=20_000, hidden_size=32))
    assert default_width(target, 2, 20_000, CPU).value == 32
    assert default_width(target, 2, 20_000, GPU).value is None
    assert default_width(target, 2, 300, CPU).value is None, "it is small"


def test_head_parameters_counts_the_weights_of_a_drafter():
    model = tiny_model()
    for width in (32, 64):
        head = RecurrentDrafter.for_target(model, exit_dim=width)
        weights = sum(p.numel() for p in head.parameters() if p.dim() > 1)
        assert head_parameters(32, width, 2, 61) == weights
