"""Coupled drafting: the beams that the target's own draw would rank first, and what a perfect drafter makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam_search import plain_beam_search

from conftest import rooted, sampled_noise, tiny_model
from redrafter import RecurrentDrafter, generate
from redrafter.core.noise import gumbel
from redrafter.core.shapes import DraftShape
from redrafter.proposers.recurrent import RecurrentProposer
from redrafter.targets.target import Target

MODEL = tiny_model()
LAWS = [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}]


def paths(tree, row: int) -> dict[int, tuple[int, ...]]:
    """The tokens from below the root to each node."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    for n in range(1, int(tree.valid[row].sum())):
        found[n] = (*found[int(tree.parents[row, n])], int(tree.tokens[row, n]))
    return found


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from(LAWS))
@torch.no_grad()
def test_beams_are_those_that_the_noise_puts_first(seed, width, length, less, budgeted, law):
    torch.manual_seed(seed)
    drafter = RecurrentDrafter.for_target(MODEL, draft_vocabulary=torch.arange(3, 40) if less else None)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    target = Target(MODEL)
    budget = 1 + length + width if budgeted else None
    proposer = RecurrentProposer(drafter, target, DraftShape(beam_width=width, beam_length=length, node_budget=budget))
    config = MODEL.generation_config.__class__(do_sample=True, **({"top_k": 0} | law))
    warpers = MODEL._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    draw = sampled_noise(gumbel(torch.tensor([seed, 5]), torch.arange(4, 4 + length + 1).expand(2, -1), 61), **law)
    context, root = torch.randn(2, 32), torch.tensor([5, 9])
    tree = proposer.propose(None, rooted(root), context[:, None], draw)
    for row in range(2):
        found = set(paths(tree, row).values())
        noise = draw.gumbel[row]

        def as_drawn(logits, ids, position, noise=noise):
            return warpers(None, logits[None])[0] + noise[position, list(ids)]

        found_plainly = plain_beam_search(
            drafter, target.embed, context[row], int(root[row]), width, length, adjust=as_drawn
        )
        best = [tuple(tokens) for tokens, _ in found_plainly]
        expected = {tokens[:depth] for tokens in best for depth in range(length + 1)}
        if budgeted:
            assert len(found) <= budget
            assert best[0][:1] in found
        elif len(best) == width:
            assert found == expected
        else:
            assert found >= expected


@pytest.mark.parametrize("law", LAWS)
def test_a_drafter_that_knows_the_target_has_every_draft_accepted(monkeypatch, law):
    """The target looks at its last token alone, so the drafter can compute the same logits."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    drafter = RecurrentDrafter.for_target(model, beam_length=3, beam_width=1)
    monkeypatch.setattr(RecurrentDrafter, "step", lambda self, state, embedding: model.model.norm(embedding))
    monkeypatch.setattr(RecurrentDrafter, "logits", lambda self, context, state, read: model.lm_head(state))
    out = generate(model, drafter, [[5], [7, 8]], max_new_tokens=41, lookup=False, do_sample=True, seed=3, **law)
    assert out.stats.accepted_by_position == [22, 20, 20]  # two rows: ten steps of 3 + 1, then one token
