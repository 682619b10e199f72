"""Medusa heads: their formula, their trees, their folder."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from redrafter import RedrafterError
from redrafter.heads.medusa import MedusaConfig, MedusaHeads, fit_tree
from redrafter.targets.target import Target

MODEL = tiny_model()


def random_heads(**form) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads.fresh(MODEL, **({"heads": 3} | form))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_formula_as_published(blocks):
    heads = random_heads(blocks=blocks)
    weights, hidden = heads.state_dict(), torch.randn(5, 32)
    logits = heads.logits(hidden)
    assert logits.shape == (5, 3, 61)
    assert torch.equal(heads.logits(hidden, 2), logits[:, :2])
    for head in range(3):
        x = hidden
        for block in range(blocks):
            y = x @ weights[f"heads.{head}.{block}.linear.weight"].T + weights[f"heads.{head}.{block}.linear.bias"]
            x = x + y / (1 + torch.exp(-y))
        torch.testing.assert_close(logits[:, head], x @ weights[f"heads.{head}.{blocks}.weight"].T)


def test_teacher_forced_a_head_hears_nothing_of_the_tokens():
    heads = random_heads()
    features = torch.randn(4, 32)
    one, other = (heads.unrolled(features, torch.randn(4, 2, 32)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one, heads.logits(features)[:, :2])


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "phi"])
@torch.no_grad()
def test_fresh_heads_score_as_the_target_does(family):
    """Scaled as it scales, without its head's bias."""
    model = tiny_model(family)
    bias = getattr(model.lm_head, "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    vocabulary = torch.tensor([9, 3, 40, 17])
    target, hidden = Target(model), torch.randn(5, 32)
    expected = target.logits(hidden) - (0 if bias is None else bias)
    for logits in MedusaHeads.fresh(model, heads=2).logits(hidden).unbind(1):
        torch.testing.assert_close(logits, expected)
    heads = MedusaHeads.fresh(model, heads=2, draft_vocabulary=vocabulary)
    assert heads.draft_vocabulary.tolist() == [3, 9, 17, 40]
    torch.testing.assert_close(heads.logits(hidden)[:, 1], expected[:, [3, 9, 17, 40]])


def expected_tokens(paths, accuracies) -> float:
    return sum(math.prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in paths)


def closed(paths) -> bool:
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


accuracies_strategy = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=2), min_size=heads, max_size=heads)
)


@settings(max_examples=60)
@given(accuracies_strategy, st.integers(2, 9))
def test_no_tree_of_its_size_expects_more(accuracies, nodes):
    """Against all trees, and every prefix of what was fitted is the best tree of its own size."""
    every = [
        path
        for depth in range(1, len(accuracies) + 1)
        for path in itertools.product(*(range(len(of_ranks)) for of_ranks in accuracies[:depth]))
    ]
    tree = fit_tree(accuracies, nodes)
    assert len(tree) == min(nodes - 1, len(every))
    for size in {1, len(tree) // 2, len(tree)} - {0}:
        assert len(set(tree[:size])) == size
        assert closed(tree[:size])
        best = max(expected_tokens(some, accuracies) for some in itertools.combinations(every, size) if closed(some))
        assert expected_tokens(tree[:size], accuracies) == pytest.approx(best, abs=1e-12)


def test_a_tree_by_hand():
    accuracies = [[0.6, 0.3], [0.4, 0.35]]
    assert fit_tree(accuracies, 6) == ((0,), (1,), (0, 0), (0, 1), (1, 0))  # 0.6, 0.3, 0.24, 0.21, 0.12


def test_a_cartesian_tree_holds_all_paths():
    tree = MedusaHeads.fresh(MODEL, heads=3, ranks=[3, 2, 2]).config.tree
    assert set(tree) == {p for d in (1, 2, 3) for p in itertools.product(*(range(r) for r in (3, 2, 2)[:d]))}
    assert len(tree) == 3 + 6 + 12


@pytest.mark.parametrize("form", [{}, {"blocks": 2, "draft_vocabulary": torch.arange(4, 30)}, {"ranks": (2, 1, 3)}])
def test_a_folder_gives_back_what_was_saved(tmp_path, form):
    heads = random_heads(**form, node_budget=9)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, target=MODEL)
    assert again.config == heads.config
    assert heads.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in heads.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["tree"] == [list(path) for path in heads.config.tree]
    assert "\n    [0, 0]" in (tmp_path / "config.json").read_text(), "a path is a line"


GOOD = {"vocab_size": 61, "hidden_size": 32, "heads": 2, "beam_length": 2, "ranks": [3, 2], "tree": [[0], [2], [0, 1]]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tree": []}, "from 2 to 1,024 nodes"),
        ({"tree": [[0], [1, 0]]}, r"path \[1, 0\] must be listed once, after the path that it continues"),
        ({"tree": [[0, 1], [0]]}, r"path \[0, 1\] must be listed once, after"),
        ({"tree": [[0], [0]]}, r"path \[0\] must be listed once"),
        ({"tree": [[0], []]}, r"path \[\] must be listed once"),
        ({"tree": [[3]]}, r"path \[3\] has a rank that its head does not draft"),
        ({"tree": [[0], [0, 0], [0, 0, 0]]}, "has a rank that its head does not draft"),
        ({"ranks": [3]}, "of each of 2 heads"),
        ({"ranks": [62, 2]}, "of each of 2 heads"),
        ({"beam_length": 3}, "2 heads cannot draft more tokens than there are heads"),
        ({"heads": 0}, "heads"),
        ({"model_type": "recurrent_drafting_drafter"}, "model_type"),
    ],
)
def test_a_config_that_is_no_tree_of_heads_is_refused(tmp_path, change, named):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD))
    assert len(MedusaConfig.from_file(path).tree) == 3
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(RedrafterError, match=f"does not describe Medusa heads: .*{named}"):
        MedusaConfig.from_file(path)


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({"nodes": 1}, "A tree may have from 2 to 1,024 nodes, not 1"),
        ({"nodes": 2000}, "A tree may have from 2 to 1,024 nodes, not 2,000"),
        ({"ranks": (10, 10, 10)}, "A tree may have from 2 to 1,024 nodes, not 1,111"),
        ({"ranks": (2, 2)}, "positive number of tokens for each of 3 heads"),
        ({"ranks": (2, 0, 2)}, "positive number of tokens for each of 3 heads"),
        ({"draft_vocabulary": torch.tensor([3, 3])}, "distinct ids"),
    ],
)
def test_heads_that_cannot_be_made(form, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        MedusaHeads.fresh(MODEL, heads=3, **form)
