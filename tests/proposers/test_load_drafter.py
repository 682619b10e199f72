"""What a path stands for is told by the config that lies there."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from conftest import refusal, tiny_model
from redrafter import (
    PromptLookup,
    RecurrentDrafter,
    RedrafterError,
    TwoModel,
    custom_generate,
    generate,
)
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import loading
from redrafter.proposers.loading import load_drafter


@pytest.fixture(scope="module")
def model(model_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def draft_folder(model, tmp_path_factory):
    """A smaller model of the same vocabulary, in another dtype."""
    folder = tmp_path_factory.mktemp("draft")
    tiny_model("gpt2", vocab_size=model.config.vocab_size, seed=4).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_path_is_a_drafter_a_draft_model_or_a_name(model, drafter_folder, draft_folder):
    assert isinstance(load_drafter(drafter_folder, model), RecurrentDrafter)
    assert isinstance(load_drafter("prompt-lookup", model), PromptLookup)
    method = load_drafter(draft_folder, model)
    assert isinstance(method, TwoModel)
    assert type(method.model).__name__ == "GPT2LMHeadModel"
    assert method.model.dtype == model.dtype
    assert not method.model.training


def test_medusa_heads_are_told_by_their_folder(model, tmp_path):
    MedusaHeads.fresh(model, heads=2).save_pretrained(tmp_path)
    heads = load_drafter(tmp_path, model)
    assert isinstance(heads, MedusaHeads)
    ids = torch.tensor([[5, 6, 7]])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    drafted = model.generate(ids, custom_generate=custom_generate, drafter=tmp_path, **told)
    assert drafted.equal(model.generate(ids, **told))


def test_a_drafter_that_says_what_class_it_is_remains_a_drafter(model, drafter_folder, tmp_path):
    """As transformers writes it, for Apple's drafters too."""
    for file in drafter_folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    told = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Drafter"]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert isinstance(load_drafter(tmp_path, model), RecurrentDrafter)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "is not a drafter folder: config.json is missing"),
        ("[]", "does not describe a recurrent drafter"),
        ("{", "does not describe a recurrent drafter"),
        ('{"architectures": ["NoSuchModel"], "model_type": "nothing"}', "The draft model .* cannot be loaded"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "The draft model .* cannot be loaded"),
    ],
)
def test_what_is_neither_is_told_in_a_sentence(model, tmp_path, config, sentence):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RedrafterError, match=sentence) as told:
        load_drafter(tmp_path, model)
    assert str(told.value).count("\n") == 0


def test_the_hub_is_asked_for_the_config_first(model, drafter_folder, monkeypatch):
    asked = []

    def snapshot_download(path, *, revision, allow_patterns):
        asked.append((path, allow_patterns))
        return str(drafter_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert isinstance(load_drafter("somebody/drafter", model), RecurrentDrafter)
    assert asked[0] == ("somebody/drafter", ["config.json"])
    with pytest.raises(RedrafterError, match="There is no drafter folder at a/b/c"):
        load_drafter("a/b/c", model)


@pytest.mark.parametrize("way", ["recurrent", "two-model", "prompt-lookup"])
def test_generate_and_check_draft_by_each(say, model_folder, drafter_folder, draft_folder, tmp_path, way):
    path = {"recurrent": drafter_folder, "two-model": draft_folder, "prompt-lookup": "prompt-lookup"}[way]
    given = ["--model", model_folder, "--max-new-tokens", 20]
    plain = say("generate", *given, "--prompt", "abcabcab", "--no-drafter", "--json")
    drafted = say("generate", *given, "--prompt", "abcabcab", "--drafter", path, "--json")
    assert (plain[0], drafted[0]) == (0, 0)
    plain, drafted = json.loads(plain[1]), json.loads(drafted[1])
    assert drafted["text"] == plain["text"]
    assert (plain["drafted"], len(drafted["accepted_by_position"])) == (0, 10)
    alone = say("generate", *given, "--prompt", "abcabcab", "--drafter", path, "--no-lookup", "--json")
    positions = json.loads(alone[1])["accepted_by_position"]
    assert len(positions) == {"recurrent": 3, "two-model": 5}.get(way, 10)
    assert drafted["drafted"] > 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abcabcab"}\n{"prompt": "xyz"}\n')
    status, out, _ = say("check", *given, "--drafter", path, "--prompts", tmp_path / "prompts.jsonl")
    assert (status, out.split(" texts")[0]) == (0, "2 of 2")


def test_what_a_method_cannot_do_is_refused_on_the_command_line(say, model_folder, draft_folder, tmp_path):
    given = ["generate", "--model", model_folder, "--prompt", "abc", "--drafter"]
    tiny_model(vocab_size=100).save_pretrained(tmp_path)
    assert "a vocabulary of 100 tokens, the model one of 259" in refusal(say(*given, tmp_path))
    assert "There is no drafter folder at /none" in refusal(say(*given, "/none"))


def test_transformers_own_generate_takes_each(model, draft_folder, monkeypatch):
    ids = torch.tensor([[5, 9, 12, 5, 9]])
    told = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, **told)
    loaded = []
    monkeypatch.setattr(
        loading, "_draft_model", lambda path, target: loaded.append(path) or tiny_model(vocab_size=target.vocab_size)
    )
    for drafter in (TwoModel(model), PromptLookup(), "prompt-lookup", draft_folder, draft_folder):
        assert model.generate(ids, custom_generate=custom_generate, drafter=drafter, **told).equal(expected)
    assert loaded == [draft_folder], "read once for a model"
    assert generate(model, TwoModel(model), ids, max_new_tokens=12).stats.steps == 2
