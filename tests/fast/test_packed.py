"""Packed weights give the text of plain ones, follow every change of theirs, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, generate
from redrafter.fast import packed as module
from redrafter.fast.packed import packed

PROMPT = [5, 9, 12, 3]
pytestmark = pytest.mark.skipif(not module._works(), reason="packs on x86 CPUs with oneDNN alone")


def logits(model, tokens=PROMPT):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits


@pytest.mark.parametrize(("family", "products"), [("llama", 9), ("qwen2", 9), ("gemma2", 9), ("phi3", 9), ("gpt2", 1)])
def test_the_text_is_the_same(family, products):
    model = tiny_model(family)
    expected, before = greedy(model, PROMPT, 12), logits(model)
    with torch.no_grad(), packed(model) as found:
        assert found == products  # q, k and v; output; gate and up; down; in two layers, and the head
        torch.testing.assert_close(logits(model), before)
        assert greedy(model, PROMPT, 12) == expected


def test_decoding_multiplies_packed_weights_unless_told_not_to(monkeypatch):
    model = tiny_model()
    drafter, products = RecurrentDrafter.for_target(model, beam_width=3, beam_length=3), []
    product = module._Packed.product
    monkeypatch.setattr(module._Packed, "product", lambda self, x: products.append(self) or product(self, x))
    packed_text = generate(model, drafter, [PROMPT], max_new_tokens=12).new_tokens
    modules = {one() for group in products for one in group.parts}
    assert model.lm_head in modules
    assert drafter.lm_head[-1] in modules
    products.clear()
    assert generate(model, drafter, [PROMPT], max_new_tokens=12, fast=False).new_tokens == packed_text
    assert not products


def test_a_lone_row_is_the_models_own_product():
    model = tiny_model()
    expected = logits(model, [7])
    with packed(model):
        assert torch.equal(logits(model, [7]), expected)


@pytest.mark.parametrize("change", ["in place", "past the count", "replaced", "bias"])
def test_changed_weights_are_packed_again(change):
    model = tiny_model("qwen2")
    with packed(model):
        logits(model)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        if change == "in place":
            attention.o_proj.weight.mul_(3)
        elif change == "past the count":
            attention.k_proj.weight.data += 0.5
        elif change == "replaced":
            attention.o_proj.weight.data = torch.randn_like(attention.o_proj.weight)
        else:
            attention.v_proj.bias.data += 0.5
    expected = logits(model)
    with packed(model):
        torch.testing.assert_close(logits(model), expected)


def test_unchanged_weights_are_packed_once(monkeypatch):
    model = tiny_model()
    with packed(model):
        pass
    monkeypatch.setattr(torch, "cat", None)  # of weights, where they are packed
    with packed(model):
        pass


def test_the_model_is_as_before():
    model = tiny_model("qwen2")
    before, places = copy.deepcopy(model.state_dict()), [one.data_ptr() for one in model.parameters()]
    with packed(model):
        logits(model)
    assert [one.data_ptr() for one in model.parameters()] == places
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_packed_is_left_alone(monkeypatch):
    class Adapted(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[0].self_attn.k_proj = Adapted(32, 16, bias=False)
    with packed(model) as found:
        assert found == 10  # q and v of that layer each by itself
    with packed(tiny_model().bfloat16()) as found:
        assert found == 0
    with torch.autocast("cpu", torch.bfloat16), packed(model) as found:
        assert found == 0
    monkeypatch.setattr(module, "LARGEST", 1000)
    with packed(model) as found:
        assert found == 0
