"""The backend's decisions, each with its reason."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, TwoModel, generate
from redrafter.engine.backend import Backend, models_of
from redrafter.engine.generate import describe_backend
from redrafter.engine.onednn_linear import why_not_packed
from redrafter.engine.request import request
from redrafter.kernels import has_kernels, kernels_enabled, why_no_kernels

CPU = torch.device("cpu")
PROMPT = [5, 9, 12]
DECISIONS = [field.name for field in dataclasses.fields(Backend) if field.name != "device"]


def decoder_of(model, drafter=None, **settings):
    return request(model, drafter, [PROMPT], **settings).decoder


def on_cuda(decoder):
    """The decoder as if its model were on a GPU, which is never used."""
    decoder.target.device = torch.device("cuda")
    return decoder


def layer_types(models) -> list[type]:
    return [type(layer) for model in models for layer in model.modules()]


def test_without_fast_everything_is_disabled_for_that_reason():
    model = tiny_model()
    decoder = decoder_of(model, RecurrentDrafter.for_target(model))
    before = layer_types(models_of(decoder))
    backend = Backend.choose(decoder, fast=False, compile=True)
    assert {getattr(backend, name) for name in DECISIONS} == {"fast=False"}
    assert all("(fast=False)" in text for text in backend.describe().values())
    assert backend.prepare(decoder) is decoder
    assert layer_types(models_of(decoder)) == before


def test_on_a_cpu_nothing_needs_a_gpu():
    model = tiny_model()
    backend = Backend.choose(decoder_of(model), fast=True, compile=False)
    assert "cpu" in backend.kernels
    assert "cpu" in backend.attention
    assert "cpu" in backend.graph
    assert backend.compile == "not requested"
    assert backend.linears == why_not_packed(model)
    assert "tree attention" in Backend.choose(decoder_of(model), fast=True, compile=True).compile


@pytest.mark.skipif(why_not_packed(torch.nn.Linear(2, 2)) is not None, reason="needs an x86 CPU and oneDNN")
def test_only_the_calls_own_copies_are_prepared():
    model, draft = tiny_model(), tiny_model(seed=1)
    decoder = decoder_of(model, TwoModel(draft))
    before = layer_types([model, draft])
    backend = Backend.choose(decoder, fast=True, compile=False)
    assert backend.describe()["linear layers"] == "packed by oneDNN"
    backend.prepare(decoder)
    assert layer_types(models_of(decoder)) != before
    assert layer_types([model, draft]) == before


def test_a_step_in_which_a_processor_must_see_the_text_is_not_captured(captured):
    model = tiny_model()
    generate(model, None, [PROMPT, PROMPT], max_new_tokens=3, no_repeat_ngram_size=2)
    assert captured == []
    generate(model, None, [PROMPT, PROMPT], max_new_tokens=3, do_sample=True, typical_p=0.5, repetition_penalty=1.0)
    assert len(captured) == 1


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_a_graph_is_refused_if_a_model_is_on_several_devices(part):
    model, draft = tiny_model(), tiny_model(seed=1)
    expected = greedy(model, PROMPT, 6)
    {"target": model, "drafter": draft}[part].elsewhere = torch.nn.Linear(1, 1, device="meta")
    with kernels_enabled(False):
        backend = Backend.choose(on_cuda(decoder_of(model, TwoModel(draft))), fast=True, compile=False)
    assert "several devices" in backend.graph
    assert "call by call" in backend.describe()["a step"]
    assert generate(model, TwoModel(draft), [PROMPT], max_new_tokens=6).new_tokens == [expected]


@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("gpt2", False)])
def test_layers_of_a_captured_step_are_fused_if_there_are_groups(family, fused):
    decoder = on_cuda(decoder_of(tiny_model(family)))
    with kernels_enabled(False):
        backend = Backend.choose(decoder, fast=True, compile=False)
    assert (backend.linears is None) == fused
    assert ("fused" in backend.describe()["linear layers"]) == fused
    before = layer_types(models_of(decoder))
    backend.prepare(decoder)
    assert (layer_types(models_of(decoder)) != before) == fused


def test_an_attention_that_the_kernels_do_not_support_is_named():
    decoder = decoder_of(tiny_model())
    backend = dataclasses.replace(Backend.choose(decoder, fast=True, compile=False), kernels=None, attention="reason")
    words = backend.describe()
    assert words["drafting"] == "Triton kernels"
    assert words["attention"].endswith("(reason)")


def test_kernels_are_disabled_in_this_thread_only():
    with kernels_enabled(False), ThreadPoolExecutor(1) as pool:
        assert not has_kernels(CPU)
        assert why_no_kernels(CPU) == why_no_kernels(torch.device("cuda")) == "disabled"
        assert "cpu" in pool.submit(why_no_kernels, CPU).result()
        with kernels_enabled(True):
            assert why_no_kernels(CPU) == "disabled", "an inner context does not enable them again"
    assert "cpu" in why_no_kernels(CPU)


def test_the_backend_of_a_model_in_words():
    words = describe_backend(tiny_model())
    assert set(words) == {"a step", "attention", "drafting", "linear layers", "layers"}
    assert "cpu" in words["a step"]
    assert "not requested" in words["layers"]
