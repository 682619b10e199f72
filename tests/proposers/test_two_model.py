"""Drafts by another model are those of its plain forward over the text, however rows come, go and are accepted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import LAWS, MANY, SHAPES, check_every_draft, shaped

from conftest import AsksNothing, greedy, prompts_read, read_in_parts, tiny_model
from redrafter import RedrafterError, TwoModel, generate, stream
from redrafter.core.shapes import DraftShape
from redrafter.engine.request import request
from redrafter.targets.target import Target

MODEL, OTHER = tiny_model(), tiny_model(seed=1, num_hidden_layers=1)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 9), st.sampled_from(list(LAWS)), st.booleans(),
    st.integers(1, 4), st.sampled_from([MODEL, OTHER]),
)  # fmt: skip
def test_the_text_is_that_of_the_target_alone(prompts, width, length, spare, law, coupled, batch_size, draft):
    told = {"max_new_tokens": 14, "batch_size": batch_size, **LAWS[law]}
    budget = length + spare if spare else None
    out = generate(MODEL, TwoModel(draft, coupled=coupled), prompts, **told, **shaped(width, length, budget))
    assert out.new_tokens == generate(MODEL, None, prompts, **told).new_tokens
    if law == "greedy":
        assert out.new_tokens == [greedy(MODEL, prompt, 14) for prompt in prompts]


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("law", LAWS)
def test_a_target_that_drafts_for_itself_past_its_window_is_always_right(family, law):
    model = tiny_model(family, **({"sliding_window": 6} if family == "mistral" else {})).double()
    prompts = [list(range(3, 23)), [9, 8, 7], [4]]
    told = {"max_new_tokens": 25, **LAWS[law]}
    out = generate(model, TwoModel(model, coupled=True), prompts, beam_length=3, lookup=False, **told)
    assert out.new_tokens == generate(model, None, prompts, **told).new_tokens
    assert out.stats.accepted_by_position == [21, 18, 18]  # three rows: six steps of 3 + 1, then one token
    other = TwoModel(tiny_model("llama", seed=4).double())
    assert generate(model, other, prompts, beam_length=3, **told).new_tokens == out.new_tokens


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("part", [2, 512])
def test_nothing_is_forgotten_when_rows_come_and_go(monkeypatch, law, part):
    """A perfect draft model is never wrong, in whatever slot, after whatever row, as long as it saw the whole text."""
    read_in_parts(monkeypatch, part, part)
    model = tiny_model().double()
    drafter = TwoModel(model, coupled=True)
    told = {"max_new_tokens": 16, "batch_size": 3, "eos_token_id": greedy(model, MANY[2], 12)[3], **LAWS[law]}
    events = list(stream(model, drafter, MANY, beam_length=4, lookup=False, **told))
    lengths = {len(event.tokens) for event in events if event.finish_reason is None and event.drafted}
    assert lengths == {5}, "only a row's end cuts a draft short"
    written = [[t for event in events if event.row == row for t in event.tokens] for row in range(len(MANY))]
    assert written == generate(model, None, MANY, **told).new_tokens
    assert len({len(new) for new in written}) > 1, "rows end at different times"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("coupled", [False, True])
@torch.no_grad()
def test_every_draft_is_that_of_a_plain_search(shape, law, coupled):
    draft = tiny_model(vocab_size=9, seed=1).double()
    model = tiny_model(vocab_size=9, spread=0.3).double()

    def following_of(text):
        """By a forward of the whole text."""
        return lambda tokens: draft(input_ids=torch.tensor([[*text, *tokens]])).logits[0, -1]

    told = {"max_new_tokens": 9, "batch_size": 2, **LAWS[law]}
    check_every_draft(model, TwoModel(draft, coupled), following_of, shape, coupled=coupled, **told)


def test_known_noise_is_worth_something():
    """Ranked by its own probabilities alone even a perfect draft model cannot know what the target will draw."""
    told = {"max_new_tokens": 30, "do_sample": True, "seed": 5, "temperature": 1.5}
    accepted = [
        generate(MODEL, TwoModel(MODEL, coupled=coupled), MANY, lookup=False, **told).stats.accepted
        for coupled in (False, True)
    ]
    assert 0 < accepted[0] < accepted[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_draft_model_of_a_shorter_context_changes_no_text(family):
    size = "n_positions" if family == "gpt2" else "max_position_embeddings"
    draft = tiny_model(family, **{size: 16})
    prompts = [list(range(3, 33)), [5, 6]]
    for law in LAWS.values():
        out = generate(MODEL, TwoModel(draft), prompts, max_new_tokens=40, beam_width=2, **law)
        assert out.new_tokens == generate(MODEL, None, prompts, max_new_tokens=40, **law).new_tokens
        assert out.stats.drafted > 0


def test_the_models_context_is_used_to_its_last_slot():
    model = tiny_model(max_position_embeddings=24)
    for length in (15, 23, 24):
        prompt = list(range(3, 3 + length))
        out = generate(model, TwoModel(model), [prompt, [5]], max_new_tokens=50, beam_width=2)
        assert out.new_tokens == generate(model, None, [prompt, [5]], max_new_tokens=50).new_tokens
        assert len(out.new_tokens[0]) == 25 - length


def test_processors_that_see_the_text_are_heeded():
    told = {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    out = generate(MODEL, TwoModel(OTHER), MANY, beam_width=2, batch_size=3, **told)
    assert out.new_tokens == generate(MODEL, None, MANY, **told).new_tokens


def test_the_draft_model_drafts_without_dropout_and_is_put_back():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    target = tiny_model("gpt2")
    assert not target.training
    out = generate(target, TwoModel(model), [[5, 9]], max_new_tokens=25, beam_length=3, lookup=False)
    assert out.stats.accepted_by_position == [7, 6, 6]  # of equal weights
    assert model.training


@pytest.mark.parametrize("law", LAWS)
def test_a_draft_asks_the_device_nothing(law):
    asked = request(
        MODEL,
        TwoModel(OTHER, coupled=True),
        [[5, 9, 12], [7]],
        beam_width=3,
        node_budget=9,
        max_new_tokens=6,
        **LAWS[law],
    )
    decoder, state = asked.decoder, prompts_read(asked).state
    with torch.inference_mode():
        noise = asked.sampler.noise(state.rows, depths=decoder.length + 1, vocabulary=61)
        with AsksNothing():
            decoder.proposer.propose(state.memory, state.rows, state.context, noise)


def test_a_step_runs_the_draft_model_as_often_as_the_draft_is_long(monkeypatch):
    sizes = []
    run = Target.forward

    def counted(self, tree, *args, **kwargs):
        sizes.append((self.model is OTHER, tree.size))
        return run(self, tree, *args, **kwargs)

    shape = DraftShape(beam_width=2, beam_length=4)
    asked = request(MODEL, TwoModel(OTHER), [[5, 9, 12]], shape=shape, max_new_tokens=6)
    steps = prompts_read(asked)
    monkeypatch.setattr(Target, "forward", counted)
    with steps.running():
        steps.decoders[1].step(steps.state, asked.sampler)
    assert sizes[:-1] == [(True, 5), (True, 3), (True, 5), (True, 7)]
    assert not sizes[-1][0]


@pytest.mark.parametrize(
    ("draft", "told", "sentence"),
    [
        (tiny_model(vocab_size=60), {}, "a vocabulary of 60 tokens, the model one of 61; they must be the same"),
        (tiny_model("mamba"), {}, "MambaForCausalLM cannot verify draft trees: it keeps a recurrent state"),
        (OTHER, {"beam_length": -1}, "beam_length must be at least 1, or 0 to decode without drafting, not -1"),
        (OTHER, {"beam_width": 62}, "beam_width must lie between 1 and the drafter's 61 tokens, not 62"),
        (OTHER, {"node_budget": 5}, "node_budget must hold the root and 5 drafted tokens, not be 5"),
        (torch.nn.Linear(2, 2), {}, "Linear is not a transformers model"),
    ],
)
def test_what_cannot_draft_is_refused_in_a_sentence(draft, told, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        stream(MODEL, TwoModel(draft), [[5]], **told)


def test_a_draft_model_elsewhere_is_refused(monkeypatch):
    init = Target.__init__

    def elsewhere(self, model, layers=()):
        init(self, model, layers)
        if model is OTHER:
            self.device = torch.device("meta")

    monkeypatch.setattr(Target, "__init__", elsewhere)
    with pytest.raises(RedrafterError, match="The draft model is on meta, the model on cpu; move one of them"):
        stream(MODEL, TwoModel(OTHER), [[5]])


def test_a_draft_model_that_is_moved_meanwhile_is_told():
    draft = tiny_model()
    events = stream(MODEL, TwoModel(draft), [[5, 9]], max_new_tokens=20)
    next(events)
    draft.double()
    with pytest.raises(RedrafterError, match="or its drafter was moved or converted during generation"):
        list(events)


def test_no_drafting_is_a_length_of_zero():
    assert request(MODEL, TwoModel(OTHER), [[5]], beam_length=0).decoder.proposer is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("law", LAWS)
def test_on_a_gpu_a_step_is_one_graph_and_nothing_is_forgotten(captured, family, shape, law):
    model = tiny_model(family, **({"sliding_window": 6} if family == "mistral" else {})).cuda()
    told = {"max_new_tokens": 41, "batch_size": 3, **LAWS[law]}
    plain = generate(model, None, MANY, fast=False, **told)
    for draft in (model, tiny_model(seed=1).cuda()):
        out = generate(model, TwoModel(draft, coupled=True), MANY, **told, **shaped(*shape))
        assert out.new_tokens == plain.new_tokens
        assert captured[-1].refused is None
        if draft is model and shape[0] == 1:
            assert out.stats.steps == len(MANY) * -(-41 // (shape[1] + 1))
    slow = generate(model, TwoModel(model, coupled=True), MANY, fast=False, **told, **shaped(*shape))
    assert slow.new_tokens == plain.new_tokens


def test_the_memory_is_freed_with_the_last_event(monkeypatch):
    import gc
    import weakref

    caches = []
    new_cache = Target.new_cache

    def kept(self, **sizes):
        cache = new_cache(self, **sizes)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Target, "new_cache", kept)
    gc.disable()
    try:
        events = stream(MODEL, TwoModel(OTHER), [[5, 9], [7], [8]], max_new_tokens=5, batch_size=2)
        assert len(list(itertools.islice(events, 3))) == 3
        assert len(caches) >= 2
        events.close()
        assert [alive() for alive in caches] == [None] * len(caches)
    finally:
        gc.enable()
