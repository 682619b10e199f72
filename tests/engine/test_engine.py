"""Requests that come and go: every text is that of the request alone, and every request ends once."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Given, tiny_model
from redrafter import Engine, PromptLookup, RedrafterError, generate
from redrafter.core.shapes import DraftShape
from redrafter.engine import prefixes
from redrafter.engine.engine import EngineClosed, EngineFull
from redrafter.proposers.prompt_lookup import LookupProposer

MODEL = tiny_model().double()

SETTINGS: list[dict] = [
    {},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "temperature": 0.6, "top_k": 7, "min_p": 0.02},
    {"do_sample": True, "seed": 5, "top_p": 0.8},
    {"presence_penalty": 0.7, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    {"logit_bias": {5: 2.0, 9: -3.0}},
    {"no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 6, "typical_p": 0.9},
    {"suppress_tokens": [4, 5, 6]},
    {"eos_token_id": [7, 8, 9, 10]},
]
SHARED = [7, 9, 11, 3] * 12
PROMPTS = [[5], [5, 9, 12], [*SHARED, 1], [*SHARED, 2, 3, 4], [*range(1, 60)], [8, 8, 8, 8], [*SHARED[:40], 30]]


@cache
def alone(prompt: int, setting: int, tokens: int) -> list[int]:
    return generate(MODEL, None, [PROMPTS[prompt]], max_new_tokens=tokens, **words(setting)).new_tokens[0]


def words(setting: int) -> dict:
    return {"eos_token_id": ()} | SETTINGS[setting]


def engine(drafter=None, **options) -> Engine:
    return Engine(MODEL, drafter, **{"slots": 3, "max_length": 120} | options)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, len(SETTINGS) - 1),
        st.integers(1, 12),
        st.sampled_from([None, None, None, 0, 2]),  # events after which it is cancelled
        st.booleans(),  # whether the first event of the request is waited for
        st.booleans(),  # whether it is drafted
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=25)
@given(requests=REQUESTS, drafter=st.sampled_from([None, PromptLookup()]), read_tokens=st.sampled_from([1, 7, 200]))
def test_every_text_is_that_of_the_request_alone(requests, drafter, read_tokens):
    with engine(drafter, read_tokens=read_tokens) as own:
        submissions = []
        for prompt, setting, tokens, cancel, wait, drafted in requests:
            one = own.submit(PROMPTS[prompt], max_new_tokens=tokens, drafter=drafted, **words(setting))
            events = iter(one)
            seen = [next(events)] if wait else []
            if cancel == 0:
                one.cancel()
            submissions.append((one, events, seen, (prompt, setting, tokens), cancel))
        for one, events, seen, key, cancel in submissions:
            for event in events:
                seen.append(event)
                if cancel is not None and len(seen) >= cancel:
                    one.cancel()
            found = [token for event in seen for token in event.tokens]
            expected = alone(*key)
            assert found == expected[: len(found)]
            if seen[-1].finish_reason == "cancelled":
                assert cancel is not None
            else:
                assert found == expected
            assert [event.finish_reason for event in seen[:-1]] == [None] * (len(seen) - 1)
        statistics = own.statistics()
        assert (statistics.running, statistics.waiting) == (0, 0)
        assert sum(statistics.requests.values()) == len(requests)
        assert statistics.cache_usage == 0
        again = own.submit([5], max_new_tokens=3, eos_token_id=()).result(60.0)
        assert again.new_tokens == alone(0, 0, 3), "all slots work afterwards"


def test_a_failing_request_ends_alone():
    class Fails(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 5:
                raise KeyError("no such state")
            return scores

    class FailsToo(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise ZeroDivisionError("never")

    class Nothing(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf)

    with engine(PromptLookup()) as own:
        fine = [own.submit(PROMPTS[1], max_new_tokens=12, **words(i)) for i in range(4)]
        bad = own.submit([5, 9, 12], max_new_tokens=12, logits_processor=[Fails()], eos_token_id=())
        worse = own.submit([5, 9, 12], max_new_tokens=12, stopping_criteria=[FailsToo()], eos_token_id=())
        none = own.submit([5, 9, 12], max_new_tokens=12, logits_processor=[Nothing()], eos_token_id=())
        with pytest.raises(RedrafterError, match="KeyError"):
            bad.result(60.0)
        with pytest.raises(RedrafterError, match="ZeroDivisionError"):
            worse.result(60.0)
        with pytest.raises(RedrafterError, match="leave no token"):
            none.result(60.0)
        assert [one.result(60.0).new_tokens for one in fine] == [alone(1, i, 12) for i in range(4)]
        assert own.statistics().requests == {"length": 4, "error": 3}


def test_a_proposer_that_fails_ends_what_runs_and_nothing_else():
    """The engine goes on with requests that come later."""

    class Fails(LookupProposer):
        fails = True

        def propose(self, memory, rows, context, noise):
            if self.fails:
                raise RuntimeError("the drafter is broken")
            return super().propose(memory, rows, context, noise)

    proposer = Fails(None, length=3, size=4, chains=1)
    with engine(Given(proposer)) as own:
        one = own.submit([5, 9], max_new_tokens=5, eos_token_id=())
        with pytest.raises(RedrafterError, match="the drafter is broken"):
            one.result(60.0)
        proposer.fails = False
        assert own.submit([5, 9, 12], max_new_tokens=9, eos_token_id=()).result(60.0).new_tokens == alone(1, 0, 9)


def test_events_in_asyncio_loops():
    async def texts(own: Engine) -> list[list[int]]:
        async def one(setting: int) -> list[int]:
            submission = own.submit(PROMPTS[1], max_new_tokens=9, **words(setting))
            return [token async for event in submission for token in event.tokens]

        return list(await asyncio.gather(*map(one, range(6))))

    with engine() as own:
        found: list[list[list[int]]] = []
        threads = [threading.Thread(target=lambda: found.append(asyncio.run(texts(own)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [[alone(1, setting, 9) for setting in range(6)]] * 2


def test_text_and_log_probabilities(byte_tokenizer):
    model = tiny_model(vocab_size=len(byte_tokenizer))
    with Engine(model, tokenizer=byte_tokenizer, slots=2, max_length=60) as own:
        one = own.submit([70, 71], max_new_tokens=8, logprobs=2, eos_token_id=(), presence_penalty=1.0).result(60.0)
        plain = generate(
            model, None, [[70, 71]], max_new_tokens=8, eos_token_id=(), presence_penalty=1.0, tokenizer=byte_tokenizer
        )
    assert one.new_tokens == plain.new_tokens[0]
    assert one.text == plain.texts[0]
    logits = model(torch.tensor([[70, 71, *one.new_tokens[:-1]]])).logits[0, 1:]
    expected = logits.detach().float().log_softmax(-1)
    assert [entry.token for entry in one.logprobs] == one.new_tokens
    for row, entry in zip(expected, one.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_prompts_that_begin_alike_are_read_once():
    with engine(PromptLookup()) as own:
        first = own.submit(PROMPTS[2], max_new_tokens=9, eos_token_id=()).result(60.0)
        assert own.statistics().prefix_hits == 0
        second = own.submit(PROMPTS[3], max_new_tokens=9, eos_token_id=()).result(60.0)
        hits = own.statistics().prefix_hits
        assert hits == len(SHARED)
        turn = [*PROMPTS[2], *first.new_tokens, 20, 21, 22]
        third = own.submit(turn, max_new_tokens=9, eos_token_id=()).result(60.0)
        assert own.statistics().prefix_hits - hits >= len(PROMPTS[2]), "an earlier turn, though another came between"
    assert first.new_tokens == alone(2, 0, 9)
    assert second.new_tokens == alone(3, 0, 9)
    assert third.new_tokens == generate(MODEL, None, [turn], max_new_tokens=9, eos_token_id=()).new_tokens[0]


def test_texts_of_slots():
    found = prefixes.Prefixes(margin=2)
    text = [*range(100, 150)]
    found.put(0, text)
    found.put(1, text[:40])
    assert found.find([*text[:45], 1, 2, 3]) == (0, 45)
    assert found.find(text[:45]) == (0, 43), "the margin is left"
    assert found.find([*text[:20], 1, *text]) == (-1, 0), "too short"
    assert (found.queries, found.hits) == (48 + 45 + 71, 88)
    assert found.emptiest([0, 1, 2]) == 2
    assert found.emptiest([0, 1]) == 0
    found.move(0, 2)
    assert not found.holds(0)
    assert found.length(2) == 50
    found.put(2, text[:5])
    assert not found.holds(2)


def test_what_cannot_be_submitted():
    with engine(max_waiting=2) as own:
        with pytest.raises(RedrafterError, match=r"The prompt has 120 tokens, and a request at most 120"):
            own.submit([5] * 120)
        with pytest.raises(RedrafterError, match="outside the vocabulary"):
            own.submit([5, 10**6])
        with pytest.raises(RedrafterError, match="empty"):
            own.submit([])
        with pytest.raises(RedrafterError, match="temperature has no effect in greedy decoding"):
            own.submit([5], temperature=0.5)
        with pytest.raises(RedrafterError, match="A request writes one text"):
            own.submit([5], do_sample=True, num_return_sequences=2)
        assert own.submit([5] * 119, max_new_tokens=50, eos_token_id=()).result(60.0).finish_reason == "length"
    for options in ({"slots": 0}, {"max_waiting": 0}, {"read_tokens": 0}, {"max_length": 0}):
        with pytest.raises(RedrafterError, match=f"{next(iter(options))} must be at least 1, not 0"):
            engine(**options)


def test_a_full_engine_refuses_requests_until_there_is_room():
    with engine(slots=1, max_waiting=2, max_length=2000) as own:
        submissions = []
        with pytest.raises(EngineFull, match="wait already"):
            submissions.extend(own.submit([5], max_new_tokens=1500, eos_token_id=()) for _ in range(50))
        assert 2 <= len(submissions) <= 4
        for one in submissions:
            one.cancel()
            assert one.result(60.0).finish_reason == "cancelled"
        assert own.submit([5], max_new_tokens=2, eos_token_id=()).result(60.0).new_tokens == alone(0, 0, 2)


def test_draining_and_closing():
    own = engine()
    one = own.submit([5, 9, 12], max_new_tokens=12, eos_token_id=())
    assert own.drain(60.0)
    assert one.result(1.0).new_tokens == alone(1, 0, 12)
    with pytest.raises(EngineClosed):
        own.submit([5])
    own.close()
    assert not own.alive
    own.close()

    own = engine(max_length=3000)
    late = [own.submit([5], max_new_tokens=2500, eos_token_id=()) for _ in range(5)]
    assert not own.drain(0.05)
    own.close()
    assert {one.result(1.0).finish_reason for one in late} == {"cancelled"}


def test_an_engine_that_is_closed_releases_the_model():
    model = tiny_model(seed=5)
    own = Engine(model, slots=2, max_length=50)
    assert own.submit([5], max_new_tokens=3, eos_token_id=()).result(60.0).finish_reason == "length"
    own.close()
    alive = weakref.ref(model)
    del model, own
    gc.collect()
    assert alive() is None


def test_results_wait_no_longer_than_asked():
    with engine(max_length=3000) as own:
        one = own.submit([5], max_new_tokens=2900, eos_token_id=())
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            one.result(0.05)
        assert time.monotonic() - begin < 30
        one.cancel()


def test_an_engine_says_what_it_runs():
    with engine(PromptLookup()) as own:
        said = own.describe()
    assert said["slots"] == "3 requests of up to 120 tokens"
    assert "11 nodes" in said["drafts"]
    assert own.vocab_size == MODEL.config.vocab_size


def test_drafts_follow_the_load():
    """A tuned shape for more rows replaces the first one while that many run."""

    class ByLoad:
        layers = ()

        def shape(self, batch):
            return DraftShape(beam_width=1, beam_length=3 if batch < 4 else 0)

        def proposer(self, target, shape):
            return PromptLookup().proposer(target, shape)

    with engine(ByLoad(), slots=4) as own:
        assert own.describe()["drafts"].endswith("from 4 requests: none")
        one = own.submit([5, 6] * 10, max_new_tokens=40, eos_token_id=())
        one.result(60.0)
        few = own.statistics()
        assert few.drafts > 0
        many = [own.submit([5, 6] * 10, max_new_tokens=40, eos_token_id=()) for _ in range(4)]
        assert len({tuple(each.result(60.0).new_tokens) for each in many}) == 1
        assert own.statistics().drafts - few.drafts < 4 * few.drafts, "four together are not drafted"
