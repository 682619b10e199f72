"""Configurations that exist are valid."""

from __future__ import annotations

import json

import pytest

from redrafter import DrafterConfig, RedrafterError

APPLE = {  # as the released code writes it
    "model_type": "recurrent_drafting_drafter",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "exit_dim": 8192,
    "num_draft_layers": 2,
    "rnn": True,
    "transformers_version": "4.36.0",
}


def read(tmp_path, text: str) -> DrafterConfig:
    (tmp_path / "config.json").write_text(text)
    return DrafterConfig.from_file(tmp_path / "config.json")


def test_what_the_released_code_writes_is_read_and_what_it_does_not_know_has_defaults(tmp_path):
    config = read(tmp_path, json.dumps(APPLE))
    assert (config.vocab_size, config.hidden_size, config.exit_dim, config.num_draft_layers) == (32000, 4096, 8192, 2)
    assert config.rnn
    assert config.target is None
    assert config.head_size == 32000


def test_the_released_defaults():
    config = DrafterConfig(vocab_size=100, hidden_size=8)
    assert (config.exit_dim, config.num_draft_layers, config.rnn) == (16, 2, True)


def test_round_trip(tmp_path):
    config = DrafterConfig(
        vocab_size=100, hidden_size=8, exit_dim=5, num_draft_layers=0, rnn=False, draft_vocab_size=50,
        target="someone/model", target_revision="abc", beam_width=3, beam_length=7,
    )  # fmt: skip
    assert read(tmp_path, config.to_json()) == config
    assert config.head_size == 50
    assert "target" not in json.loads(DrafterConfig(vocab_size=100, hidden_size=8).to_json())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_draft_layers": -1}, "num_draft_layers"),
        ({"draft_vocab_size": 32001}, "draft_vocab_size"),
        ({"beam_length": 0}, "beam_length"),
        ({"model_type": "llama"}, "model_type"),
    ],
)
def test_a_bad_value_is_named_with_the_file(tmp_path, change, named):
    with pytest.raises(RedrafterError, match=rf"config\.json does not describe a recurrent drafter: .*{named}"):
        read(tmp_path, json.dumps(APPLE | change))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"vocab_size": 3}'])
def test_what_is_no_config_is_refused(tmp_path, text):
    with pytest.raises(RedrafterError, match="does not describe a recurrent drafter"):
        read(tmp_path, text)
