"""Models of random weights in well-known shapes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from redrafter import RedrafterError, generate
from redrafter.heads.synthetic import SHAPES, random_drafter, random_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama-7b", 6.738), ("llama-8b", 8.030), ("llama-1b", 1.236)]
)  # what their publishers count
def test_a_shape_has_its_models_weights(shape, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    assert sum(one.numel() for one in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_weights_that_do_not_fit_are_refused_before_any_is_drawn(monkeypatch):
    monkeypatch.setattr("redrafter.utils.memory.memory_left", lambda device: 2**34)
    with pytest.raises(RedrafterError, match=r"llama-7b in float32 take 25.10 GiB, and 16.00 GiB are left on cpu"):
        random_model("llama-7b", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_is_a_sound_one_and_no_weight_is_left_as_it_was(dtype):
    model = random_model("tiny", dtype=dtype, device=CPU)
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        assert weight.isfinite().all(), name
        assert weight.ndim == 1 or weight.count_nonzero() > 0.9 * weight.numel(), name
    usual = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    usual.load_state_dict(model.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, usual(ids).logits)


def test_weights_that_are_one_stay_one(monkeypatch):
    monkeypatch.setitem(SHAPES, "tied", SHAPES["tiny"] | {"tie_word_embeddings": True})
    model = random_model("tied", dtype=torch.float32, device=CPU)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_random_drafter_has_the_released_form_unless_told():
    model = random_model("tiny", dtype=torch.bfloat16, device=CPU)
    drafter = random_drafter(model)
    assert (drafter.config.exit_dim, drafter.config.num_draft_layers, drafter.config.head_size) == (128, 2, 256)
    assert drafter.dtype == torch.bfloat16
    assert generate(model, drafter, [[5, 6]], max_new_tokens=5).stats.drafted > 0
    narrow = random_drafter(model, 40, 100)
    assert (narrow.config.exit_dim, narrow.config.head_size) == (40, 100)


def test_bad_shapes_are_refused():
    with pytest.raises(RedrafterError, match="llama-9b is not one of the shapes llama-7b, llama-8b, llama-1b, tiny"):
        random_model("llama-9b", dtype=torch.float32, device=CPU)
    with pytest.raises(RedrafterError, match="draft vocabulary of 257 exceeds"):
        random_drafter(random_model("tiny", dtype=torch.float32, device=CPU), draft_vocabulary=257)
