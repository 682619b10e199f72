"""Medusa heads learn with the common loss, and their tree is fitted to their accuracy."""

from __future__ import annotations

import pytest
import torch
from test_trainer import own_text

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.data.examples import Row
from redrafter.evaluation.acceptance import acceptance
from redrafter.heads.medusa import MedusaHeads, fit_tree
from redrafter.proposers import Proposer, method_of
from redrafter.targets.target import Target
from redrafter.training.estimating import estimate
from redrafter.training.fitting import MAX_TRAINING_ROWS, accuracies, fit
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.trainer import run
from test_medusa_heads import random_heads

MODEL = tiny_model()
TARGET = Target(MODEL)


def proposer_of(heads: MedusaHeads) -> Proposer:
    """Of the heads alone, without lookup."""
    method = method_of(heads)
    return method.proposer(TARGET, method.shape(0).with_lookup(False))


@torch.no_grad()
def test_accuracies_agree_with_a_loop():
    """Also with untrained tokens, rows of different lengths, and continuations."""
    torch.manual_seed(1)
    rows = [Row(torch.randint(3, 61, (size,)).tolist(), (torch.rand(size) < 0.8).tolist()) for size in (2, 9, 30, 17)]
    heads = random_heads(draft_vocabulary=torch.arange(3, 50), ranks=(4, 6, 2))
    names = list(range(3, 50))
    right, seen = torch.zeros(3, 6, dtype=torch.double), torch.zeros(3, 1, dtype=torch.double)
    for row in rows:
        ids = torch.tensor([row.input_ids])
        hidden = TARGET.hidden_states(ids, torch.ones_like(ids))[0]
        for t in range(len(row.input_ids)):
            for head in range(3):
                stretch = row.trained[t + 1 : t + head + 3]
                if len(stretch) < head + 2 or not all(stretch):
                    continue
                scores = heads.logits(hidden[t])[head]
                token = row.input_ids[t + 2 + head]
                seen[head] += 1
                if token in names:
                    rank = int((scores > scores[names.index(token)]).sum())
                    if rank < 6:
                        right[head, rank] += 1
    assert seen.min() > 10
    torch.testing.assert_close(accuracies(heads, TARGET, rows), right / seen)
    continued = Row([5, 6], [True, True], [[7, 8, 9, 10], [-1] * 4])
    hidden = TARGET.hidden_states(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.long))[0, 0]
    best = heads.logits(hidden).topk(6).indices + 3
    expected = (best == torch.tensor([[8], [9], [10]])).double()
    assert accuracies(heads, TARGET, [continued]).equal(expected)


def test_the_tree_is_fitted_to_the_held_out_rows(monkeypatch):
    rows, heads = own_text(12), random_heads(ranks=(5, 3, 2))
    size, seen, table = len(heads.config.tree), [], torch.rand((3, 5), dtype=torch.double)
    monkeypatch.setattr("redrafter.training.fitting.accuracies", lambda _, __, some: seen.append(some) or table)
    fit(heads, TARGET, rows, rows[:7])
    assert heads.config.fitted_on == "7 held-out rows"
    useful = [of_ranks[:most] for of_ranks, most in zip(table.tolist(), (5, 3, 2), strict=True)]
    assert heads.config.tree == fit_tree(useful, size + 1), "no rank beyond the config's"
    assert len(heads.config.tree) == size
    fit(heads, TARGET, rows, [])
    assert heads.config.fitted_on == "12 training rows"
    fit(heads, TARGET, rows * 20, [])
    assert heads.config.fitted_on == f"{MAX_TRAINING_ROWS} training rows"
    assert seen == [rows[:7], rows, (rows * 20)[::3][:MAX_TRAINING_ROWS]]


def test_rows_without_a_window_leave_the_tree_unchanged():
    heads = random_heads()
    before = heads.config
    fit(heads, TARGET, [Row([3, 4], [True, True])], [])
    assert heads.config == before


def test_a_fitted_tree_is_accepted_more_often_than_a_wrong_one():
    heads = random_heads(nodes=8)
    rows = own_text(16)
    measured = torch.zeros(3, 10, dtype=torch.double)
    measured[:, 9] = 0.5
    heads.config = heads.config.model_copy(update={"tree": fit_tree(measured.tolist(), 8)})
    proposers = [proposer_of(heads)]
    fit(heads, TARGET, rows, [])
    proposers.append(proposer_of(heads))
    worse, better = (acceptance(TARGET, proposer, rows) for proposer in proposers)
    assert better.accepted > 1.2 * worse.accepted


def test_heads_learn_and_the_folder_holds_the_result(tmp_path):
    rows = own_text(20)
    heads = MedusaHeads.fresh(MODEL, heads=3, nodes=20)
    before = acceptance(TARGET, proposer_of(heads), rows[:16])
    recipe = Recipe(max_steps=1, batch_size=8, learning_rate=2e-2)
    first = run(MODEL, heads, rows[:16], tmp_path / "a", recipe, resume=False)
    recipe = Recipe(max_steps=40, batch_size=8, learning_rate=2e-2)
    last = run(MODEL, heads, rows[:16], tmp_path / "b", recipe, held_out=rows[16:], resume=False)
    assert last.loss < 0.6 * first.loss
    after = acceptance(TARGET, proposer_of(heads), rows[:16])
    assert after.accepted > 2 * before.accepted
    again = MedusaHeads.from_pretrained(tmp_path / "b", target=MODEL)
    assert again.config == heads.config
    assert again.config.fitted_on == "4 held-out rows"
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    card = (tmp_path / "b" / "README.md").read_text()
    for words in ("# Medusa heads for", "| 3 heads of 1 block, draft all tokens |", "a tree of 20 nodes, 3 deep"):
        assert words in card, words


@pytest.mark.parametrize(
    "objective", [Objective(0.0, kl=1.0), Objective(0.5, total_variation=1.0), Objective(coupled=1.0)]
)
def test_every_objective_trains_them(tmp_path, objective):
    heads = MedusaHeads.fresh(MODEL, heads=2, nodes=8, draft_vocabulary=torch.arange(3, 50))
    before = [parameter.detach().clone() for parameter in heads.parameters()]
    recipe = Recipe(max_steps=2, batch_size=4, objective=objective, precision="bfloat16")
    run(MODEL, heads, own_text(4), tmp_path, recipe, resume=False)
    for one, other in zip(before, heads.parameters(), strict=True):
        assert other.isfinite().all()
        assert not torch.equal(one, other)


def test_an_impossible_shape_is_reported_before_a_step(tmp_path):
    drafter = RecurrentDrafter.for_target(MODEL, beam_width=100)
    rows = own_text(4)
    with pytest.raises(RedrafterError, match="beam_width"):
        run(MODEL, drafter, rows[:3], tmp_path, Recipe(max_steps=1), held_out=rows[3:], resume=False)
    assert not list(tmp_path.iterdir())
    assert estimate(MODEL, drafter, rows, Recipe(max_steps=4)).steps == 4
