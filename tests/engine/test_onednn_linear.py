"""Packed weights give the text of plain ones, follow every change of theirs, and leave the caller's model untouched."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, generate
from redrafter.engine import onednn_linear as module
from redrafter.engine.onednn_linear import pack_linears, why_not_packed
from redrafter.targets.isolation import isolated

PROMPT = [5, 9, 12, 3]
pytestmark = pytest.mark.skipif(why_not_packed(nn.Linear(2, 2)) is not None, reason="needs an x86 CPU and oneDNN")


def logits(model, tokens=PROMPT):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits


def packed(model):
    """A copy whose products are packed, and their number."""
    own = isolated(model)
    return own, pack_linears(own)


@pytest.fixture
def packings(monkeypatch):
    """The weights that are packed, in order."""
    reorder, found = torch.ops.mkldnn._reorder_linear_weight, []
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda x: found.append(x) or reorder(x))
    return found


@pytest.mark.parametrize(("family", "products"), [("llama", 9), ("qwen2", 9), ("gemma2", 9), ("phi3", 9), ("gpt2", 1)])
def test_the_text_is_the_same(family, products):
    model = tiny_model(family)
    expected, before = greedy(model, PROMPT, 12), logits(model)
    own, found = packed(model)
    assert found == products  # q, k and v; output; gate and up; down; in two layers, and the head
    torch.testing.assert_close(logits(own), before)
    assert greedy(own, PROMPT, 12) == expected


def test_decoding_multiplies_packed_weights_unless_told_not_to(packings):
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model, beam_width=3, beam_length=3)
    plain = generate(model, drafter, [PROMPT], max_new_tokens=12, fast=False).new_tokens
    assert not packings
    assert generate(model, drafter, [PROMPT], max_new_tokens=12).new_tokens == plain
    shapes = [tuple(one.shape) for one in packings]
    assert tuple(model.lm_head.weight.shape) in shapes
    assert tuple(drafter.lm_head[-1].weight.shape) in shapes


def test_a_lone_row_is_the_models_own_product():
    model = tiny_model()
    assert torch.equal(logits(packed(model)[0], [7]), logits(model, [7]))


def _permute_rows(attention) -> None:
    attention.o_proj.weight.data[:] = attention.o_proj.weight.data.flip(0).clone()


def _permute_columns(attention) -> None:
    attention.o_proj.weight.data[:] = attention.o_proj.weight.data.flip(1).clone()


def _swap(attention) -> None:
    weight = attention.o_proj.weight.data
    weight[0, 0], weight[3, 5] = weight[3, 5].item(), weight[0, 0].item()


CHANGES = {
    "in place": lambda attention: attention.o_proj.weight.mul_(3),
    "past the count": lambda attention: attention.k_proj.weight.data.add_(0.5),
    "replaced": lambda attention: setattr(attention.o_proj.weight, "data", torch.randn(32, 32)),
    "bias": lambda attention: attention.v_proj.bias.data.add_(0.5),
    "by numpy": lambda attention: attention.q_proj.weight.detach().numpy().__imul__(2),
    "rows permuted": _permute_rows,
    "columns permuted": _permute_columns,
    "two elements swapped": _swap,
    "another parameter": lambda attention: setattr(attention.o_proj, "weight", nn.Parameter(torch.randn(32, 32))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change):
    model = tiny_model("qwen2")
    logits(packed(model)[0])
    with torch.no_grad():
        CHANGES[change](model.model.layers[0].self_attn)
    torch.testing.assert_close(logits(packed(model)[0]), logits(model), rtol=1e-5, atol=1e-5)


def test_unchanged_weights_are_packed_once_and_freed_with_the_model(packings):
    model = tiny_model()
    packed(model)
    count = len(packings)
    assert count == packed(model)[1]
    assert len(packings) == count
    gc.collect()  # what other tests left
    before = len(module._packed)
    del model
    gc.collect()
    assert len(module._packed) == before - count


def test_the_model_is_as_before():
    model = tiny_model("qwen2")
    before, places = copy.deepcopy(model.state_dict()), [one.data_ptr() for one in model.parameters()]
    logits(packed(model)[0])
    assert [one.data_ptr() for one in model.parameters()] == places
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_packed_is_left_alone(monkeypatch):
    class Adapted(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[0].self_attn.k_proj = Adapted(32, 16, bias=False)
    assert packed(model)[1] == 10  # q and v of that layer each by itself
    assert packed(tiny_model().bfloat16())[1] == 0
    assert "float32" in why_not_packed(tiny_model().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(model)[1] == 0
        assert "autocast" in why_not_packed(model)
    assert why_not_packed(model) is None
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert packed(model)[1] == 0
    assert "GiB" in why_not_packed(model)
