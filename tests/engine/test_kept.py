"""Runners that later calls use again: only if they would be made the same, and never two calls at once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from conftest import tiny_model
from redrafter import PromptLookup, RecurrentDrafter, generate, stream
from redrafter.engine import kept
from redrafter.engine.runner import Runner

PROMPTS = [[5, 9, 12], [7, 8]]


@pytest.fixture
def made(monkeypatch) -> list[Runner]:
    """All runners that calls make; they are kept on a CPU too."""
    runners = []

    class Recorded(Runner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runners.append(weakref.ref(self))

    monkeypatch.setattr(kept, "Runner", Recorded)
    monkeypatch.setattr(kept, "_keeps", lambda target: True)
    monkeypatch.setattr(Runner, "captures", True)
    return runners


def texts(model, drafter=None, **settings) -> list[list[int]]:
    return generate(model, drafter, PROMPTS, **{"max_new_tokens": 12, "eos_token_id": ()} | settings).new_tokens


def test_a_second_call_uses_the_runner_of_the_first(made):
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model, beam_width=2, beam_length=2)
    first = texts(model, drafter)
    assert texts(model, drafter) == first
    assert texts(model, drafter, max_new_tokens=3) == [row[:3] for row in first]
    assert texts(model, drafter, do_sample=True, seed=3) == texts(model, None, do_sample=True, seed=3)
    assert len(made) == 2, "one with a drafter and one without"
    texts(model, drafter, beam_width=3)
    texts(model, PromptLookup())
    texts(model, fast=False)
    assert len(made) == 5
    texts(model, drafter, max_new_tokens=90)
    assert len(made) == 6, "a longer text needs another"


def test_a_change_of_the_model_makes_a_new_one(made):
    model = tiny_model()
    before = texts(model)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert texts(model) != before
    assert len(made) == 2
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    texts(model)
    assert len(made) == 3
    handle.remove()
    model.double()
    changed = texts(model)
    assert len(made) == 4
    model.model.layers[0].mlp = tiny_model(seed=4).double().model.layers[0].mlp
    assert texts(model) != changed
    assert len(made) == 5


def test_a_drafter_that_is_trained_on_is_read_anew(made):
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model, beam_width=2, beam_length=2)
    before = texts(model, drafter)
    with torch.no_grad():
        next(drafter.parameters()).mul_(2)
    assert texts(model, drafter) == before
    assert len(made) == 2


def test_calls_at_the_same_time_share_nothing(made):
    model = tiny_model()
    expected = texts(model)
    one, other = (stream(model, None, PROMPTS, max_new_tokens=12, eos_token_id=()) for _ in range(2))
    found = [[[], []], [[], []]]
    for _ in range(24):
        for events, rows in zip((one, other), found, strict=True):
            event = next(events)
            rows[event.row] += event.tokens
    assert found == [expected] * 2
    assert len(made) == 2


def test_a_stream_that_is_left_returns_its_runner(made):
    model = tiny_model()
    for _ in range(3):
        events = stream(model, None, PROMPTS, max_new_tokens=12)
        next(events)
        events.close()
    assert len(made) == 1
    assert texts(model) == texts(tiny_model())


def test_nothing_outlives_the_model_or_the_drafter(made):
    model = tiny_model()
    for _ in range(3):
        texts(model, RecurrentDrafter.for_target(model, beam_width=2, beam_length=2))
        gc.collect()
    texts(model)
    gc.collect()
    assert sum(one() is not None for one in made) <= 2, "the last drafter's may remain until the next call"
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert [one() for one in made] == [None] * len(made)


def test_memory_is_bounded(made, monkeypatch):
    model = tiny_model()
    for width in range(1, 8):
        texts(model, RecurrentDrafter.for_target(model), beam_width=width, beam_length=2)
    gc.collect()
    assert sum(one() is not None for one in made) <= kept.MAX_RUNNERS
    monkeypatch.setattr(kept, "MAX_BYTES", 0)
    texts(model)
    gc.collect()
    assert sum(one() is not None for one in made) == 0
