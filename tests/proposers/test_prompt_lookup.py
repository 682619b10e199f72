"""Chains that are looked up in the text, against a plain search with lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import AsksNothing, greedy, prompts_read, tiny_model
from redrafter import PromptLookup, RedrafterError, generate, stream
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.tree import ancestors_of
from redrafter.engine.request import request
from redrafter.proposers.prompt_lookup import PromptLookupProposer

MODEL = tiny_model()
LAWS = {"greedy": {}, "sampled": {"do_sample": True, "seed": 3, "temperature": 0.8}}
MANY = [[5, 9, 12, 5, 9], [7], [30, 31, 32, 33, 34] * 3, [8, 8], [11], [40, 41, 42], [3] * 9]


def looked_up(text: list[int], length: int, ngram: int) -> list[int]:
    """Plain reference: longest n-gram first, its occurrences from the left."""
    for size in range(min(ngram, len(text) - 1), 0, -1):
        for begin in range(len(text) - size):
            if text[begin : begin + size] == text[-size:]:
                return text[begin + size : begin + size + length]
    return []


texts = st.lists(st.integers(3, 6), min_size=1, max_size=16)


@settings(max_examples=200)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 5))
def test_agrees_with_the_plain_search(rows, length, ngram, spare):
    """What stands behind a text is not looked at."""
    slots = max(map(len, rows)) + spare
    text = torch.full((len(rows), slots), 3)
    for row, tokens in enumerate(rows):
        text[row, : len(tokens)] = torch.tensor(tokens)
    none = torch.zeros(len(rows), dtype=torch.long)
    end = torch.tensor([len(tokens) - 1 for tokens in rows])
    place = RowState(none, none, text, length=end, alive=none + 1)
    tree = PromptLookupProposer(length, ngram).propose(None, place, torch.zeros(len(rows), 1, 4), SamplingNoise())
    assert tree.size == length + 1
    assert tree.tokens[:, 0].tolist() == [tokens[-1] for tokens in rows]
    for row, tokens in enumerate(rows):
        expected = looked_up(tokens, length, ngram)
        count = 1 + len(expected)
        assert tree.valid[row].tolist() == [True] * count + [False] * (length + 1 - count)
        assert tree.tokens[row, 1:count].tolist() == expected
        assert tree.depth[row].tolist() == [*range(count), *[0] * (length + 1 - count)]
        assert tree.parents[row].tolist() == [0, *range(count - 1), *[0] * (length + 1 - count)]
    assert tree.ancestors.equal(ancestors_of(tree.parents, max_depth=length))


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


def test_a_text_that_repeats_itself_is_drafted_whole():
    """What it wrote before tells what it writes next."""
    model = tiny_model()
    for layer in model.model.layers:  # it looks at its last token alone, so its text runs in a circle
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    new = greedy(model, [5], 100)
    circle = new[::-1].index(new[-1], 1)
    assert circle <= 20, "a circle too long for the prompt"
    prompt = [5, *new[:60]]
    out = generate(model, PromptLookup(), [prompt], max_new_tokens=45, beam_length=10)
    assert out.stats.accepted_by_position == [5] + [4] * 9  # four steps of 10 + 1, then one token


@pytest.mark.parametrize("law", LAWS)
def test_a_draft_asks_the_device_nothing(law):
    asked = request(MODEL, PromptLookup(), [[5, 9, 12], [7]], max_new_tokens=6, **LAWS[law])
    decoder, state = asked.decoder, prompts_read(asked).state
    with torch.inference_mode():
        noise = asked.sampler.noise(state.rows, depths=decoder.length + 1, vocabulary=61)
        with AsksNothing():
            decoder.proposer.propose(state.memory, state.rows, state.context, noise)


@pytest.mark.parametrize(
    ("method", "told", "sentence"),
    [
        (PromptLookup(), {"beam_width": 4}, "Prompt lookup drafts one beam, not 4: leave out beam_width"),
        (PromptLookup(), {"node_budget": 40}, "supports no node_budget"),
        (PromptLookup(), {"beam_length": -1}, "beam_length must be at least 1, or 0 to decode without drafting"),
        (PromptLookup(0), {}, "ngram must be at least 1, not 0"),
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
def test_on_a_gpu_a_step_is_one_graph(captured, law):
    model = tiny_model(vocab_size=9).cuda()
    prompts = [[t % 9 for t in prompt] for prompt in MANY]
    told = {"max_new_tokens": 41, "batch_size": 3, **LAWS[law]}
    out = generate(model, PromptLookup(), prompts, **told)
    assert captured[-1].refused is None
    assert out.stats.accepted > 0
    assert out.new_tokens == generate(model, None, prompts, fast=False, **told).new_tokens
