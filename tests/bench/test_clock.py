"""What a clock makes of a stream and of transformers' own generate; the clock ticks once each time it is read."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate, stream
from redrafter.bench import clock
from redrafter.bench.clock import Run, by_transformers, follow
from redrafter.engine.results import Event

MODEL = tiny_model()
PROMPTS = [[5, 9, 12], [7], [30, 31]]


@pytest.fixture
def ticks(monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(count)))


def test_a_run_counts_what_generate_counts():
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3)
    told = {"max_new_tokens": 20, "batch_size": 2}
    run = follow(stream(MODEL, drafter, PROMPTS, **told), positions=3)
    expected = generate(MODEL, drafter, PROMPTS, **told)
    assert [run.texts[row] for row in range(3)] == expected.new_tokens
    assert run.stats.accepted_by_position == expected.stats.accepted_by_position
    assert (run.stats.steps, run.stats.tokens) == (expected.stats.steps, expected.stats.tokens)
    assert len(run.first) == 3
    assert run.told["drafts"] == expected.stats.steps - 3


def step(row: int, tokens: int, reason: str | None = None) -> Event:
    return Event(row, [1] * tokens, tokens - 1, 4, reason)


def test_prompts_and_first_steps_are_not_in_the_time(ticks):
    events = [step(0, 1)]
    events += [step(0, 2) for _ in range(5)]
    events += [step(0, 1, "eos"), step(1, 1), step(1, 3, "length")]
    run = follow(iter(events), positions=4, skip=3)
    assert run.first == [1.0, 1.0]
    assert run.times == [1.0] * 4  # of seven steps three are not timed
    assert run.tokens == 2 + 2 + 1 + 3
    assert run.told["seconds"] == 4.0
    assert run.stats.accepted_by_position == [6, 1, 0, 0]


def test_rows_of_one_step_are_one_step_wherever_rows_enter(ticks):
    events = [step(0, 1), step(1, 1)]  # both enter
    events += [step(0, 1), step(1, 1)] * 4
    events += [step(0, 1, "eos"), step(1, 2)]
    events += [step(2, 1)]  # enters where row 0 was
    events += [step(2, 2), step(1, 2)]
    run = follow(iter(events), positions=4, skip=3)
    assert run.first == [2.0, 2.0, 1.0]
    assert run.times == [2.0, 2.0, 2.0]  # the fourth, the fifth and the last
    assert run.tokens == 2 + 3 + 4


def test_together_only_whole_batches_count(ticks):
    events = [step(0, 1), step(1, 1), *[step(0, 1), step(1, 2)] * 5, step(0, 1, "length"), step(1, 2), step(1, 2)]
    run = follow(iter(events), positions=4, skip=3, together=True)
    assert run.times == [2.0, 2.0]
    assert run.tokens == 6
    joined = Run.joined([run, run])
    assert (joined.times, joined.tokens, list(joined.texts)) == ([2.0] * 4, 12, [0, 1, 2, 3])
    assert joined.stats.tokens == 2 * run.stats.tokens


def test_texts_that_end_too_soon_are_told():
    with pytest.raises(RedrafterError, match="The texts end before a step can be timed"):
        _ = follow(iter([step(0, 1), step(0, 1, "eos")]), positions=4, skip=1).told


def test_only_a_graph_is_waited_for():
    assert [clock.untimed(torch.device(kind)) for kind in ("cpu", "cuda")] == [0, clock.CAPTURING]


@pytest.mark.parametrize("batch", [1, 2])
def test_transformers_writes_its_own_text(batch):
    run = by_transformers(MODEL, PROMPTS, batch=batch, ends=frozenset(), skip=3, max_new_tokens=12, do_sample=False)
    assert [run.texts[row] for row in range(3)] == [greedy(MODEL, prompt, 12) for prompt in PROMPTS]
    calls = {1: 3, 2: 2}[batch]
    assert len(run.times) == calls * (11 - 3)
    assert run.tokens == 3 * (11 - 3)
    assert len(run.first) == 3


def test_transformers_tokens_count_up_to_the_end_token():
    text = greedy(MODEL, PROMPTS[0], 12)
    end = text[6]
    until = text[: text.index(end) + 1]
    run = by_transformers(MODEL, PROMPTS[:1], batch=1, ends=frozenset([end]), max_new_tokens=12, do_sample=False)
    assert run.texts == {0: until}


def test_transformers_draws_alike_for_a_seed_and_leaves_the_generator_alone():
    told = {"batch": 1, "ends": frozenset(), "max_new_tokens": 12, "do_sample": True, "temperature": 1.0}
    torch.manual_seed(8)
    before = torch.get_rng_state()
    one, two, other = (by_transformers(MODEL, PROMPTS, seed=seed, **told).texts for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("no such thing\nmore"), "no such thing"), (NotImplementedError(), "NotImplementedError")],
)
def test_what_transformers_refuses_is_a_sentence(monkeypatch, error, said):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(MODEL, "generate", fail)
    with pytest.raises(RedrafterError, match=rf"^transformers' generate fails: {said}\.$"):
        by_transformers(MODEL, PROMPTS, batch=1, ends=frozenset(), max_new_tokens=4)
