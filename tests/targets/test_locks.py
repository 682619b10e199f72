"""Threads that share models take turns, and each gets its own text."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from conftest import tiny_model
from redrafter import PromptLookup, RecurrentDrafter, TwoModel, generate, stream
from redrafter.targets.locks import ModelLock

PROMPTS = [[5, 9, 12], [7], [8, 8, 4, 3], list(range(3, 30))]


def test_a_turn_is_taken_alone_and_nobody_waits_for_ever():
    one, other = (torch.nn.Linear(1, 1) for _ in range(2))
    inside: list[int] = []
    most = []

    def take(number: int) -> None:
        turn = ModelLock(*((one, other) if number % 2 else (other, one)))
        for _ in range(20):
            with turn, ModelLock(one), turn:  # a thread may enter its own again
                inside.append(number)
                time.sleep(0)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(take, range(6)))
    assert len(most) == 120
    assert max(most) == 1
    free = threading.Event()
    with ModelLock(one):
        threading.Thread(target=lambda: ModelLock(torch.nn.Linear(1, 1)).__enter__() or free.set()).start()
        assert free.wait(60), "another model's turn is its own"


def test_threads_that_share_a_model_write_what_each_writes_alone():
    """Models in training mode too, in which they would drop what they compute."""
    model, other = tiny_model(attention_dropout=0.5), tiny_model(seed=1)
    torch.manual_seed(0)
    methods = [None, RecurrentDrafter.for_target(model, beam_width=4, beam_length=3), TwoModel(other), PromptLookup()]
    laws = [{}, {"do_sample": True, "seed": 3}, {"output_scores": True}]
    expected = [[generate(model, None, [p], max_new_tokens=10, **law).new_tokens for p in PROMPTS] for law in laws]
    model.train()

    def write(number: int) -> bool:
        law, prompt = number % 3, number % 4
        if number % 5 == 0:
            next(stream(other, None, PROMPTS, max_new_tokens=24))  # and leaves it
        method = methods[number // 12]
        found = generate(model, method, [PROMPTS[prompt]], max_new_tokens=10, **laws[law]).new_tokens
        return found == expected[law][prompt]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(write, range(48)))
    assert all(module.training for module in model.modules())
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny_model().modules()}
