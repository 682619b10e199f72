"""What `recipes/target/grown.py` promises: a larger shape, the same function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

from conftest import tiny_model
from redrafter import EagleHead, MedusaHeads, RecurrentDrafter, RedrafterError, TwoModel, generate

sys.path.append(str(Path(__file__).parent.parent))
from recipes.target import grown
from recipes.target.grown import grown_drafter, grown_eagle, grown_head, grown_medusa, grown_target

HEADS = {"released": {}, "projected": {"exit_dim": 24, "gated": True}, "sum": {"exit_dim": 40, "rnn": False}}
SHAPE = {"hidden": 48, "layers": 3, "heads": 8, "inner": 70}


def pair(head: str, **changes: object):
    """A target and a drafter in double precision."""
    model = tiny_model(head_dim=8, rms_norm_eps=0.1, **changes).double()
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that got another's weights
            torch.nn.init.uniform_(weight, 0.5, 2)
    if head == "medusa":
        drafter = MedusaHeads.fresh(model, heads=3, blocks=2, draft_vocabulary=torch.arange(5, 45), beam_width=20)
    elif head == "eagle":
        drafter = EagleHead.fresh(model, beam_length=3, beam_width=20)
    else:
        drafter = RecurrentDrafter.for_target(
            model, draft_vocabulary=torch.arange(5, 45), num_draft_layers=2, beam_length=3, beam_width=20, **HEADS[head]
        )
    for weight in drafter.double().parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model, drafter.eval()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "kv_heads": 2}])
def test_a_grown_target_has_the_same_logits_at_more_parameters(changes):
    kv_heads = changes.pop("kv_heads", None)
    model, _ = pair("released", **changes)
    new = grown_target(model, **SHAPE, kv_heads=kv_heads)
    assert new.num_parameters() > 2 * model.num_parameters()
    ids = torch.randint(3, 61, (3, 20))
    with torch.no_grad():
        before, after = model(ids).logits, new(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()  # norms are in single precision


def test_what_is_added_costs_what_trained_weights_cost():
    model, drafter = pair("projected")
    new = grown_target(model, **SHAPE)
    for layer in new.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (part.weight != 0).all()
    assert (new.lm_head.weight != 0).all()
    head = grown_drafter(drafter, hidden=48, exit_dim=50)
    assert all((block.linear.weight != 0).float().mean() > 0.7 for block in head.lm_head[:-1])


@pytest.mark.parametrize(
    ("head", "exit_dim"),
    [("released", 96), ("released", 70), ("projected", None), ("sum", 55), ("medusa", None), ("eagle", None)],
)
def test_a_grown_pair_drafts_and_writes_the_same(head, exit_dim):
    model, drafter = pair(head)
    shape = SHAPE | ({"hidden": 64} if head == "eagle" else {})  # 8 heads of 8
    new = grown_target(model, **shape)
    head = grown_head(drafter, **{name: shape[name] for name in ("hidden", "heads", "inner")}, exit_dim=exit_dim)
    assert type(head) is type(drafter)
    assert head.config.hidden_size == new.config.hidden_size
    if isinstance(head, RecurrentDrafter):
        assert head.config.exit_dim == (exit_dim or 48)
    assert sum(one.numel() for one in head.parameters()) > 1.1 * sum(one.numel() for one in drafter.parameters())
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11], [30]]
    for law in ({"do_sample": False}, {"do_sample": True, "seed": 1}):
        before = generate(model, drafter, prompts, max_new_tokens=24, **law)
        after = generate(new, head, prompts, max_new_tokens=24, **law)
        assert after.new_tokens == before.new_tokens
        assert after.stats.accepted_by_position == before.stats.accepted_by_position
        assert before.stats.accepted > 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_draft_model_of_one_head_grows_beside_its_target(tied):
    model, _ = pair("released")
    sizes = {"hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 1, "num_key_value_heads": 1}
    draft = tiny_model(seed=1, head_dim=8, num_hidden_layers=1, tie_word_embeddings=tied, **sizes).double()
    larger = grown_target(draft, hidden=24, layers=2, heads=3, inner=40)
    assert larger.config.head_dim == 8
    new, prompts = grown_target(model, **SHAPE), [[3, 4, 5], [7, 8, 9, 10, 11], [30]]
    for law in ({"do_sample": False}, {"do_sample": True, "seed": 1}):
        shape = {"beam_width": 12, "beam_length": 2, "max_new_tokens": 24}
        before = generate(model, TwoModel(draft), prompts, **shape, **law)
        after = generate(new, TwoModel(larger), prompts, **shape, **law)
        assert after.new_tokens == before.new_tokens
        assert after.stats.accepted_by_position == before.stats.accepted_by_position
        assert before.stats.accepted > 0


def test_what_was_tuned_at_the_cost_before_is_not_kept():
    _, drafter = pair("projected")
    told = {"shapes": ({"batch": 1, "beam_width": 2, "beam_length": 2},), "tuned_on": "another machine"}
    drafter.config = type(drafter.config).model_validate(drafter.config.model_dump() | told)
    head = grown_drafter(drafter, hidden=48)
    assert head.config.shapes == ()
    assert head.config.tuned_on is None


def test_the_drafters_logits_are_the_same():
    _, drafter = pair("projected")
    head = grown_drafter(drafter, hidden=48)
    context, token = torch.randn(5, 32).double(), torch.randn(5, 32).double()
    wide = [torch.nn.functional.pad(one, (0, 16)) for one in (context, token)]
    with torch.no_grad():
        before = drafter.logits(context, drafter.step(drafter.step(None, token), token))
        after = head.logits(wide[0], head.step(head.step(None, wide[1]), wide[1]))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-9)


def test_the_heads_logits_are_the_same():
    _, heads = pair("medusa")
    hidden = torch.randn(5, 32).double()
    with torch.no_grad():
        before = heads.logits(hidden)
        after = grown_medusa(heads, hidden=48).logits(torch.nn.functional.pad(hidden, (0, 16)))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-9)


def test_refusals():
    model, drafter = pair("projected")
    with pytest.raises(RedrafterError, match="hidden_size can grow from 32, not become 16"):
        grown_target(model, **(SHAPE | {"hidden": 16}))
    with pytest.raises(RedrafterError, match="8 heads cannot share 8 keys where 2 shared one"):
        grown_target(model, **SHAPE, kv_heads=8)
    with pytest.raises(RedrafterError, match="without biases can be grown, not this qwen3"):
        grown_target(tiny_model("qwen3"), **SHAPE)
    with pytest.raises(RedrafterError, match="hidden_size can grow from 32, not become 16"):
        grown_medusa(pair("medusa")[1], hidden=16)
    with pytest.raises(RedrafterError, match=r"with heads of 8 needs 6 of them for 48\."):
        grown_eagle(pair("eagle")[1], hidden=48, heads=8, inner=70)
    with pytest.raises(RedrafterError, match="would lack the drafter's projection"):
        grown_drafter(drafter, hidden=48, exit_dim=96)
    with pytest.raises(RedrafterError, match=r"hidden size 32 and width 64 cannot become one of 48 and 48\."):
        grown_drafter(pair("released")[1], hidden=48)
    seeing = RecurrentDrafter.for_target(model, context_positions=2)
    with pytest.raises(RedrafterError, match="cannot be grown"):
        grown_drafter(seeing, hidden=48, exit_dim=96)


def test_the_command_writes_folders_that_fit_together(model_folder, drafter_folder, tmp_path, monkeypatch, say):
    words = f"grown --target {model_folder} --drafter {drafter_folder} --output {tmp_path} --hidden 64 --layers 3"
    words += " --heads 8 --inner 64 --exit-dim 128 --dtype float32"
    monkeypatch.setattr(sys, "argv", words.split())
    grown.main()
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "target")
    assert (saved.hidden_size, saved.num_hidden_layers, saved.num_attention_heads) == (64, 3, 8)
    ask = ("generate", "--prompt", "a b", "--max-new-tokens", 12, "--drafter")
    old = say(*ask, drafter_folder, "--model", model_folder)
    assert say(*ask, tmp_path / "drafter", "--model", tmp_path / "target")[:2] == old[:2]
    assert old[0] == 0
