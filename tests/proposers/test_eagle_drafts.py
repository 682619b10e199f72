"""Drafts of an EAGLE head are those of runs over the whole text, however rows come, go and are accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import LAWS, MANY, SHAPES, check_every_draft, shaped, small

from conftest import AsksNothing, greedy, prompts_read, read_in_parts, tiny_model
from redrafter import RedrafterError, generate
from redrafter.engine.request import request
from redrafter.evaluation.acceptance import evaluate
from redrafter.heads.eagle import EagleHead
from redrafter.targets.target import Target
from test_eagle import continued, random_head

MODEL = tiny_model()
HEAD = random_head()


@settings(max_examples=8)
@given(
    st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 9), st.sampled_from(list(LAWS)), st.integers(1, 4),
)  # fmt: skip
def test_the_text_is_that_of_the_target_alone(prompts, width, length, spare, law, batch_size):
    told = {"max_new_tokens": 12, "batch_size": batch_size, **LAWS[law]}
    budget = length + spare if spare else None
    out = generate(MODEL, HEAD, prompts, **told, **shaped(width, length, budget))
    assert out.new_tokens == generate(MODEL, None, prompts, **told).new_tokens
    if law == "greedy":
        assert out.new_tokens == [greedy(MODEL, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {}),
        ("gpt2", {}),
        ("cohere", {"logit_scale": 0.3}),  # whose logits the output head alone does not make
    ],
)
def test_other_families_past_their_windows(family, changes):
    model = tiny_model(family, **changes)
    prompts = [list(range(3, 23)), [9, 8, 7], [4]]
    out = generate(model, random_head(model), prompts, max_new_tokens=16, beam_width=2)
    assert out.new_tokens == generate(model, None, prompts, max_new_tokens=16).new_tokens


class Echo(EagleHead):
    """A head of a target whose layers do nothing: the next feature is the norm of the token's embedding."""

    def forward(self, embeddings, features, position, mask, cache):
        super().forward(embeddings, features, position, mask, cache)
        return self.known(embeddings)


@pytest.mark.parametrize("law", LAWS)
def test_a_head_that_knows_the_target_has_every_draft_accepted(law):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    head = Echo(EagleHead.fresh(model, beam_length=3, beam_width=1).config)
    object.__setattr__(head, "known", model.model.norm)
    out = generate(model, head, [[5], [7, 8]], max_new_tokens=41, lookup=False, **LAWS[law])
    assert out.stats.accepted_by_position == [22, 20, 20]  # two rows: ten steps of 3 + 1, then one token


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("law", "coupled"), [("greedy", False), ("sampled", False), ("sampled", True)])
@torch.no_grad()
def test_every_draft_is_that_of_a_plain_search(monkeypatch, shape, law, coupled):
    """Whatever was accepted before, in whatever slot, after whatever row: what is kept is what a new run gives."""
    read_in_parts(monkeypatch, 4, 4)
    model = tiny_model(vocab_size=9, spread=0.3).double()
    target = Target(model)
    head = random_head(model, seed=2)
    head.config = head.config.model_copy(update={"coupled": coupled})

    def following_of(text):
        """Every feature by a run over the whole text.  Before a text of one token there is a feature of zeros."""
        if len(text) == 1:
            hidden, text = torch.zeros(1, target.hidden_size, dtype=torch.double), text * 2
            return lambda tokens: target.logits(continued(head, target.embed, hidden, [*text, *tokens])[None])[0]
        hidden = target.hidden_states(torch.tensor([text[:-1]]), torch.ones(1, len(text) - 1, dtype=torch.long))[0]
        return lambda tokens: target.logits(continued(head, target.embed, hidden, [*text, *tokens])[None])[0]

    told = {"max_new_tokens": 8, "batch_size": 3, **LAWS[law]}
    check_every_draft(model, head, following_of, shape, coupled=coupled, **told)


def test_every_place_of_a_text_is_drafted_as_decoding_drafts():
    """Teacher-forced acceptance gives each place the memory of what lies before it."""
    model = tiny_model(vocab_size=9, spread=0.3).double()
    head = random_head(model, seed=2, beam_length=3, beam_width=2)
    prompts = small(MANY)
    found = evaluate(model, head, prompts, max_new_tokens=20, seed=11, batch_size=2)
    for texts in found.values():
        assert [one.walked for one in texts] == [one.decoding for one in texts]
        assert sum(one.walked.accepted for one in texts) > 0


def test_what_cannot_be_drafted_is_refused_in_a_sentence():
    for told, sentence in (
        ({"beam_length": -1}, "beam_length must be at least 1, or 0 to decode without drafting, not -1"),
        ({"beam_width": 62}, "beam_width must lie between 1 and the drafter's 61 tokens, not 62"),
        ({"node_budget": 4}, "node_budget must hold the root and 4 drafted tokens, not be 4"),
    ):
        with pytest.raises(RedrafterError, match=sentence):
            generate(MODEL, HEAD, [[5]], **told)
    with pytest.raises(RedrafterError, match=r"was made for .* not for"):
        generate(tiny_model(vocab_size=60), HEAD, [[5]])
    with pytest.raises(RedrafterError, match="The drafter is on meta, the model on cpu"):
        generate(MODEL, random_head().to("meta"), [[5]])
    assert request(MODEL, HEAD, [[5]], beam_length=0).decoder.proposer is None


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("law", LAWS)
def test_a_draft_asks_the_device_nothing(shape, law):
    asked = request(MODEL, HEAD, MANY[:3], max_new_tokens=9, **shaped(*shape), **LAWS[law])
    state = prompts_read(asked).state
    with torch.inference_mode():
        noise = asked.sampler.noise(state.rows, depths=asked.decoder.length + 1, vocabulary=61)
        with AsksNothing():
            tree = asked.decoder.proposer.propose(state.memory, state.rows, state.context, noise)
    assert tree.size == asked.decoder.size


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("law", LAWS)
def test_on_a_gpu_a_step_is_one_graph_and_drafts_the_same(captured, shape, law):
    model = tiny_model(vocab_size=9, spread=0.3)
    head = random_head(model, seed=2)
    prompts = small(MANY)
    told = {"max_new_tokens": 41, "batch_size": 3, **LAWS[law]}
    on_cpu = generate(model, head, prompts, **told, **shaped(*shape))
    model, head = model.cuda(), head.cuda()
    plain = generate(model, None, prompts, fast=False, **told)
    for fast in (False, True):
        out = generate(model, head, prompts, fast=fast, **told, **shaped(*shape))
        assert out.new_tokens == plain.new_tokens == on_cpu.new_tokens
        assert out.stats.accepted == pytest.approx(on_cpu.stats.accepted, rel=0.05)  # a tie may fall otherwise
    assert captured[-1].refused is None
