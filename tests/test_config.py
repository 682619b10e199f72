"""Configurations that exist are valid."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from redrafter import DrafterConfig, RecurrentDrafter, RedrafterError
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.proposers import method_of
from redrafter.proposers.base import resolved_shape

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


def sizes(shape: DraftShape) -> tuple[int, int, int | None]:
    return shape.beam_width, shape.beam_length, shape.node_budget


TUNED = (
    DraftShape(batch=2, beam_width=3, beam_length=4, node_budget=9),
    DraftShape(batch=8, beam_width=2, beam_length=1),
    DraftShape(batch=32, beam_width=1, beam_length=0),
)


def test_tuned_shapes_come_back_and_are_left_out_where_there_are_none(tmp_path):
    config = DrafterConfig(vocab_size=100, hidden_size=8, shapes=TUNED, tuned_on="a machine")
    assert read(tmp_path, config.to_json()) == config
    bare = json.loads(DrafterConfig(vocab_size=100, hidden_size=8).to_json())
    assert not {"shapes", "tuned_on"} & bare.keys()


@pytest.mark.parametrize(
    ("batch", "overrides", "expected"),
    [
        (1, (), (5, 6, 21)),  # below all tuned batch sizes: the default shape
        (2, (), (3, 4, 9)),
        (7, (), (3, 4, 9)),
        (8, (), (2, 1, None)),  # complete beams, although the default shape has a budget
        (31, (), (2, 1, None)),
        (500, (), (1, 0, None)),
        (8, (7,), (7, 6, 21)),
        (8, (None, 2), (5, 2, 21)),
        (8, (None, None, 40), (5, 6, 40)),
        (8, (None, 0), (5, 0, 21)),
        (8, (1, 2, 3), (1, 2, 3)),
    ],
)
def test_the_shape_is_that_of_the_largest_tuned_batch_below_unless_it_is_overridden(batch, overrides, expected):
    fields = {"vocab_size": 100, "hidden_size": 8, "beam_width": 5, "beam_length": 6, "node_budget": 21}
    config = DrafterConfig(**fields, shapes=TUNED)
    parts = ShapeOverrides(*overrides)
    assert sizes(resolved_shape(method_of(RecurrentDrafter(config)), batch, parts)) == expected
    if overrides:
        assert sizes(resolved_shape(method_of(RecurrentDrafter(DrafterConfig(**fields))), batch, parts)) == expected
    else:
        assert sizes(config.shape(batch)) == expected


def test_a_cpu_has_a_default_shape_of_its_own():
    """Unless a shape was tuned for the batch."""
    small = DraftShape(beam_width=1, beam_length=2, node_budget=3)
    fields = {"vocab_size": 100, "hidden_size": 8, "beam_width": 5, "beam_length": 6, "cpu_shape": small}
    config = DrafterConfig.model_validate_json(DrafterConfig(**fields).to_json())
    assert sizes(method_of(RecurrentDrafter(config)).shape(4)) == sizes(small)
    assert sizes(method_of(RecurrentDrafter(config).to("meta")).shape(4)) == (5, 6, None)
    tuned = DrafterConfig(**fields, shapes=TUNED)
    assert sizes(method_of(RecurrentDrafter(tuned)).shape(2)) == (3, 4, 9)
    with pytest.raises(ValidationError, match="cannot be drafted"):
        DrafterConfig(**fields | {"cpu_shape": DraftShape(beam_width=1, beam_length=3, node_budget=2)})


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([{"batch": 0, "beam_width": 2, "beam_length": 2}], "shapes.0.batch"),
        ([{"batch": 1, "beam_width": 2, "beam_length": -1}], "shapes.0.beam_length"),
        ([{"batch": 1, "beam_width": 32001, "beam_length": 2}], "the shape of batch 1 cannot be drafted"),
        ([{"batch": 4, "beam_width": 2, "beam_length": 4, "node_budget": 4}], "the shape of batch 4 cannot be drafted"),
        ([{"batch": b, "beam_width": 2, "beam_length": 2} for b in (4, 1)], "sorted by batch"),
        ([{"batch": 4, "beam_width": 2, "beam_length": 2}] * 2, "sorted by batch"),
    ],
)
def test_a_bad_shape_is_named(tmp_path, shapes, named):
    with pytest.raises(RedrafterError, match=rf"does not describe a recurrent drafter: .*{named}"):
        read(tmp_path, json.dumps(APPLE | {"shapes": shapes}))


def test_shapes_in_words():
    words = ["3 beams of 4 tokens, the 9 most probable nodes", "2 beams of 1 token", "without drafting"]
    assert [shape.description for shape in TUNED] == words
    assert DraftShape(beam_width=1, beam_length=2).description == "one beam of 2 tokens"
