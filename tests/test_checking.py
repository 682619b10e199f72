"""`check` compares texts and explains differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter
from redrafter.evaluation import checking
from redrafter.evaluation.checking import Divergence, compare

MODEL = tiny_model()
PROMPTS = [[5, 9, 12], [7], [30, 31, 32, 33]]


def test_drafted_text_is_equal_and_counted():
    torch.manual_seed(0)
    report = compare(MODEL, RecurrentDrafter.for_target(MODEL), PROMPTS, batch_size=2, max_new_tokens=9)
    assert report.divergences == []
    assert report.tokens == 27
    assert report.tokens_per_step >= 1


@pytest.mark.parametrize("row", [0, 2])
def test_a_wrong_token_is_reported_with_its_margin(monkeypatch, row):
    generate = checking.generate

    def changed(model, drafter, prompts, **settings):
        out = generate(model, drafter, prompts, **settings)
        if drafter is not None:
            for prompt, new in zip(prompts, out.new_tokens, strict=True):
                if prompt == PROMPTS[row]:
                    new[4] = (new[4] + 1) % 61
        return out

    monkeypatch.setattr(checking, "generate", changed)
    report = compare(MODEL, RecurrentDrafter.for_target(MODEL), PROMPTS, batch_size=2, max_new_tokens=9)
    (divergence,) = report.divergences
    assert (divergence.row, divergence.position) == (row, 4)
    text = PROMPTS[row] + generate(MODEL, None, [PROMPTS[row]], max_new_tokens=4).new_tokens[0]
    best = MODEL(input_ids=torch.tensor([text])).logits[0, -1].detach().topk(2).values
    assert divergence.margin == pytest.approx(float(best[0] - best[1]), rel=1e-3)
    assert not divergence.explained


def test_sampled_text_is_compared_under_the_same_seeds(monkeypatch):
    sampling = {"do_sample": True, "temperature": 0.7, "seed": 5}
    drafter = RecurrentDrafter.for_target(MODEL)
    assert compare(MODEL, drafter, PROMPTS, batch_size=2, max_new_tokens=9, **sampling).divergences == []
    generate = checking.generate

    def other_seed(model, drafter, prompts, **settings):
        settings["seed"] = [seed + bool(drafter) for seed in settings["seed"]]
        return generate(model, drafter, prompts, **settings)

    monkeypatch.setattr(checking, "generate", other_seed)
    assert compare(MODEL, drafter, PROMPTS, batch_size=2, max_new_tokens=9, **sampling).divergences


def test_a_shorter_text_differs_at_its_end(monkeypatch):
    generate = checking.generate

    def cut(model, drafter, prompts, **settings):
        return generate(model, drafter, prompts, **settings | ({"max_new_tokens": 3} if drafter else {}))

    monkeypatch.setattr(checking, "generate", cut)
    divergences = compare(MODEL, RecurrentDrafter.for_target(MODEL), PROMPTS, max_new_tokens=9).divergences
    assert [one.position for one in divergences] == [3, 3, 3]


def test_only_a_margin_within_rounding_is_explained():
    tie = Divergence(row=0, position=3, margin=0.01, rounding=0.02)
    assert tie.explained
    assert not replace(tie, margin=0.03).explained


def test_margins_are_computed_in_eval_mode():
    """Also if the caller's model is in training mode, in which dropout would change them."""
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    text = checking.generate(model, None, [[5, 9]], max_new_tokens=4).new_tokens[0]
    other = [*text[:2], (text[2] + 1) % 61, text[3]]
    expected = checking.find_divergence(model, [[5, 9]], 0, text, other, {"max_new_tokens": 4})
    model.train()
    for _ in range(3):
        assert checking.find_divergence(model, [[5, 9]], 0, text, other, {"max_new_tokens": 4}) == expected
    assert model.training
