"""Timing of calls and streams with a fake clock that advances by one second each time it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import MaxLengthCriteria

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate, stream
from redrafter.bench import timing
from redrafter.bench.timing import TimedRun, time_call, time_stream, time_transformers, time_transformers_call
from redrafter.engine.results import Event

MODEL = tiny_model()
PROMPTS = [[5, 9, 12], [7], [30, 31]]
PROMPT = PROMPTS[0]
GREEDY = {"do_sample": False}


@pytest.fixture
def ticks(monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(count))))


@pytest.fixture
def drafter():
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=40)


def test_a_call_is_timed_from_its_start_to_its_return(ticks):
    for call in (time_call(MODEL, None, PROMPT, 6, **GREEDY), time_transformers_call(MODEL, PROMPT, 6, **GREEDY)):
        # start, first token, five steps, end
        assert (call.seconds, call.first, call.startup, call.decoding, call.tokens) == (7.0, 1.0, 0.0, 6.0, 5)


def test_the_first_steps_on_a_gpu_count_for_the_call_but_not_for_decoding(ticks, monkeypatch):
    monkeypatch.setattr(timing, "untimed_steps", lambda device: 3)
    for call in (time_call(MODEL, None, PROMPT, 6, **GREEDY), time_transformers_call(MODEL, PROMPT, 6, **GREEDY)):
        assert (call.seconds, call.first, call.startup, call.decoding, call.tokens) == (7.0, 1.0, 3.0, 3.0, 2)
    short = time_call(MODEL, None, PROMPT, 2, **GREEDY)
    assert (short.seconds, short.startup, short.tokens) == (3.0, 1.0, 0)


def first_tokens(drafter, **settings) -> int:
    """The number of tokens of the first step."""
    return len(next(stream(MODEL, drafter, [PROMPT], max_new_tokens=20, eos_token_id=(), **settings)).tokens)


def test_the_tokens_of_drafted_steps_are_counted(ticks, drafter):
    stats = generate(MODEL, drafter, [PROMPT], max_new_tokens=20).stats
    assert stats.accepted > 0
    call = time_call(MODEL, drafter, PROMPT, 20, **GREEDY)
    assert call.tokens == 20 - first_tokens(drafter, **GREEDY)
    assert call.seconds == 1 + stats.steps


@pytest.mark.parametrize("sampling", [GREEDY, {"do_sample": True, "temperature": 1.0, "seed": 3}])
def test_end_tokens_do_not_shorten_an_answer(monkeypatch, drafter, sampling):
    text = greedy(MODEL, PROMPT, 20)
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", sorted(set(text[1:])))
    if not sampling["do_sample"]:
        assert len(generate(MODEL, None, [PROMPT], max_new_tokens=20).new_tokens[0]) < 20
    outputs = []
    original = MODEL.generate

    def recording(*args, **kwargs):
        output = original(*args, **kwargs)
        outputs.append(output[0, len(PROMPT) :].tolist())
        return output

    monkeypatch.setattr(MODEL, "generate", recording)
    before = torch.get_rng_state()
    assert time_call(MODEL, drafter, PROMPT, 20, **sampling).tokens == 20 - first_tokens(drafter, **sampling)
    assert time_call(MODEL, None, PROMPT, 20, **sampling).tokens == 19
    assert time_transformers_call(MODEL, PROMPT, 20, **sampling).tokens == 19
    assert len(outputs[0]) == 20
    if not sampling["do_sample"]:
        assert outputs == [text], "the same text as without end tokens"
    assert torch.equal(before, torch.get_rng_state())


def test_an_answer_that_is_too_short_is_an_error():
    limit = MaxLengthCriteria(len(PROMPT) + 4)
    with pytest.raises(RedrafterError, match="4 of 9 tokens"):
        time_call(MODEL, None, PROMPT, 9, do_sample=False, stopping_criteria=[limit])


def test_a_run_has_the_statistics_of_generate():
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3)
    settings = {"max_new_tokens": 20, "batch_size": 2}
    run = time_stream(stream(MODEL, drafter, PROMPTS, **settings), positions=10)
    expected = generate(MODEL, drafter, PROMPTS, **settings)
    assert [run.texts[number] for number in range(3)] == expected.new_tokens
    assert run.stats.accepted_by_position == expected.stats.accepted_by_position
    assert (run.stats.steps, run.stats.tokens) == (expected.stats.steps, expected.stats.tokens)
    assert len(run.first) == 3
    assert run.record()["drafts"] == expected.stats.steps


def row(number: int, tokens: int, reason: str | None = None) -> Event:
    return Event(number, [1] * tokens, tokens - 1, 4, reason)


def steps(*events_of_step: list[Event]) -> Iterator[Event]:
    """The events of steps, numbered as in a stream."""
    for number, events in enumerate(events_of_step, start=1):
        for event in events:
            event.step = number
            yield event


def test_prompts_and_first_steps_are_not_timed(ticks):
    events = [[row(0, 1)], *([row(0, 2)] for _ in range(5)), [row(0, 1, "eos")], [row(1, 1)], [row(1, 3, "length")]]
    run = time_stream(steps(*events), positions=4, skip=3)
    assert run.first == [1.0, 1.0]
    assert run.times == [1.0] * 4  # three of seven steps are not timed
    assert run.tokens == 2 + 2 + 1 + 3
    assert run.record()["seconds"] == 4.0
    assert run.stats.accepted_by_position == [6, 1, 0, 0]


def test_rows_of_one_step_are_one_step_when_a_new_row_starts(ticks):
    events = [[row(0, 1), row(1, 1)] for _ in range(5)]  # both start in the first
    events += [[row(0, 1, "eos"), row(1, 2)]]
    events += [[row(2, 1), row(1, 3)]]  # replaces row 0
    events += [[row(2, 2), row(1, 2)]]
    run = time_stream(steps(*events), positions=4, skip=3)
    assert run.first == [2.0, 2.0, 2.0]
    assert run.times == [2.0, 2.0, 2.0]  # the fifth, the sixth and the last
    assert run.tokens == 2 + 3 + 4


def test_a_fixed_batch_is_timed_until_the_first_row_finishes(ticks):
    events = [[row(0, 1), row(1, 1)], *([row(0, 1), row(1, 2)] for _ in range(5))]
    events += [[row(0, 1, "length"), row(1, 2)], [row(1, 2)]]
    run = time_stream(steps(*events), positions=4, skip=3, fixed_batch=True)
    assert run.times == [2.0, 2.0]
    assert run.tokens == 6
    total = TimedRun.concatenated([run, run])
    assert (total.times, total.tokens, list(total.texts)) == ([2.0] * 4, 12, [0, 1, 2, 3])
    assert total.stats.tokens == 2 * run.stats.tokens


def test_texts_without_a_timed_step_are_an_error():
    with pytest.raises(RedrafterError, match="end before a step can be timed"):
        time_stream(steps([row(0, 1)], [row(0, 1, "eos")]), positions=4, skip=1).record()


def test_all_steps_are_timed_except_on_cuda():
    assert [timing.untimed_steps(torch.device(kind)) for kind in ("cpu", "cuda")] == [0, timing.CAPTURE_STEPS]


@pytest.mark.parametrize("batch", [1, 2])
def test_transformers_generates_its_own_text(batch):
    run = time_transformers(MODEL, PROMPTS, batch=batch, ends=frozenset(), skip=3, max_new_tokens=12, do_sample=False)
    assert [run.texts[number] for number in range(3)] == [greedy(MODEL, prompt, 12) for prompt in PROMPTS]
    calls = {1: 3, 2: 2}[batch]
    assert len(run.times) == calls * (11 - 3)
    assert run.tokens == 3 * (11 - 3)
    assert len(run.first) == 3


def test_tokens_of_transformers_count_up_to_the_end_token():
    text = greedy(MODEL, PROMPT, 12)
    end = text[6]
    run = time_transformers(MODEL, [PROMPT], batch=1, ends=frozenset([end]), max_new_tokens=12, do_sample=False)
    assert run.texts == {0: text[: text.index(end) + 1]}


def test_transformers_samples_by_seed_and_does_not_change_the_generator():
    settings = {"batch": 1, "ends": frozenset(), "max_new_tokens": 12, "do_sample": True, "temperature": 1.0}
    torch.manual_seed(8)
    before = torch.get_rng_state()
    first, again, other = (time_transformers(MODEL, PROMPTS, seed=seed, **settings).texts for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("no such thing\nmore"), "no such thing"), (NotImplementedError(), "NotImplementedError")],
)
def test_errors_of_transformers_are_one_sentence(monkeypatch, error, reason):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(MODEL, "generate", fail)
    with pytest.raises(RedrafterError, match=rf": {reason}\.$"):
        time_transformers(MODEL, PROMPTS, batch=1, ends=frozenset(), max_new_tokens=4)
    with pytest.raises(RedrafterError, match=rf": {reason}\.$"):
        time_transformers_call(MODEL, PROMPT, 4)
