"""The drafter's fused products against the drafter's own.  test_drafting.py tests the kernel."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter
from redrafter.core.shapes import DraftShape
from redrafter.proposers import fused_drafter as module
from redrafter.proposers.fused_drafter import FusedDrafter
from redrafter.proposers.recurrent import RecurrentProposer
from redrafter.targets.target import Target


def drafter_of(**form):
    torch.manual_seed(0)
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model, **form).double()
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter, lambda ids: model.get_input_embeddings()(ids).double()


@pytest.mark.parametrize("form", [{}, {"exit_dim": 20, "draft_vocabulary": torch.arange(3, 50)}], ids=["whole", "own"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_fused_products_give_the_results_of_the_drafter(form, batch):
    drafter, embed = drafter_of(**form)
    found = FusedDrafter.of(drafter, embed)
    state, context = torch.randn(2, batch, 5, 32, dtype=torch.double).unbind()
    context = context[:, :1]
    read = drafter.read(context)
    seen = drafter.seen(context.expand_as(state), state)
    carried, first = found.products(state, seen, read)
    wanted = drafter.logits(context.expand_as(state), state)
    torch.testing.assert_close(drafter.scores(first), wanted)
    none, first = found.products(state, seen, read, last=True)
    assert none.shape[-1] == 0
    torch.testing.assert_close(drafter.scores(first), wanted)

    tokens, parents = torch.randint(3, 50, (batch, 4)), torch.randint(0, 5, (batch, 4))
    begun = state.gather(1, parents[..., None].expand(-1, -1, 32))
    moved, seen = found.plain_moved(tokens, parents, carried, context)
    torch.testing.assert_close(moved, drafter.step(begun, embed(tokens)))
    wanted = drafter.seen(context.expand_as(moved), moved)
    assert seen is wanted is None or seen.equal(wanted)


@pytest.mark.parametrize("form", [{"rnn": False}, {"gated": True}, {"num_draft_layers": 0}], ids=str)
def test_other_forms_are_left_alone(form):
    assert FusedDrafter.of(*drafter_of(**form)) is None


def test_a_large_table_is_not_made(monkeypatch):
    drafter, embed = drafter_of()
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", drafter.config.head_size * 32 * 8 - 1)
    assert FusedDrafter.of(drafter, embed) is None
    monkeypatch.setattr(module, "MAX_TABLE_BYTES", drafter.config.head_size * 32 * 8)
    assert FusedDrafter.of(drafter, embed) is not None


def test_nothing_is_fused_if_no_kernel_runs():
    model = tiny_model()
    proposer = RecurrentProposer(
        RecurrentDrafter.for_target(model), Target(model), DraftShape(beam_width=3, beam_length=2)
    )
    assert proposer.prepare() is proposer
