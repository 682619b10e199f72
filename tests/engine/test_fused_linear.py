"""Products computed as one give the text of products computed apart, and the caller's model keeps its modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import greedy, tiny_model
from redrafter.engine.fused_linear import fuse_linears
from redrafter.targets.isolation import isolated

PROMPT = [5, 9, 12, 3]


def fused(model):
    """A copy with fused layers, and their number."""
    own = isolated(model)
    return own, fuse_linears(own)


@pytest.mark.parametrize(
    ("family", "groups"), [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("gemma2", 4), ("phi3", 0), ("gpt2", 0)]
)
def test_the_text_is_the_same(family, groups):
    model = tiny_model(family)
    expected = greedy(model, PROMPT, 12)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits
        own, found = fused(model)
        assert found == groups
        torch.testing.assert_close(own(torch.tensor([PROMPT])).logits, logits)
        assert greedy(own, PROMPT, 12) == expected


def test_one_product_is_made_of_three(monkeypatch):
    model = tiny_model()
    linear, rows = nn.functional.linear, []

    def counted(x, weight, bias=None):
        rows.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    own, _ = fused(model)
    with torch.no_grad():
        own(torch.tensor([PROMPT]))
    width, inner = model.config.hidden_size, model.config.intermediate_size
    layer = [2 * width, width, 2 * inner, width]  # q, k, v with half as many heads of keys; output; gate, up; down
    assert rows == layer * 2 + [model.config.vocab_size]


def test_the_model_is_as_before():
    model = tiny_model("qwen2")
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    kinds = [(type(module), set(vars(module))) for module in model.modules()]
    fused(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == kinds
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fusing_again_takes_no_more_memory():
    model = tiny_model()
    projection = model.model.layers[0].self_attn.q_proj
    fused(model)
    place = projection.weight.data_ptr()
    fused(model)
    assert projection.weight.data_ptr() == place
    model.double()  # moves every weight to a place of its own
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits
        torch.testing.assert_close(fused(model)[0](torch.tensor([PROMPT])).logits, expected)


def test_changed_biases_are_used_by_the_next_call():
    model = tiny_model("qwen2")
    fused(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias += 1
        expected = model(torch.tensor([PROMPT])).logits
        torch.testing.assert_close(fused(model)[0](torch.tensor([PROMPT])).logits, expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_fused_model_can_be_trained(inference):
    model = tiny_model()
    with torch.inference_mode(inference):
        fused(model)
    model(torch.tensor([PROMPT])).logits.sum().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_changed_layers_are_left_alone():
    class Adapted(nn.Linear):
        pass

    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj = Adapted(32, 16, bias=False)
    offloaded = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: offloaded(x)  # as accelerate does
    own, found = fused(model)
    assert found == 2
    assert own.model.layers[0].mlp.up_proj.forward is mlp.up_proj.forward


def test_a_saved_model_loads(tmp_path):
    model = tiny_model()
    fused(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
