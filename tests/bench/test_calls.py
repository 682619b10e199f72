"""Complete calls: what their time includes, and that every answer has the length that it should have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import MaxLengthCriteria

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.bench import calls
from redrafter.bench.calls import call, call_transformers

MODEL = tiny_model()
PROMPT = [5, 9, 12]


@pytest.fixture
def ticks(monkeypatch):
    """The clock advances by one second each time it is read."""
    count = itertools.count()
    monkeypatch.setattr(calls, "time", SimpleNamespace(perf_counter=lambda: float(next(count))))


@pytest.fixture
def drafter():
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=40)


def test_a_call_lasts_from_its_begin_to_its_return(ticks):
    for one in (call(MODEL, None, PROMPT, 6, do_sample=False), call_transformers(MODEL, PROMPT, 6, do_sample=False)):
        # begin, first token, five steps, end
        assert (one.seconds, one.first, one.starting, one.decoding, one.tokens) == (7.0, 1.0, 0.0, 6.0, 5)


def test_the_first_steps_on_a_gpu_are_part_of_the_call_and_not_of_decoding(ticks, monkeypatch):
    monkeypatch.setattr(calls, "untimed", lambda device: 3)
    for one in (call(MODEL, None, PROMPT, 6, do_sample=False), call_transformers(MODEL, PROMPT, 6, do_sample=False)):
        assert (one.seconds, one.first, one.starting, one.decoding, one.tokens) == (7.0, 1.0, 3.0, 3.0, 2)
    short = call(MODEL, None, PROMPT, 2, do_sample=False)
    assert (short.seconds, short.starting, short.tokens) == (3.0, 1.0, 0)


def test_steps_of_a_drafted_call_are_counted_in_tokens(ticks, drafter):
    stats = generate(MODEL, drafter, [PROMPT], max_new_tokens=20).stats
    assert stats.accepted > 0
    one = call(MODEL, drafter, PROMPT, 20, do_sample=False)
    assert one.tokens == 20 - 1
    assert one.seconds == 1 + stats.steps


@pytest.mark.parametrize("law", [{"do_sample": False}, {"do_sample": True, "temperature": 1.0, "seed": 3}])
def test_no_end_token_shortens_an_answer(monkeypatch, drafter, law):
    text = greedy(MODEL, PROMPT, 20)
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", sorted(set(text[1:])))
    if not law["do_sample"]:
        assert len(generate(MODEL, None, [PROMPT], max_new_tokens=20).new_tokens[0]) < 20
    written = []
    plain = MODEL.generate

    def watched(*args, **told):
        found = plain(*args, **told)
        written.append(found[0, len(PROMPT) :].tolist())
        return found

    monkeypatch.setattr(MODEL, "generate", watched)
    before = torch.get_rng_state()
    assert call(MODEL, drafter, PROMPT, 20, **law).tokens == 19
    assert call(MODEL, None, PROMPT, 20, **law).tokens == 19
    assert call_transformers(MODEL, PROMPT, 20, **law).tokens == 19
    assert len(written[0]) == 20
    if not law["do_sample"]:
        assert written == [text], "and it is what the model writes where nothing ends it"
    assert torch.equal(before, torch.get_rng_state())


def test_an_answer_that_is_too_short_is_no_measurement():
    ends = MaxLengthCriteria(len(PROMPT) + 4)
    with pytest.raises(RedrafterError, match="wrote 4 of 9 tokens"):
        call(MODEL, None, PROMPT, 9, do_sample=False, stopping_criteria=[ends])


def test_what_transformers_refuses_is_a_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(MODEL, "generate", fail)
    with pytest.raises(RedrafterError, match=r"^transformers' generate fails: no such thing\.$"):
        call_transformers(MODEL, PROMPT, 4)
