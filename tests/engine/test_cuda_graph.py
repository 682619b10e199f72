"""A captured function gives what the function gives, and is called plainly where it cannot be captured."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging

import jaxtyping
import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate, stream
from redrafter.decoding.step import Decoder
from redrafter.engine.cuda_graph import Captured, RefuseSynchronization, Synchronizes

LAWS = {"greedy": {}, "sampled": {"do_sample": True, "top_p": 0.9, "seed": 7}}
PROMPTS = [[5, 9, 12], list(range(3, 30)), [7], [8, 8, 4, 3], [11, 3]]


def test_elsewhere_the_function_is_called():
    calls = []
    captured = Captured(lambda: calls.append(1) or len(calls), torch.device("cpu"))
    assert [captured() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert captured.refused is not None


@pytest.mark.gpu
def test_the_third_call_is_captured_and_all_later_ones_replayed():
    x, calls = torch.zeros(3, device="cuda"), []

    def add():
        calls.append(1)
        return x.add_(1) * 2

    captured = Captured(add, torch.device("cuda"))
    assert [float(captured()[0]) for _ in range(6)] == [2, 4, 6, 8, 10, 12]
    assert len(calls) == 3
    assert captured.refused is None


def test_memory_that_torch_keeps_is_given_to_a_graph_that_needs_it(monkeypatch):
    """And everything happens on the function's own device, whichever is the current one."""
    done = []

    class Graph:
        def replay(self):
            done.append("replayed")

    @contextlib.contextmanager
    def on(device):
        done.append(str(device))
        yield
        done.append("left")

    def recorded(_):
        done.append("tried")
        if done.count("tried") < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        captured._result = "recorded"
        return Graph()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(Captured, "_watched", lambda _: "watched")
    monkeypatch.setattr(Captured, "_recorded", recorded)
    captured = Captured(lambda: "called", torch.device("cuda:1"))
    assert [captured() for _ in range(4)] == ["called", "watched", "recorded", "recorded"]
    one = ["cuda:1", "left"]
    assert done == [*one, *one, "cuda:1", "tried", "emptied", "tried", "replayed", "left", "cuda:1", "replayed", "left"]


def test_a_graph_that_memory_is_too_small_for_is_told(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Captured, "_watched", lambda _: "watched")
    monkeypatch.setattr(Captured, "_recorded", full)
    captured = Captured(lambda: "called", torch.device("cuda:1"))
    assert [captured(), captured()] == ["called", "watched"]
    with pytest.raises(torch.OutOfMemoryError):
        captured()
    assert not captured.replaying


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_gpu_than_the_current_one(captured):
    model = tiny_model()
    expected = generate(model, None, PROMPTS, max_new_tokens=20).new_tokens
    model = model.to("cuda:1")
    for drafter in (None, RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)):
        assert generate(model, drafter, PROMPTS, max_new_tokens=20).new_tokens == expected
    assert [one.replaying for one in captured] == [False, True, True]


READS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x.sum() > 0),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "equality": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
}
COMPUTES = {
    "sum": lambda x: (x + 1).sum(),
    "masked fill": lambda x: x.masked_fill(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "scatter": lambda x: torch.zeros_like(x).scatter_(0, torch.zeros(3, dtype=torch.long, device=x.device), x),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operators_that_wait_for_the_device_are_found(device):
    x = torch.ones(3, device=device)
    for function in READS.values():
        with pytest.raises(Synchronizes), RefuseSynchronization(device):
            function(x)

    for function in COMPUTES.values():
        with RefuseSynchronization(device):
            function(x)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_between_devices_is_found(device):
    with pytest.raises(Synchronizes), RefuseSynchronization(device):
        torch.ones(3).to(device)


@pytest.mark.gpu
def test_a_tensor_made_of_numbers_is_found():
    with pytest.raises(Synchronizes), RefuseSynchronization("cuda"):
        torch.tensor([1.0], device="cuda")


@pytest.mark.gpu
def test_a_function_that_reads_the_device_is_called_with_a_warning():
    x = torch.zeros(3, device="cuda")
    captured = Captured(lambda: float(x.add_(1)[0]), torch.device("cuda"))
    captured()
    with pytest.warns(UserWarning, match="continues without a CUDA graph: .* reads the device"):
        captured()
    captured()
    assert captured.refused is not None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_replayed_text_is_plain_text(family, drafting, law, captured):
    """Rows join and leave a batch whose step is captured once."""
    model = tiny_model(family, **({"sliding_window": 6} if family == "mistral" else {})).cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3) if drafting else None
    told = {"max_new_tokens": 40, "batch_size": 2, **LAWS[law]}
    fast = generate(model, drafter, PROMPTS, **told)
    count = len(captured)
    assert fast.new_tokens == generate(model, drafter, PROMPTS, fast=False, **told).new_tokens
    assert {one.refused is None for one in captured[:count]} == {True}
    assert any(one.replaying for one in captured[:count])
    assert {one.refused is None for one in captured[count:]} == {False}


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "default", "error:Decoding continues without torch.compile"
)  # torch has warnings of its own
def test_compiled_text_is_plain_text_by_one_code_for_all_layers(monkeypatch, caplog):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch does not see through its checks
    caplog.set_level(logging.INFO, logger="redrafter")
    torch._dynamo.reset()
    model = tiny_model().cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)
    told = {"max_new_tokens": 20, "lookup": False}  # with lookup, rows that repeat themselves end before the others
    plain = generate(model, drafter, PROMPTS, fast=False, **told)
    assert generate(model, drafter, PROMPTS, compile=True, **told).new_tokens == plain.new_tokens
    assert [one.name for one in caplog.records].count("redrafter") == 1
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
def test_graphs_are_kept_for_later_calls_and_freed_with_the_model():
    def calls(model):
        for _ in range(3):
            generate(model, RecurrentDrafter.for_target(model), PROMPTS, max_new_tokens=20)
        events = stream(model, None, PROMPTS, max_new_tokens=20)
        for _ in range(12):
            next(events)
        events.close()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    calls(tiny_model().cuda())
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = tiny_model().cuda()
    once = calls(model)
    assert calls(model) <= once + 2**20
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_model_that_is_moved_meanwhile_is_not_replayed():
    model = tiny_model()
    events = stream(model, None, PROMPTS, max_new_tokens=9)
    next(events)
    events_of_another = stream(tiny_model(), None, PROMPTS, max_new_tokens=9)
    next(events_of_another)
    model.double()
    with pytest.raises(RedrafterError, match="moved or converted during generation"):
        list(events)
    assert len(list(events_of_another)) == len(PROMPTS) * 8 + 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_streams_side_by_side_are_independent(device):
    """Of one model with and without a drafter, and of another model with its own."""
    model, other = tiny_model().to(device), tiny_model(seed=1).to(device)
    drafters = [RecurrentDrafter.for_target(one, beam_width=2, beam_length=2) for one in (model, other)]
    pairs = [(model, drafters[0]), (model, None), (other, drafters[1])]
    expected = [generate(one, None, PROMPTS, max_new_tokens=9).new_tokens for one, _ in pairs]
    found = [[[] for _ in PROMPTS] for _ in pairs]
    streams = [stream(*pair, PROMPTS, max_new_tokens=9) for pair in pairs]
    for events in itertools.zip_longest(*streams):
        for texts, event in zip(found, events, strict=True):
            if event is not None:
                texts[event.row] += event.tokens
    assert found == expected


def test_full_memory_is_a_redrafter_error_and_the_model_still_works(monkeypatch):
    model = tiny_model()
    plain = generate(model, None, PROMPTS, max_new_tokens=6).new_tokens

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", full)
        with pytest.raises(RedrafterError, match=r"memory of cpu is full: lower batch_size \(now 5\)"):
            generate(model, None, PROMPTS, max_new_tokens=6)
    assert generate(model, None, PROMPTS, max_new_tokens=6).new_tokens == plain
