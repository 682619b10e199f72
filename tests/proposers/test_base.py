"""What every method shares."""

from __future__ import annotations

from redrafter import RecurrentDrafter
from redrafter.core.shapes import DraftShape
from redrafter.heads.recurrent import DrafterConfig
from redrafter.proposers.base import measured


def test_what_is_tuned_not_to_draft_is_measured_as_it_was_made():
    shapes = (DraftShape(batch=1, beam_width=4, beam_length=2), DraftShape(batch=4, beam_width=1, beam_length=0))
    drafter = RecurrentDrafter(DrafterConfig(vocab_size=100, hidden_size=8, beam_width=6, beam_length=3, shapes=shapes))
    assert drafter.drafting(4)[1] == 0
    assert measured(drafter, 4) == {"beam_width": 6, "beam_length": 3, "node_budget": None}
    assert set(measured(drafter, 1).values()) == {None}, "then generate takes what is tuned"
    assert measured(drafter, 4, length=0)["beam_length"] == 0
    assert measured(drafter, 4, width=7) == {"beam_width": 7, "beam_length": None, "node_budget": None}
