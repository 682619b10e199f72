"""The law of what is drawn, and processors over trees against processors over texts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Given, greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, TwoModel, generate
from redrafter.core.rows import RowState
from redrafter.core.tree import prefix_tree
from redrafter.decoding.state import State
from redrafter.engine.request import request
from redrafter.proposers import Proposer
from redrafter.targets.target import Target
from redrafter.training.loss import unrolled_loss

MODEL = tiny_model()

LAWS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
]


def place(texts: list[list[int]], rows: list, *, spare: int = 9) -> RowState:
    """Rows of a request, whose trees stand at the last token of their texts."""
    longest = max(map(len, texts)) + spare
    with torch.inference_mode():
        state = State.empty(Target(MODEL), [None], batch=len(texts), slots=longest).with_bias(61)
        state.enter(dict(enumerate(rows)))
    return RowState(
        row=torch.arange(len(texts)),
        seed=torch.arange(len(texts)) + 5,
        text=torch.tensor([text + [60] * (longest - len(text)) for text in texts]),  # what follows is not defined
        length=torch.tensor([len(text) - 1 for text in texts]),
        alive=torch.ones(len(texts), dtype=torch.long),
        settings=state.rows.settings,
    )


def theirs(told: dict, prompt: list[int]):
    """`(text [1, T], scores [1, V]) -> scores` by transformers' own processors for a row alone."""
    told = dict(told)
    presence, frequency = told.pop("presence_penalty", 0.0), told.pop("frequency_penalty", 0.0)

    def occurrence(text, scores):
        scores = scores.clone()
        new = text[0, len(prompt) :].tolist()
        for token in set(new):
            scores[0, token] -= presence + frequency * new.count(token)
        return scores

    bias = told.pop("logit_bias", {})
    config = transformers.GenerationConfig(**({"top_k": 0} | told))
    if bias:
        config.sequence_bias = [[[token], value] for token, value in bias.items()]
    return MODEL._get_logits_processor(
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([prompt]),
        logits_processor=[occurrence],
        device="cpu",
    )


def along(tree, row: int, node: int) -> list[int]:
    """The tokens from below the root down to a node."""
    tokens: list[int] = []
    while node:
        tokens.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return tokens


PROCESSORS = [
    *({"do_sample": True} | law for law in LAWS),
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "do_sample": True, "temperature": 0.8, "suppress_tokens": [3, 4]},
    {"no_repeat_ngram_size": 1, "repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "do_sample": True, "top_p": 0.9},
    {"presence_penalty": 2.0, "frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "frequency_penalty": 0.2, "repetition_penalty": 1.3, "do_sample": True, "top_k": 9},
    {"presence_penalty": 2.0, "frequency_penalty": -0.7, "no_repeat_ngram_size": 3},
    {"sequence_bias": [[[5], 3.0], [[7, 8], -4.0]], "renormalize_logits": True},
    {"logit_bias": {5: 3.0, 7: -4.0}},
    {"logit_bias": {5: 3.0, 7: -4.0}, "repetition_penalty": 1.7, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    {"logit_bias": {9: 5.0}, "no_repeat_ngram_size": 2, "do_sample": True, "min_p": 0.1},
    {"do_sample": True, "temperature": 0.7, "typical_p": 0.6, "suppress_tokens": [3, 4]},
    {"suppress_tokens": [3, 4]},
]


@pytest.mark.parametrize("told", PROCESSORS)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_processors_over_a_tree_are_transformers_over_the_text_of_each_node(told, seed):
    generator = torch.Generator().manual_seed(seed)
    texts, prompts = [[5, 9, 12, 7, 7], [7], [30, 31]], [[5, 9, 12], [7], [30]]
    root = torch.tensor([text[-1] for text in texts])
    tree = prefix_tree(root, torch.randint(3, 12, (3, 3, 2), generator=generator))
    logits = torch.randn(3, tree.size, 61, generator=generator) * 3
    asked = request(MODEL, None, prompts, **told)
    sampler = asked.sampler
    here = place(texts, asked.rows)
    draw = sampler.noise(here, depths=3, vocabulary=61)
    choice = sampler.choose(draw, tree, logits.clone(), here)
    walked = bool(sampler.own)  # if some processor must see the text
    of_text = {"no_repeat_ngram_size", "sequence_bias"} & told.keys()
    assert walked == bool(of_text or {"repetition_penalty", "suppress_tokens"} <= told.keys())
    visited = 0
    for row, node in itertools.product(range(3), range(tree.size)):
        if not tree.valid[row, node] or choice.tokens[row, node] < 0:
            continue
        visited += 1
        text = torch.tensor([texts[row] + along(tree, row, node)])
        score = theirs(told, prompts[row])(text, logits[row, node][None])
        torch.testing.assert_close(choice.scores[row, node], score[0])
        if draw.gumbel is not None:
            score = score + draw.gumbel[row, tree.depth[row, node]]
        assert choice.tokens[row, node] == score.argmax()
        if walked and node:
            above = tree.parents[row, node]
            assert choice.tokens[row, above] == tree.tokens[row, node], "the walk goes where the choice goes"
    assert visited == (visited if walked else int(tree.valid.sum()))
    assert visited >= 3


@pytest.mark.parametrize("law", LAWS)
def test_the_law_is_that_of_transformers(law):
    config = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | law))
    expected = MODEL._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    logits = torch.randn(6, 61, generator=torch.Generator().manual_seed(0)) * 3
    asked = request(MODEL, None, [[5]], do_sample=True, **law)
    draw = asked.sampler.noise(place([[5]], asked.rows), depths=2, vocabulary=61)
    torch.testing.assert_close(draw.warp(logits[None])[0], expected(torch.ones(6, 3, dtype=torch.long), logits))


@pytest.mark.parametrize("drafting", [False, True])
def test_rows_that_have_ended_call_no_processor(drafting):
    seen, prompts = [], [[5, 6], [7]]

    class Watch(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores

    end = greedy(MODEL, prompts[1], 3)[2]
    told = {"max_new_tokens": 9, "eos_token_id": end, "logits_processor": [Watch()]}
    out = generate(MODEL, TwoModel(MODEL) if drafting else None, prompts, **told)
    assert sorted(map(len, out.new_tokens))[0] < 9
    pairs = zip(prompts, out.new_tokens, strict=True)
    assert sorted(seen) == sorted(prompt + new[:count] for prompt, new in pairs for count in range(len(new)))


class Least(Proposer):
    """Proposes the tokens that the drafter thinks least likely."""

    length, size, positions, modules = 2, 5, 1, ()

    def propose(self, memory, place, context, draw):
        return prefix_tree(place.root, torch.tensor([[[7, 6], [6, 7]]]).expand(len(context), 2, 2))


def trained(model, drafter: RecurrentDrafter) -> RecurrentDrafter:
    """A drafter that has learnt what the model draws, from its own texts."""
    torch.manual_seed(1)
    starts = torch.randint(0, 8, (256, 1))
    texts = generate(model, None, starts, max_new_tokens=7, do_sample=True, seed=3, eos_token_id=()).sequences
    target, learns = Target(model), torch.ones_like(texts, dtype=torch.bool)
    with torch.no_grad():
        hidden = target.hidden_states(texts, learns.long())
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        unrolled_loss(drafter, lambda t: target.embed(t).detach(), hidden, texts, learns, length=2).backward()
        optimizer.step()
    return drafter.eval()


@pytest.mark.parametrize("drafting", ["none", "untrained", "trained", "adversarial"])
def test_the_joint_law_of_three_tokens(drafting):
    """Total variation from the enumerated law, within five deviations of what exact sampling shows: odds below 1e-5."""
    model = tiny_model(vocab_size=8, spread=0.2)
    prompt, n = [3, 5], 4000
    outcomes = list(itertools.product(range(8), repeat=3))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + list(outcome) for outcome in outcomes])).logits
        law = logits[:, 1:4].log_softmax(-1).gather(2, torch.tensor(outcomes)[..., None]).sum((1, 2)).exp().double()
    law = (law / law.sum()).numpy()
    torch.manual_seed(0)
    drafter = None if drafting == "none" else RecurrentDrafter.for_target(model, beam_length=2)
    if drafting == "trained":
        drafter = trained(model, drafter)
    if drafting == "adversarial":
        drafter = Given(Least())
    width = {"beam_width": 3} if drafting in ("untrained", "trained") else {}
    out = generate(model, drafter, [prompt] * n, max_new_tokens=3, do_sample=True, seed=11, eos_token_id=(), **width)
    counts = np.zeros(512)
    for a, b, c in out.new_tokens:
        counts[64 * a + 8 * b + c] += 1
    distance = abs(counts / n - law).sum() / 2
    exact = abs(np.random.default_rng(0).multinomial(n, law, size=400) / n - law).sum(axis=1) / 2
    assert distance < exact.mean() + 5 * exact.std()
    assert exact.mean() + 5 * exact.std() < abs(np.roll(law, 1) - law).sum() / 4, "the test can tell a wrong law"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for no limit, not -1"),
        ({"typical_p": 0.0}, r"typical_p must be in"),
        ({"eta_cutoff": 1.0}, r"eta_cutoff must be in"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, not 0"),
        ({"top_p": 0.0}, r"top_p must be in"),
        ({"top_p": 1.5}, r"top_p must be in"),
        ({"min_p": -0.1}, r"min_p must be in"),
        ({"seed": -1}, "-1 does not"),
        ({"seed": 2**63}, "between 0 and 2"),
        ({"seed": [1, 2]}, "There are 1 rows and 2 seeds"),
    ],
)
def test_impossible_values_are_refused(values, sentence):
    model = tiny_model()
    with pytest.raises(RedrafterError, match=sentence):
        generate(model, None, [[5]], do_sample=True, **values)


@pytest.mark.parametrize("values", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"seed": 3}])
def test_what_greedy_decoding_would_not_heed_is_refused(values):
    (name,) = values
    with pytest.raises(RedrafterError, match=f"{name} .*in greedy"):
        generate(tiny_model(), None, [[5]], **values)
