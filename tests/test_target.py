"""Verification of trees by unmodified models, against one plain forward for every path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_model
from redrafter import generate
from redrafter.core.tree import chain, prefix_tree
from redrafter.errors import RedrafterError
from redrafter.heads.recurrent import DrafterConfig, RecurrentDrafter
from redrafter.targets.structure import base_name, public_name
from redrafter.targets.target import Target
from test_tree import path_to

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2", "gpt_neox", "phi", "olmo2"]


def model_of(family: str, **changes):
    """A tiny model whose window, where it has one, is shorter than the prompts below."""
    if family == "mistral":
        changes |= {"sliding_window": 5}
    if family == "gpt_neox":
        changes |= {"rotary_pct": 0.5}
    return tiny_model(family, **changes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_node_sees_what_plain_text_sees(family, attention):
    model = model_of(family)
    model.set_attn_implementation(attention)
    target = Target(model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 61, (n,), generator=generator) for n in (4, 11)]
    cache = target.new_cache(batch=2, slots=30)
    target.forward(chain(nn.utils.rnn.pad_sequence(prompts, batch_first=True)), torch.zeros(2, dtype=torch.long), cache)
    tree = prefix_tree(torch.tensor([5, 6]), torch.randint(3, 6, (2, 4, 3), generator=generator))
    hidden, logits = target.forward(tree, torch.tensor([4, 11]), cache)
    for row, prompt in enumerate(prompts):
        for node in range(int(tree.valid[row].sum())):
            text = torch.cat((prompt, tree.tokens[row, path_to(tree, row, node)]))
            expected = model(input_ids=text[None]).logits[0, -1]
            torch.testing.assert_close(logits[row, node], expected, atol=2e-5, rtol=2e-5)
            plain = target.hidden_states(text[None], torch.ones(1, len(text), dtype=torch.long))
            torch.testing.assert_close(hidden[row, node], plain[0, -1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_select_computes_logits_of_those_nodes(llama):
    target = Target(llama)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    start = torch.zeros(2, dtype=torch.long)
    all_hidden, all_logits = target.forward(chain(tokens), start, target.new_cache(batch=2, slots=3))
    select = torch.tensor([[2, 1], [0, 1]])
    hidden, logits = target.forward(chain(tokens), start, target.new_cache(batch=2, slots=3), select)
    assert logits.shape == (2, 2, 61)
    torch.testing.assert_close(hidden, all_hidden)
    torch.testing.assert_close(logits, torch.stack([all_logits[row, nodes] for row, nodes in enumerate(select)]))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bloom", "position_ids"), ("mpt", "position_ids"), ("mamba", "recurrent state"), ("t5", "encoder-decoder")],
)
def test_families_that_cannot_verify_are_refused_with_the_reason(family, reason):
    if family == "t5":
        import transformers

        config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = tiny_model(family)
    with pytest.raises(RedrafterError, match=f"{type(model).__name__} cannot verify draft trees: .*{reason}"):
        Target(model)


def test_an_attention_that_ignores_masks_is_found_by_the_probe(monkeypatch):
    model = tiny_model(seed=3)
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": None})
    )
    with pytest.raises(RedrafterError, match="states at the nodes of a tree differ"):
        Target(model)


def test_a_model_without_head_is_refused():
    with pytest.raises(RedrafterError, match="no language-model head"):
        Target(tiny_model().model)


def test_an_attention_implementation_without_masks_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RedrafterError, match="attn_implementation='sdpa'"):
        Target(model)


def test_a_model_that_was_converted_is_probed_anew():
    model = tiny_model()
    generate(model, None, [[1, 2, 3]], max_new_tokens=3)
    model.double()
    out = generate(model, None, [[1, 2, 3]], max_new_tokens=8)
    expected = model.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert out.new_tokens == [expected[0, 3:].tolist()]
    assert Target(model).new_cache(batch=1, slots=4).layers[0].keys.dtype == torch.float64


@torch.no_grad()
def config_for(target: Target, /, **changes) -> DrafterConfig:
    sizes = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    return DrafterConfig(**(sizes | changes))


def test_a_drafter_for_another_target_is_refused_by_both_names():
    model = tiny_model()
    model.config._name_or_path = "someone/mine-7b"
    target = Target(model)
    RecurrentDrafter(config_for(target)).check_target(target)
    RecurrentDrafter(config_for(target, target="copied-by/mine-7b")).check_target(target)
    with pytest.raises(RedrafterError, match=r"made for someone/other-7b, not for someone/mine-7b"):
        RecurrentDrafter(config_for(target, target="someone/other-7b")).check_target(target)
    with pytest.raises(RedrafterError, match=r"someone/other-7b \(vocabulary 62.*someone/mine-7b \(vocabulary 61"):
        RecurrentDrafter(config_for(target, vocab_size=62, target="someone/other-7b")).check_target(target)


def test_names_that_leave_the_machine_hold_no_path(tmp_path):
    (tmp_path / "tiny").mkdir()
    assert public_name(str(tmp_path / "tiny")) == "tiny"
    assert public_name("/no/such/place/tiny") == "tiny"
    assert public_name("someone/tiny") == "someone/tiny"
    assert public_name("") is None
    assert base_name("/cache/models--someone--tiny/snapshots/0123") == "tiny"


@pytest.mark.parametrize("ending", ["", ".Q4_1", "-Q4_K_M", "-IQ3_XS", ".f16", "-BF16"])
def test_a_gguf_file_has_the_name_of_its_model(ending):
    assert base_name(f"models/Tiny-7B-Q8-Instruct{ending}.gguf") == "Tiny-7B-Q8-Instruct"


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2", "granite"])
@torch.no_grad()
def test_logits_from_states_are_the_models_own(family):
    """Scaled or capped after the head as the family does."""
    changes = {
        "cohere": {"logit_scale": 0.5},
        "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
        "granite": {"logits_scaling": 3.0},
    }
    model = tiny_model(family, **changes.get(family, {}))
    target = Target(model)
    ids = torch.tensor([[5, 9, 12, 7]])
    hidden = target.hidden_states(ids, torch.ones_like(ids))
    torch.testing.assert_close(target.logits(hidden[0]), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


@torch.no_grad()
def test_logits_of_a_plain_head_run_no_layer(monkeypatch):
    model = tiny_model("llama")
    target = Target(model)
    monkeypatch.setattr(model.model, "forward", None)
    hidden = torch.randn(3, target.hidden_size)
    assert torch.equal(target.logits(hidden), model.lm_head(hidden))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mistral"])
@torch.no_grad()
def test_texts_that_share_a_row_do_not_meet(family):
    """Past the window where there is one."""
    model = tiny_model(family, **({"sliding_window": 4} if family == "mistral" else {}))
    target = Target(model)
    texts = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 3, 12, 20)]
    rows = [torch.cat(texts[:3]), texts[3]]
    segments = [torch.tensor([1] * 9 + [2] * 3 + [3] * 12), torch.ones(20, dtype=torch.long)]
    pad = torch.nn.utils.rnn.pad_sequence
    packed = target.hidden_states(pad(rows, batch_first=True), pad(segments, batch_first=True))
    found = [*packed[0].split([9, 3, 12]), packed[1, :20]]
    for text, states in zip(texts, found, strict=True):
        alone = target.hidden_states(text[None], torch.ones(1, len(text), dtype=torch.long))[0]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_layers_give_the_states_that_the_model_itself_shows(family):
    layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    model = tiny_model(family, **layers, **({"layer_types": None} if family == "gemma3_text" else {}))
    target = Target(model, (1, 3))
    assert target.state_size == 96
    ids = torch.tensor([[5, 6, 7, 8]])
    shown = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = target.hidden_states(ids, torch.ones_like(ids))
    torch.testing.assert_close(found, torch.cat((shown[1], shown[3], shown[4]), dim=-1))
    cache = target.new_cache(batch=1, slots=4)
    states, _ = target.forward(chain(ids), torch.zeros(1, dtype=torch.long), cache)
    torch.testing.assert_close(states, found)


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 1), (-1,)])
def test_layers_that_are_not_there_are_refused(llama, layers):
    with pytest.raises(RedrafterError, match="distinct numbers from 1 to 1"):
        Target(llama, layers)


def test_a_cache_that_does_not_fit_is_refused_with_the_arithmetic(monkeypatch):
    target = Target(tiny_model())  # two layers of two heads of 8 numbers, keys and values, 4 bytes: 256 bytes a token
    monkeypatch.setattr("redrafter.utils.memory.memory_left", lambda device: 2**30)
    target.new_cache(batch=1, slots=100)
    with pytest.raises(
        RedrafterError, match=r"4 x 2,000,000 tokens take 1.91 GiB, 0.2 KiB a token in 2 layers, and 1.00"
    ):
        target.new_cache(batch=4, slots=2_000_000)


def test_a_target_that_is_not_finite_is_told_from_one_of_another_architecture():
    model = tiny_model()
    model.config._name_or_path = "someone/this"
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(RedrafterError, match=r"^Parameter model\.layers\.1\.mlp\.up_proj\.weight of someone"):
        Target(model)
    model = tiny_model().half()
    model.model.embed_tokens.weight.data[:] = 6e4
    model.model.layers[0].self_attn.o_proj.weight.data[:] = 6e4
    with pytest.raises(RedrafterError, match=r"are NaN or infinite in float16: load it in another dtype"):
        Target(model)
