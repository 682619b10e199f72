"""Apple's format, read by transformers like the released code, and by this package."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from conftest import refusal, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.integrations.apple import export


class Config(transformers.PretrainedConfig):
    model_type = "recurrent_drafting_drafter"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)


class Drafter(transformers.PreTrainedModel):
    """Modules with the released names: the test is that transformers finds every tensor in the file."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        hidden, width = config.hidden_size, config.exit_dim
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        blocks = [Block(width) for _ in range(config.num_draft_layers)]
        self.lm_head = nn.Sequential(*blocks, nn.Linear(width, config.vocab_size, bias=False))
        if config.rnn:
            self.rnn_u, self.rnn_w = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.post_init()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [{}, {"exit_dim": 24}, {"rnn": False, "num_draft_layers": 1}])
def test_round_trip(tmp_path, form, dtype):
    model = tiny_model().to(dtype)
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model, beam_length=3, beam_width=4, **form).to(dtype).eval()
    export(drafter, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() == {
        "architectures", "model_type", "vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn", "torch_dtype"
    }  # fmt: skip

    theirs, found = Drafter.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(found.values())
    assert theirs.dtype == dtype
    assert theirs.state_dict().keys() == drafter.state_dict().keys()

    again = RecurrentDrafter.from_pretrained(tmp_path, target=model)
    context, state = torch.randn(2, 5, 32).to(dtype)
    assert torch.equal(drafter.logits(context, state), again.logits(context, state))
    settings = {"max_new_tokens": 12, "beam_length": 3, "beam_width": 4}
    ours, back = (generate(model, head, [[5, 6, 7]], **settings) for head in (drafter, again))
    assert ours.new_tokens == back.new_tokens
    assert ours.stats.accepted_by_position == back.stats.accepted_by_position


def test_drafters_that_the_format_does_not_support_raise_an_error(tmp_path):
    model = tiny_model()
    with pytest.raises(RedrafterError, match="draft vocabulary"):
        export(RecurrentDrafter.for_target(model, draft_vocabulary=torch.arange(5)), tmp_path)
    with pytest.raises(RedrafterError, match="gated"):
        export(RecurrentDrafter.for_target(model, gated=True), tmp_path)


def test_the_command(say, drafter_folder, tmp_path):
    status, out, err = say("export", drafter_folder, "--output", tmp_path / "theirs", "--format", "apple")
    assert (status, out) == (0, "")
    assert "pass 4 there for drafts of 3 tokens" in err
    assert RecurrentDrafter.from_pretrained(tmp_path / "theirs").config.target is None
    assert "already holds a drafter" in refusal(say("export", drafter_folder, "--output", tmp_path / "theirs"))
    assert say("export", drafter_folder, "--output", tmp_path / "theirs", "--overwrite")[0] == 0
    assert "apple" in refusal(say("export", drafter_folder, "--output", tmp_path / "b", "--format", "gguf"))


def test_a_format_without_recurrent_drafters_is_refused(say, drafter_folder, tmp_path):
    refused = refusal(say("export", drafter_folder, "--output", tmp_path / "b", "--format", "speculators"))
    assert "vLLM" in refused
    assert not (tmp_path / "b").exists()
