"""Draft shapes of methods, and the table of heads."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.heads.recurrent import DrafterConfig
from redrafter.proposers import method_of
from redrafter.proposers.base import draftable, measured_shape, resolved_shape
from redrafter.proposers.methods import HEADS, PROPOSERS
from redrafter.targets.target import Target
from redrafter.utils.outputs import _TYPES


def test_a_drafter_that_is_tuned_not_to_draft_is_measured_in_its_default_shape():
    shapes = (DraftShape(batch=1, beam_width=4, beam_length=2), DraftShape(batch=4, beam_width=1, beam_length=0))
    drafter = RecurrentDrafter(DrafterConfig(vocab_size=100, hidden_size=8, beam_width=6, beam_length=3, shapes=shapes))
    method, default = method_of(drafter), DraftShape(beam_width=6, beam_length=3).with_lookup()
    assert method.shape(4).beam_length == 0
    assert measured_shape(method, 4, ShapeOverrides()) == default
    assert measured_shape(method, 1, ShapeOverrides()) == method.shape(1) == shapes[0].with_lookup()
    assert measured_shape(method, 4, ShapeOverrides(beam_length=0)).beam_length == 0
    assert measured_shape(method, 4, ShapeOverrides(beam_width=7)) == default.model_copy(update={"beam_width": 7})
    assert measured_shape(method, 4, ShapeOverrides(lookup=False)) == default.with_lookup(False)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (ShapeOverrides(beam_width=0), "beam_width"),
        (ShapeOverrides(beam_length=-1), "beam_length"),
        (ShapeOverrides(node_budget=3), "node_budget"),
    ],
)
def test_impossible_overrides_are_refused(overrides, word):
    method = method_of(RecurrentDrafter(DrafterConfig(vocab_size=100, hidden_size=8, beam_width=6, beam_length=3)))
    with pytest.raises(RedrafterError, match=word):
        resolved_shape(method, 1, overrides)


def test_shapes_that_a_method_cannot_draft_are_listed_with_the_reason():
    model = tiny_model()
    method = method_of(RecurrentDrafter.for_target(model))
    fits, too_wide = DraftShape(beam_width=3, beam_length=2), DraftShape(beam_width=62, beam_length=2)
    supported, reasons = draftable(method, Target(model), [fits, too_wide])
    assert supported == [fits]
    (reason,) = reasons
    assert reason.startswith(f"{too_wide.description}: ")
    assert "61 tokens" in reason


def test_what_is_not_a_drafter_is_refused(unchecked):
    with pytest.raises(RedrafterError, match="Linear is not a supported drafter"):
        method_of(torch.nn.Linear(1, 1))


def test_every_kind_of_head_has_a_proposer_and_a_type_of_folder():
    assert set(PROPOSERS) == set(HEADS.values())
    assert set(HEADS) == set(_TYPES)
