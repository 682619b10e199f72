"""The drafter's formulas, and its folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from conftest import tiny_model
from redrafter import DrafterConfig, RecurrentDrafter, RedrafterError


def random_drafter(**changes) -> RecurrentDrafter:
    torch.manual_seed(0)
    drafter = RecurrentDrafter(DrafterConfig(**({"vocab_size": 20, "hidden_size": 6} | changes)))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter)
    return drafter


FORMS = [
    {},
    {"rnn": False},
    {"exit_dim": 5},
    {"exit_dim": 5, "rnn": False, "num_draft_layers": 0},
    {"num_draft_layers": 3, "draft_vocab_size": 7},
    {"context_layers": (1, 2), "context_positions": 2},
    {"gated": True},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_formulas_as_published(form):
    drafter = random_drafter(**form).double()
    weights = drafter.state_dict()

    def silu(x):
        return x / (1 + torch.exp(-x))

    generator = torch.Generator().manual_seed(1)
    *embeddings, context = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    if "context_layers" in form:
        features = torch.randn(2 * 3 * 6, generator=generator, dtype=torch.float64)
        alike = torch.cat([part / (part.square().mean() + 2**-52).sqrt() for part in features.split(6)])
        context = features[-6:] + weights["fuse.weight"] @ alike + weights["fuse.bias"]
        torch.testing.assert_close(drafter.context(features), context)
    else:
        assert drafter.context(context) is context
    state, expected = None, torch.zeros(6, dtype=torch.float64)
    for embedding in embeddings:
        state = drafter.step(state, embedding)
        if drafter.config.rnn:
            carried = weights["rnn_u.weight"] @ expected + weights["rnn_u.bias"]
            moved = silu(weights["rnn_w.weight"] @ embedding + carried)
            gate = 1.0
            if drafter.config.gated:
                asked = weights["gate_w.weight"] @ embedding + weights["gate_u.weight"] @ expected
                gate = 1 / (1 + torch.exp(-asked - weights["gate_u.bias"]))
            expected = expected + gate * (moved - expected)
        else:
            expected = expected + embedding
        torch.testing.assert_close(state, expected)

    x = torch.cat((context, expected))
    if "exit_dim" in form:
        x = weights["input_proj.weight"] @ x + weights["input_proj.bias"]
    blocks = drafter.config.num_draft_layers
    for i in range(blocks):
        x = x + silu(weights[f"lm_head.{i}.linear.weight"] @ x + weights[f"lm_head.{i}.linear.bias"])
    torch.testing.assert_close(drafter.logits(context, state), weights[f"lm_head.{blocks}.weight"] @ x)
    for rows in (1, 2):
        again = context.expand(rows, 1, -1)
        found = drafter.logits(again.expand(-1, 3, -1), state.expand(rows, 3, -1), drafter.read(again))
        torch.testing.assert_close(found, (weights[f"lm_head.{blocks}.weight"] @ x).expand(rows, 3, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path, form, dtype):
    drafter = random_drafter(**form, target="someone/model", beam_length=3).to(dtype)
    if drafter.draft_vocabulary is not None:
        drafter.draft_vocabulary = torch.tensor([0, 3, 4, 9, 11, 15, 19])
    drafter.save_pretrained(tmp_path / "drafter", card="# mine\n")
    again = RecurrentDrafter.from_pretrained(tmp_path / "drafter")
    assert again.config == drafter.config
    assert again.dtype == dtype
    assert not again.training
    assert again.state_dict().keys() == drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert (tmp_path / "drafter" / "README.md").read_text() == "# mine\n"


def test_a_folder_of_the_released_code_loads_and_drafts(tmp_path):
    model = tiny_model()
    config = {
        "model_type": "recurrent_drafting_drafter", "vocab_size": 61, "hidden_size": 32, "exit_dim": 64,
        "num_draft_layers": 2, "rnn": True, "architectures": ["RecurrentDrafter"], "torch_dtype": "float16",
    }  # fmt: skip
    shapes = {
        "rnn_u.weight": (32, 32), "rnn_u.bias": (32,), "rnn_w.weight": (32, 32),
        "lm_head.0.linear.weight": (64, 64), "lm_head.0.linear.bias": (64,),
        "lm_head.1.linear.weight": (64, 64), "lm_head.1.linear.bias": (64,), "lm_head.2.weight": (61, 64),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = RecurrentDrafter.from_pretrained(tmp_path, target=model)
    assert drafter.dtype == model.dtype
    assert torch.equal(drafter.lm_head[2].weight, tensors["lm_head.2.weight"].float())


def test_another_target_is_refused_by_both_names(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "someone/this"
    RecurrentDrafter.for_target(model).save_pretrained(tmp_path)
    RecurrentDrafter.from_pretrained(tmp_path, target=model)
    other = tiny_model(seed=1)
    other.config._name_or_path = "someone/other"
    with pytest.raises(RedrafterError, match="made for someone/this, not for someone/other, whose weights differ"):
        RecurrentDrafter.from_pretrained(tmp_path, target=other)
    larger = tiny_model(vocab_size=70)
    larger.config._name_or_path = "someone/larger"
    with pytest.raises(RedrafterError, match=r"someone/this \(vocabulary 61.*someone/larger \(vocabulary 70"):
        RecurrentDrafter.from_pretrained(tmp_path, target=larger)


def test_a_fresh_drafter_begins_with_the_papers_context():
    drafter = RecurrentDrafter(DrafterConfig(vocab_size=20, hidden_size=6, context_positions=3))
    features = torch.randn(2, 18)
    assert torch.equal(drafter.context(features), features[:, -6:])
    assert drafter.context(torch.zeros(2, 18)).isfinite().all(), "before a text begins there are zeros"


def test_a_fresh_drafter_knows_its_target():
    model = tiny_model()
    model.config._name_or_path, model.config._commit_hash = "someone/this", "0123"
    drafter = RecurrentDrafter.for_target(model, beam_length=3, draft_vocabulary=torch.tensor([9, 3, 5]))
    config = drafter.config
    assert (config.target, config.target_revision) == ("someone/this", "0123")
    assert (config.vocab_size, config.hidden_size, config.exit_dim, config.beam_length) == (61, 32, 64, 3)
    assert drafter.to_target_ids(torch.tensor([[0, 2]])).tolist() == [[3, 9]]
    assert RecurrentDrafter.for_target(model).to_target_ids(torch.tensor([7])).tolist() == [7]


@pytest.mark.parametrize("ids", [[3, 3], [-1, 2], [5, 61]])
def test_a_draft_vocabulary_holds_distinct_ids_of_the_target(ids):
    with pytest.raises(RedrafterError, match="distinct ids of the target's vocabulary"):
        RecurrentDrafter.for_target(tiny_model(), draft_vocabulary=torch.tensor(ids))
