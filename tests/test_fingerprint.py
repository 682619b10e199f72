"""A model is recognised by its weights: under any name and in any dtype, and no other model is taken for it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from conftest import tiny_model
from redrafter import EagleHead, MedusaHeads, RecurrentDrafter, RedrafterError, generate
from redrafter.proposers.loading import load_drafter
from redrafter.targets.fingerprint import Fingerprint
from redrafter.targets.target import Target

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def of(model) -> Fingerprint:
    return Target(model).fingerprint()


@pytest.mark.parametrize("kept_in", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_one_model_in_any_two_dtypes(kept_in, first, second):
    model = tiny_model(spread=0.02).to(kept_in)
    one, other = (of(copy.deepcopy(model).to(kind)) for kind in (first, second))
    proved = kept_in != torch.float32 or {first, second} != {torch.float16, torch.bfloat16}
    assert one.matches(other) is (True if proved else None)


def changed_embedding(model):
    model.get_input_embeddings().weight.data *= 1.02


def changed_layer(model):
    model.model.layers[0].self_attn.q_proj.weight.data *= 1.02


def changed_head(model):
    model.lm_head.weight.data *= 1.02


@pytest.mark.parametrize("change", [changed_embedding, changed_layer, changed_head])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fine_tuned_variant_is_another_model(change, dtype):
    model = tiny_model()
    other = copy.deepcopy(model)
    change(other)
    assert of(model).matches(of(other.to(dtype))) is False


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_copy_is_the_same_model_and_another_seed_is_not(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert of(model).matches(of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))) is True
    assert of(model).matches(of(tiny_model(family, seed=1))) is False


def test_tied_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    assert of(model).matches(of(copy.deepcopy(model))) is True


def test_a_table_that_is_padded():
    model = tiny_model()
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(80)
    padded.config.vocab_size = 61
    assert of(model).embedding == of(padded).embedding


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_a_quantised_copy(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    tiny_model().save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    assert of(tiny_model()).matches(of(model)) is True
    assert of(tiny_model(seed=1)).matches(of(model)) is False
    by_hand = tiny_model()
    quantization.quantize_(by_hand, quantization.Int8WeightOnlyConfig())
    assert of(tiny_model()).matches(of(by_hand)) is True


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_around_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config)
    assert of(model).matches(of(tiny_model())) is True
    assert of(model.merge_and_unload()).matches(of(tiny_model())) is False


def test_weights_that_cannot_be_read_prove_nothing():
    model = tiny_model()
    target = Target(model)
    known = target.fingerprint()
    model.to("meta")
    assert not target.fingerprint()
    assert known.matches(target.fingerprint()) is None


@pytest.mark.parametrize("head", [RecurrentDrafter.for_target, MedusaHeads.fresh, EagleHead.fresh])
def test_a_drafter_loads_for_a_copy_of_another_name_and_not_for_another_model(head, tmp_path):
    model = tiny_model()
    model.config._name_or_path = "someone/this"
    head(model).save_pretrained(tmp_path)
    same, other = tiny_model(), tiny_model(seed=1)
    for one in (same, other):
        one.config._name_or_path = "someone/other"
    drafter = load_drafter(tmp_path, same)
    told = {"max_new_tokens": 6}
    assert generate(same, drafter, [[5, 6]], **told).new_tokens == generate(same, None, [[5, 6]], **told).new_tokens
    loose = type(drafter).from_pretrained(tmp_path)
    for call in (
        lambda: load_drafter(tmp_path, other),
        lambda: generate(other, drafter, [[5, 6]], **told),
        lambda: generate(other, loose, [[5, 6]], **told),
    ):
        with pytest.raises(RedrafterError, match="any_target=True"):
            call()
    forced = load_drafter(tmp_path, other, any_target=True)
    assert generate(other, forced, [[5, 6]], **told).new_tokens == generate(other, None, [[5, 6]], **told).new_tokens


def test_names_decide_for_a_drafter_without_a_fingerprint(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "someone/this"
    RecurrentDrafter.for_target(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["target_fingerprint"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = tiny_model(seed=1)
    other.config._name_or_path = "copied-by/this"
    RecurrentDrafter.from_pretrained(tmp_path, target=other)
    other.config._name_or_path = "someone/other"
    with pytest.raises(RedrafterError, match="made for someone/this, not for someone/other"):
        RecurrentDrafter.from_pretrained(tmp_path, target=other)
    RecurrentDrafter.from_pretrained(tmp_path, target=other, any_target=True)


def test_a_model_that_is_trained_on_keeps_its_drafter(tmp_path):
    model = tiny_model()
    RecurrentDrafter.for_target(model).save_pretrained(tmp_path)
    drafters = RecurrentDrafter.for_target(model), RecurrentDrafter.from_pretrained(tmp_path, target=model)
    changed_layer(model)
    for drafter in drafters:
        assert generate(model, drafter, [[5, 6]], max_new_tokens=3).new_tokens


def test_a_drafter_that_is_not_finite_in_the_targets_dtype_is_refused(tmp_path):
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model)
    drafter.lm_head[-1].weight.data[3, 4] = 1e5
    drafter.save_pretrained(tmp_path)
    RecurrentDrafter.from_pretrained(tmp_path, target=model)
    with pytest.raises(RedrafterError, match=r"Tensor lm_head\.2\.weight of .* holds NaN or infinity in float16"):
        RecurrentDrafter.from_pretrained(tmp_path, target=model.half())
