"""Targets however they were loaded: low precision, spread, quantised, adapted."""

from __future__ import annotations

import pytest
import torch
import transformers

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.engine.generate import describe_backend
from redrafter.evaluation.checking import compare

PROMPTS = [[5, 9, 12], [7], [30, 31, 32, 33, 34, 35]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "model"
    tiny_model().save_pretrained(path)
    return path


def drafter(model) -> RecurrentDrafter:
    torch.manual_seed(0)
    head = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)
    return head.to(getattr(model, "dtype", torch.float32))


def assert_exact(model) -> None:
    """Greedy text is that of transformers, sampled text that of no drafter."""
    expected = [greedy(model, prompt, 14) for prompt in PROMPTS]
    head = drafter(model)
    assert generate(model, None, PROMPTS, max_new_tokens=14).new_tokens == expected
    assert generate(model, head, PROMPTS, max_new_tokens=14).new_tokens == expected
    law = {"do_sample": True, "seed": 2, "max_new_tokens": 14}
    assert generate(model, head, PROMPTS, **law).new_tokens == generate(model, None, PROMPTS, **law).new_tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 2}])
def test_low_precision_parts_only_within_rounding(family, dtype, law):
    model = tiny_model(family).to(dtype)
    report = compare(model, drafter(model), PROMPTS * 2, max_new_tokens=14, **law)
    assert all(parting.explained for parting in report.divergences)
    assert len(report.divergences) <= 3, "and that is rare"
    assert report.tokens == 14 * 6


def test_double_precision_is_exact():
    assert_exact(tiny_model().double())


def test_a_model_that_accelerate_placed(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    model.generation_config.eos_token_id = None
    assert_exact(model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_two_gpus(folder):
    layers = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    places = layers | {"model.rotary_emb": 0, "lm_head": 1}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=places)
    assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder)
    head = drafter(model)
    for law in ({}, {"do_sample": True, "seed": 2}):
        told = {"max_new_tokens": 14, "eos_token_id": (), **law}
        expected = generate(alone, None, PROMPTS, **told).new_tokens
        for one in (None, head):
            assert generate(model, one, PROMPTS, **told).new_tokens == expected
    assert "several devices" in describe_backend(model)["a step"]


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_weights_quantised_to_eight_bits(folder):
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    model.generation_config.eos_token_id = None
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert_exact(model)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_a_lora_adapter_is_in_effect():
    peft = pytest.importorskip("peft")
    plain = [greedy(tiny_model(), prompt, 14) for prompt in PROMPTS]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model(), config).eval()
    assert [greedy(model, prompt, 14) for prompt in PROMPTS] != plain
    assert_exact(model)
    with model.disable_adapter():
        assert generate(model, drafter(model), PROMPTS, max_new_tokens=14).new_tokens == plain


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_change_the_prompt_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(RedrafterError, match="put virtual tokens before the prompt"):
        generate(model, None, [[5]])


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(RedrafterError, match="Linear is not a transformers model"):
        generate(torch.nn.Linear(2, 2), None, [[5]])
