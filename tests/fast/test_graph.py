"""A captured function gives what the function gives, and is called plainly where it cannot be captured."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, decoding, generate
from redrafter.fast.graph import Captured

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


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_function_that_reads_the_device_is_called_and_that_is_said():
    x = torch.zeros(3, device="cuda")
    captured = Captured(lambda: float(x.add_(1)[0]), torch.device("cuda"))
    captured()
    with pytest.warns(UserWarning, match="goes on without a CUDA graph: .* reads the device"):
        captured()
    captured()
    assert captured.refused is not None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_replayed_text_is_plain_text(family, drafting, law, monkeypatch):
    """Rows join and leave a batch whose step is captured once."""
    made = []

    class Watched(Captured):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(decoding, "Captured", Watched)
    model = tiny_model(family, **({"sliding_window": 6} if family == "mistral" else {})).cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3) if drafting else None
    told = {"max_new_tokens": 40, "batch_size": 2, **LAWS[law]}
    fast = generate(model, drafter, PROMPTS, **told)
    assert fast.new_tokens == generate(model, drafter, PROMPTS, fast=False, **told).new_tokens
    assert [one.refused is None for one in made] == [True, False]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default", "error:Decoding goes on without torch.compile")  # torch has warnings of its own
def test_compiled_text_is_plain_text(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch does not see through its checks
    model = tiny_model().cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)
    plain = generate(model, drafter, PROMPTS, max_new_tokens=20, fast=False)
    assert generate(model, drafter, PROMPTS, max_new_tokens=20, compile=True).new_tokens == plain.new_tokens
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
def test_the_graph_is_freed_with_the_last_event():
    model = tiny_model().cuda()
    generate(model, None, PROMPTS, max_new_tokens=20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generate(model, RecurrentDrafter.for_target(model), PROMPTS, max_new_tokens=20)
    events = decoding.stream(model, None, PROMPTS, max_new_tokens=20)
    for _ in range(12):
        next(events)
    events.close()
    assert torch.cuda.memory_allocated() <= before + 2**20
