"""Drafts that are looked up in the text, alone and merged into those of every other method."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import AsksNothing, Given, greedy, prompts_read, tiny_model
from redrafter import EagleHead, MedusaHeads, PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate, stream
from redrafter.core.continuations import ACCEPTANCE
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import chain
from redrafter.engine.request import request
from redrafter.proposers import Proposer
from redrafter.proposers.prompt_lookup import LEAST_ON_CPU, LookupProposer, with_lookup
from redrafter.targets.target import Target

MODEL = tiny_model()
KINDS = ["recurrent", "medusa", "eagle", "two models"]
LAWS = {"greedy": {}, "sampled": {"do_sample": True, "seed": 3, "temperature": 0.8}}
MANY = [[5, 9, 12, 5, 9], [7], [30, 31, 32, 33, 34] * 3, [8, 8], [11], [40, 41, 42], [3] * 9]


def path_of(tree, row: int, node: int) -> tuple[int, ...]:
    """The drafted tokens from the root to a node."""
    above = () if node == 0 else path_of(tree, row, int(tree.parents[row, node]))
    return above if node == 0 else (*above, int(tree.tokens[row, node]))


def random_method(kind: str, model):
    """A drafting method with random weights, and its shape."""
    torch.manual_seed(5)
    if kind == "two models":
        return TwoModel(tiny_model(vocab_size=model.config.vocab_size, seed=4)), {"beam_width": 2, "beam_length": 3}
    if kind == "medusa":
        head = MedusaHeads.fresh(model, heads=3)
    elif kind == "eagle":
        head = EagleHead.fresh(model, beam_width=3, beam_length=3)
    else:
        head = RecurrentDrafter.for_target(model, beam_width=3, beam_length=3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return head, {}


@pytest.mark.parametrize("budget", [None, 5, 16])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_drafts_leave_the_text_unchanged(kind, law, budget):
    """While rows of several lengths enter and leave."""
    model = tiny_model(vocab_size=9)
    method, shape = random_method(kind, model)
    prompts = [[t % 9 for t in prompt] for prompt in MANY]
    told = {"max_new_tokens": 24, "batch_size": 3, "eos_token_id": greedy(model, prompts[2], 12)[5], **LAWS[law]}
    if budget is not None:
        shape = shape | {"node_budget": budget}
    alone = generate(model, method, prompts, lookup=False, **told, **shape)
    out = generate(model, method, prompts, **told, **shape)
    assert out.new_tokens == alone.new_tokens == generate(model, None, prompts, **told).new_tokens
    if budget is None:
        assert out.stats.tokens_per_step > alone.stats.tokens_per_step


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_repeats_itself_takes_fewer_steps_than_with_the_head_alone(kind):
    model, prompt = circling()
    method, shape = random_method(kind, model)
    alone = generate(model, method, [prompt], max_new_tokens=44, lookup=False, **shape)
    out = generate(model, method, [prompt], max_new_tokens=44, **shape)
    assert out.new_tokens == alone.new_tokens
    assert out.stats.steps == 4, "four steps of 10 + 1"
    assert alone.stats.steps > 8


def test_a_proposer_without_probabilities_is_refused():
    class Bare(Proposer):
        length, size = 3, 4

        def propose(self, memory, rows, context, noise):
            return chain(rows.root[:, None])

    merged = with_lookup(Bare(), DraftShape(beam_width=1, beam_length=3).with_lookup())
    with pytest.raises(RedrafterError, match="Bare returns trees without log_probs"):
        generate(MODEL, Given(merged), [[5]], max_new_tokens=4)


def test_a_chain_is_the_best_continuation():
    text = torch.tensor([[3, 4, 5, 6, 3, 4, 7, 8, 3, 4, 0, 0]])
    none = torch.zeros(1, dtype=torch.long)
    rows = RowState(none, none, text, length=none + 9, alive=none + 1)
    for width, paths in ((1, {(7,), (7, 8), (7, 8, 3)}), (2, {(7,), (7, 8), (7, 8, 3), (5,), (5, 6), (5, 6, 3)})):
        proposer = PromptLookup().proposer(Target(MODEL), DraftShape(beam_width=width, beam_length=3))
        tree = proposer.propose(None, rows, torch.zeros(1, 1, 4), SamplingNoise())
        assert tree.size == proposer.size == 1 + 3 * width
        assert {path_of(tree, 0, node) for node in range(1, int(tree.valid.sum()))} == paths


def test_on_a_cpu_unlikely_nodes_are_left_out():
    """The last token alone occurred before, so that every further token is less likely."""
    text = torch.tensor([[3, *range(10, 30), 3]])
    none = torch.zeros(1, dtype=torch.long)
    rows = RowState(none, none, text, length=none + 21, alive=none + 1)
    likely = [math.prod(ACCEPTANCE[1 : depth + 1]) >= LEAST_ON_CPU for depth in range(1, 11)]
    assert 0 < sum(likely) < 10
    for width in (1, 2):  # a chain is made in another way
        tree = PromptLookup().proposer(Target(MODEL), DraftShape(beam_width=width, beam_length=10)).propose(
            None, rows, torch.zeros(1, 1, 4), SamplingNoise()
        )  # fmt: skip
        assert tree.tokens[0, tree.valid[0]].tolist() == [3, *range(10, 10 + sum(likely))]


def test_on_a_cpu_drafts_see_the_used_part_of_the_texts_alone():
    seen = []

    class Looking(LookupProposer):
        def propose(self, memory, rows, context, noise):
            seen.append((rows.text.shape[1], int(rows.length.max())))
            return super().propose(memory, rows, context, noise)

    prompts = [[5, 9, 12, 5, 9], [7]]
    out = generate(MODEL, Given(Looking(None, length=4, size=5)), prompts, max_new_tokens=20)
    assert out.new_tokens == generate(MODEL, None, prompts, max_new_tokens=20).new_tokens
    assert all(width == longest + 5 for width, longest in seen)
    assert len({width for width, _ in seen}) > 1


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 12), st.integers(1, 4), st.sampled_from(list(LAWS)), st.integers(1, 4),
)  # fmt: skip
def test_the_text_is_that_of_the_target_alone(prompts, length, ngram, law, batch_size):
    told = {"max_new_tokens": 14, "batch_size": batch_size, **LAWS[law]}
    out = generate(MODEL, PromptLookup(ngram), prompts, beam_length=length, **told)
    assert out.new_tokens == generate(MODEL, None, prompts, **told).new_tokens
    if law == "greedy":
        assert out.new_tokens == [greedy(MODEL, prompt, 14) for prompt in prompts]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_rows_of_a_batch_come_and_go(family, law):
    model = tiny_model(family, vocab_size=9)
    prompts = [[t % 9 for t in prompt] for prompt in MANY]
    told = {"max_new_tokens": 20, "eos_token_id": greedy(model, prompts[2], 12)[5], **LAWS[law]}
    out = generate(model, PromptLookup(), prompts, batch_size=3, **told)
    assert out.new_tokens == generate(model, None, prompts, **told).new_tokens
    assert 0 < out.stats.accepted < out.stats.drafted < 10 * out.stats.steps, "chains of several lengths"


def circling():
    """A model whose text runs in a circle, and a prompt that has run through it."""
    model = tiny_model()
    for layer in model.model.layers:  # it looks at its last token alone
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    new = greedy(model, [5], 100)
    circle = new[::-1].index(new[-1], 1)
    assert circle <= 20, "a circle too long for the prompt"
    return model, [5, *new[:60]]


def test_a_text_that_repeats_itself_is_drafted_whole():
    """What it wrote before tells what it writes next."""
    model, prompt = circling()
    out = generate(model, PromptLookup(), [prompt], max_new_tokens=45, beam_length=10)
    assert out.stats.accepted_by_position == [5] + [4] * 9  # four steps of 10 + 1, then one token


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_draft_asks_the_device_nothing(kind, law):
    method, shape = (PromptLookup(), {}) if kind == "none" else random_method(kind, MODEL)
    asked = request(MODEL, method, [[5, 9, 12], [7]], max_new_tokens=6, **LAWS[law], **shape)
    decoder, state = asked.decoder, prompts_read(asked).state
    with torch.inference_mode():
        noise = asked.sampler.noise(state.rows, depths=decoder.length + 1, vocabulary=61)
        with AsksNothing():
            decoder.proposer.propose(state.memory, state.rows, state.context, noise)


@pytest.mark.parametrize(
    ("method", "told", "sentence"),
    [
        (PromptLookup(), {"beam_length": -1}, "beam_length must be at least 1, or 0 to decode without drafting"),
        (PromptLookup(), {"lookup": True}, "leave out lookup"),
        (PromptLookup(0), {}, "ngram must lie between 1 and 16, not 0"),
    ],
)
def test_unsupported_settings_are_refused(method, told, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        stream(MODEL, method, [[5]], **told)


def test_no_drafting_is_a_length_of_zero():
    assert request(MODEL, PromptLookup(), [[5]], beam_length=0).decoder.proposer is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_on_a_gpu_a_step_is_one_graph(captured, kind, law):
    model = tiny_model(vocab_size=9)
    method, shape = (PromptLookup(), {}) if kind == "none" else random_method(kind, model)
    method = TwoModel(method.model.cuda()) if kind == "two models" else method if kind == "none" else method.cuda()
    prompts = [[t % 9 for t in prompt] for prompt in MANY]
    told = {"max_new_tokens": 41, "batch_size": 3, **LAWS[law]}
    out = generate(model.cuda(), method, prompts, **told, **shape)
    assert captured[-1].refused is None
    assert out.stats.accepted > 0
    assert out.new_tokens == generate(model, None, prompts, fast=False, **told).new_tokens
