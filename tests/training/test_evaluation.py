"""Acceptance against a plain loop over positions, and the walked counts against those of decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import rooted, sampled_noise, tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, stream
from redrafter.core.noise import gumbel
from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.data.examples import Row
from redrafter.decoding.state import Row as Decoded
from redrafter.decoding.state import Sampling
from redrafter.evaluation import acceptance as evaluation
from redrafter.evaluation.acceptance import Acceptance, Measured, acceptance, drafted_everywhere, evaluate, walked
from redrafter.proposers.recurrent import RecurrentProposer
from redrafter.targets.target import Target

FEW = tiny_model(vocab_size=9)
"""With such a small vocabulary, many tokens of a random drafter are accepted."""


SHORT = DraftShape(beam_width=3, beam_length=2)


def random_drafter(model, seed: int = 0, **changes) -> RecurrentDrafter:
    torch.manual_seed(seed)
    drafter = RecurrentDrafter.for_target(model, **({"beam_width": 3, "beam_length": 3} | changes))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return drafter


def followed(tree, tokens: list[int]) -> int:
    """How many of the tokens are on one path of a single tree."""
    node = 0
    for depth, token in enumerate(tokens):
        below = [n for n in range(1, int(tree.valid.sum())) if tree.parents[0, n] == node and tree.depth[0, n] > 0]
        node = next((n for n in below if tree.tokens[0, n] == token), -1)
        if node < 0:
            return depth
    return len(tokens)


def one_by_one(model, proposer, rows: list[Row], law: dict, seeds: list[int], from_start: bool):
    """Accepted and drafted tokens at every window, a forward and a draft for each."""
    found = []
    for row, seed in zip(rows, seeds, strict=True):
        ids, trained, own = row.input_ids, row.trained, []
        for t in range(-1 if from_start else 0, len(ids) - 2):
            if not (trained[t + 1] and trained[t + 2]):
                continue
            known = []
            for position in range(t + 2, min(t + 2 + proposer.length, len(ids))):
                if not trained[position]:
                    break
                known.append(ids[position])
            states = torch.zeros(1, 1, model.config.hidden_size)
            if t >= 0:
                states = model(input_ids=torch.tensor([ids[: t + 1]]), output_hidden_states=True).hidden_states[-1]
            noise = SamplingNoise()
            if law:
                positions = torch.arange(t + 2, t + 3 + proposer.length)[None]
                noise = sampled_noise(gumbel(torch.tensor([seed]), positions, model.config.vocab_size), **law)
            tree = proposer.propose(None, rooted(torch.tensor([ids[t + 1]])), states[:, -1:], noise)
            own.append((followed(tree, known), int(tree.valid.sum()) - 1))
        found.append(own)
    return found


rows_of_any_kind = st.lists(
    st.lists(st.tuples(st.integers(3, 8), st.sampled_from([True, True, True, False])), min_size=1, max_size=14),
    min_size=1,
    max_size=4,
)
"""Tokens, and whether each is trained."""


@settings(max_examples=25)
@given(
    rows_of_any_kind, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 3), st.sampled_from([1, 5, None]), st.integers(0, 2**31),
)  # fmt: skip
@torch.no_grad()
def test_counts_are_those_of_a_plain_loop(pairs, width, length, budgeted, less, sampled, batch_size, chunk, seed):
    rows = [Row([token for token, _ in row], [trained for _, trained in row]) for row in pairs]
    drafter = random_drafter(FEW, draft_vocabulary=torch.arange(3, 8) if less else None)
    target = Target(FEW)
    shape = DraftShape(beam_width=width, beam_length=length, node_budget=length + 3 if budgeted else None)
    proposer = RecurrentProposer(drafter, target, shape)
    seeds = [seed + number for number in range(len(rows))]
    how = {"seeds": seeds, "batch_size": batch_size, "chunk": chunk}
    law = {"temperature": 0.7} if sampled else {}
    if sampled:
        how["sampled_as"] = Decoded(0, [0], seed=0, budget=1, sampling=Sampling(True, **law))
    for from_start in (True, False):
        expected = one_by_one(FEW, proposer, rows, law, seeds, from_start)
        found = drafted_everywhere(target, proposer, rows, **how, from_start=from_start)
        assert [[tuple(pair) for pair in own.tolist()] for own in found] == expected

    flat = [pair for own in expected for pair in own]
    total = acceptance(target, proposer, rows, **how)
    assert total == Acceptance(
        drafts=len(flat),
        draft_tokens=sum(drafted for _, drafted in flat),
        accepted=sum(accepted for accepted, _ in flat),
        by_position=[sum(accepted > i for accepted, _ in flat) for i in range(length)],
    )
    assert total.mean_acceptance_length == pytest.approx(1 + sum(total.rates))


def counted(model, drafter, prompts, **settings) -> list[Acceptance]:
    """The drafts of every row, from the events of decoding."""
    events: list[list] = [[] for _ in prompts]
    for event in stream(model, drafter, prompts, **settings):
        events[event.row].append(event)
    length = settings.get("beam_length") or drafter.config.beam_length
    return [
        Acceptance(
            len(own),
            sum(event.drafted for event in own),
            sum(event.accepted for event in own),
            [sum(event.accepted > i for event in own) for i in range(length)],
        )
        for own in events
    ]


PROMPTS = [[5], [3, 7, 4, 8], [6, 6], list(range(3, 9)) * 3, [8, 3]]


@pytest.mark.parametrize("new_tokens", [1, 2, 12])
@pytest.mark.parametrize("shape", ["beams", "budget", "vocabulary", "context"])
def test_walked_counts_equal_those_of_decoding(shape, new_tokens):
    """Also if the last step accepts more tokens than the row may have."""
    forms = {
        "vocabulary": {"draft_vocabulary": torch.arange(2, 8)},
        "context": {"context_layers": (1,), "context_positions": 3},
    }
    drafter = random_drafter(FEW, **forms.get(shape, {}))
    drafting = {"beam_width": 3, "beam_length": 4, "node_budget": 7 if shape == "budget" else None, "lookup": False}
    common = {"max_new_tokens": new_tokens, "batch_size": 2}
    found = evaluate(FEW, drafter, PROMPTS, temperature=0.8, seed=11, **common, **drafting)
    modes = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.8, "seed": 11}}
    for mode, sampling in modes.items():
        assert [one.decoding for one in found[mode]] == counted(FEW, drafter, PROMPTS, **common, **drafting, **sampling)
        assert [one.walked for one in found[mode]] == [one.decoding for one in found[mode]]
        for one in found[mode]:
            assert one.tokens == new_tokens
            assert one.teacher_forced.drafts == new_tokens
        total = Measured.total(found[mode])
        assert total.tokens == 5 * new_tokens
        if new_tokens == 12:
            assert total.teacher_forced.by_position[1] > 0
            assert 0 < total.walked.accepted < total.teacher_forced.accepted, "otherwise the test would show nothing"
    assert new_tokens < 12 or found["greedy"] != found["sampled"]


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_rows_that_finish_early_or_fill_the_context(family):
    """With an end token, a sliding window, and position tables as long as the text."""
    length = {"n_positions": 24} if family == "gpt2" else {"max_position_embeddings": 24}
    model = tiny_model(family, vocab_size=9, seed=2, **length)
    drafter = random_drafter(model)
    model.generation_config.eos_token_id = 4
    found = evaluate(model, drafter, PROMPTS, max_new_tokens=200, temperature=20.0, seed=5)
    lengths = {one.tokens + len(prompt) for texts in found.values() for one, prompt in zip(texts, PROMPTS, strict=True)}
    assert 25 in lengths, "no row filled the context"
    assert len(lengths) > 3, "no row ended early"
    for texts in found.values():
        assert [one.walked for one in texts] == [one.decoding for one in texts]


def test_sampled_drafts_receive_the_noise_of_their_rows():
    """A drafter that computes the target's logits is always accepted then, and would not be with other noise."""
    model = tiny_model()
    for layer in model.model.layers:  # the target's logits depend on its last token only, so a drafter can compute them
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    drafter = RecurrentDrafter.for_target(model, beam_length=3, beam_width=1)
    drafter.step = lambda state, embedding: model.model.norm(embedding)
    drafter.logits = lambda context, state, read: model.lm_head(state)
    prompts = [[5], [7, 8]]
    for text in evaluate(model, drafter, prompts, max_new_tokens=41, seed=3, lookup=False)["sampled"]:
        assert text.walked == text.decoding == Acceptance(11, 33, 31, [11, 10, 10])
        assert text.teacher_forced == Acceptance(41, 123, 120, [41, 40, 39]), "the last drafts are longer than the text"


@torch.no_grad()
def test_rows_with_continuations_are_compared_with_those():
    proposer = RecurrentProposer(random_drafter(FEW), Target(FEW), SHORT)
    after = [[3, 4, 5], [6, 3, -1], [7, -1, -1], [5, 5, 8], [4, 4, 4], [3, 3, 3]]
    row = Row([5, 3, 7, 4, 8, 6], [False, True, True, True, True, False], after)
    drafts = []
    for t in (0, 1, 3):  # after 2 there is no token to draft, after 4 and 5 none is trained
        states = FEW(input_ids=torch.tensor([row.input_ids[: t + 1]]), output_hidden_states=True).hidden_states[-1]
        tree = proposer.propose(None, rooted(torch.tensor([after[t][0]])), states[:, -1:], SamplingNoise())
        drafts.append((followed(tree, [token for token in after[t][1:] if token >= 0]), int(tree.valid.sum()) - 1))
    (found,) = drafted_everywhere(Target(FEW), proposer, [row])
    assert [tuple(pair) for pair in found.tolist()] == drafts


def test_rows_without_a_window_and_no_rows_count_nothing():
    proposer = RecurrentProposer(random_drafter(FEW), Target(FEW), SHORT)
    rows = [Row([5], [True]), Row([5, 6, 7], [True, True, False])]
    for some in (rows, []):
        found = acceptance(Target(FEW), proposer, some)
        assert found == Acceptance(0, 0, 0, [0, 0])
        assert (found.mean_acceptance_length, found.rates) == (1.0, [0.0, 0.0])


def test_the_target_is_measured_without_dropout_and_its_mode_is_restored():
    model = tiny_model("gpt2", vocab_size=9, resid_pdrop=0.5, embd_pdrop=0.5)
    proposer = RecurrentProposer(random_drafter(model), Target(model), SHORT)
    rows = [Row([3, 5, 8, 4, 6, 7, 3, 3, 6, 5] * 3, [True] * 30)]
    expected = acceptance(Target(model), proposer, rows)
    model.train()
    assert acceptance(Target(model), proposer, rows) == expected
    assert model.training


def test_a_walk_continues_after_the_accepted_tokens_and_one_more():
    verdicts = torch.tensor([[2, 9], [0, 8], [1, 7], [0, 6], [3, 5], [1, 4], [0, 3], [0, 2]])
    assert walked(verdicts).tolist() == [[2, 9], [0, 6], [3, 5]]
    assert walked(verdicts[:0]).tolist() == []


def test_bad_settings_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: pytest.fail("it ran"))
    drafter = random_drafter(FEW)
    for settings_, word in (
        ({"temperature": 0.0}, "temperature"),
        ({"seed": -1}, "Seeds"),
        ({"beam_length": 0}, "beam_length"),
        ({"beam_width": 10}, "beam_width"),
    ):
        with pytest.raises(RedrafterError, match=word):
            evaluate(FEW, drafter, PROMPTS, **settings_)


def test_a_method_that_reads_the_text_receives_it_up_to_each_position():
    found = evaluate(FEW, PromptLookup(), PROMPTS, max_new_tokens=24, temperature=0.8, seed=11, batch_size=2)
    for texts in found.values():
        assert [one.walked for one in texts] == [one.decoding for one in texts]
        total = Measured.total(texts)
        assert 0 < total.walked.accepted < total.walked.draft_tokens


@pytest.mark.parametrize("copies", [1, 2**28])
def test_a_method_with_a_memory_receives_that_of_each_position(monkeypatch, copies):
    monkeypatch.setattr(evaluation, "MAX_MEMORY_BYTES", copies)
    draft = TwoModel(tiny_model(vocab_size=FEW.config.vocab_size, seed=1).double(), coupled=True)
    shape = {"max_new_tokens": 10, "beam_width": 2, "beam_length": 2}
    found = evaluate(FEW, draft, PROMPTS[:3], **shape, temperature=0.8, seed=11, batch_size=2)
    for texts in found.values():
        assert [one.walked for one in texts] == [one.decoding for one in texts]
        assert Measured.total(texts).walked.accepted > 0
