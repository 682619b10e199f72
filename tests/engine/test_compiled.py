"""Compiled code serves all equal layers, gives the same text and does not change the model.

The step of a CUDA device is imitated on a CPU: bit masks, the kernels' operators, trees of one size, fused layers.
"""

from __future__ import annotations

import dataclasses
import logging

import jaxtyping
import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from conftest import tiny_model
from redrafter import RecurrentDrafter, generate, stream
from redrafter.core.cache import LayerShape, SlotCache
from redrafter.core.tree import DraftTree
from redrafter.engine import compiled as module
from redrafter.engine import runner
from redrafter.engine.backend import Backend
from redrafter.engine.compiled import compiled

PROMPTS = [[5, 9, 12], [7, 3]]
KERNEL_USERS = ("targets.target", "targets.probe", "core.cache")
"""Modules whose kernels are replaced by PyTorch's equivalents inside operators."""


class Uncaptured:
    """A step as on CUDA, but without the graph."""

    refused = None
    replaying = False

    def __init__(self, function, device, **options):
        self._function = function

    def __call__(self):
        return self._function()


choose = Backend.choose


def choose_as_on_cuda(decoder, *, fast, compile, **more):
    chosen = choose(decoder, fast=fast, compile=compile, **more)
    return dataclasses.replace(chosen, graph=None, linears=None) if fast else chosen


@pytest.fixture
def backend(monkeypatch):
    """Imitates CUDA.  Returns a function that sets the backend of torch.compile."""
    for name in KERNEL_USERS:
        monkeypatch.setattr(f"redrafter.{name}.has_kernels", lambda *_: True)
    monkeypatch.setattr(DraftTree, "trimmed", lambda tree: tree)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(runner, "Captured", Uncaptured)
    monkeypatch.setattr(Backend, "choose", choose_as_on_cuda)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch does not see through its checks
    module._compiled.cache_clear()
    torch._dynamo.reset()
    yield lambda one: monkeypatch.setattr(module, "BACKEND", one)
    module._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def graphs(backend):
    """Those compiled so far."""
    found = []

    def kept(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    backend(kept)
    return found


@pytest.mark.parametrize(
    ("family", "kinds", "changes"),
    [
        ("llama", 1, {}),
        ("qwen3", 1, {"head_dim": 8}),
        ("mistral", 1, {"sliding_window": 6}),
        ("gpt2", 1, {"n_layer": 4}),  # hands the cache on by its place
        ("gemma2", 2, {"sliding_window": 8, "head_dim": 8}),
        ("gpt_oss", 2, {"sliding_window": 8, "head_dim": 8, "num_local_experts": 4}),
    ],
)
def test_layers_that_are_alike_are_compiled_once_for_a_shape(family, kinds, changes, graphs):
    deep = {} if family == "gpt2" else {"num_hidden_layers": 4}
    model = tiny_model(family, **deep, **changes)
    drafter = RecurrentDrafter.for_target(model, beam_width=3, beam_length=2)
    prompts = PROMPTS[:1] * 2  # which end at the same time: fewer rows would be another shape
    for count in (8, 19):  # another number of slots
        plain = generate(model, None, prompts, max_new_tokens=count, fast=False)
        for drafting, shapes in ((None, 1), (drafter, 2)):
            got = generate(model, drafting, prompts, max_new_tokens=count, compile=True)
            assert got.new_tokens == plain.new_tokens
            assert len(graphs) == kinds * (shapes if count == 8 else 2)


def test_another_model_of_the_same_shape_needs_no_compilation(graphs):
    for seed in (0, 1):
        model = tiny_model(seed=seed)
        plain = generate(model, None, PROMPTS, max_new_tokens=8, fast=False)
        assert generate(model, None, PROMPTS, max_new_tokens=8, compile=True).new_tokens == plain.new_tokens
    assert len(graphs) == 1


def test_the_model_is_as_before_also_between_events(graphs):
    model = tiny_model()
    kinds = [type(part) for part in model.modules()]
    names = [set(vars(part)) for part in model.modules()]
    events = stream(model, None, PROMPTS, max_new_tokens=8, compile=True)
    for _ in range(5):
        next(events)
    assert graphs
    assert not any("forward" in vars(part) for part in model.modules())
    events.close()
    assert [type(part) for part in model.modules()] == kinds
    assert [set(vars(part)) for part in model.modules()] == names


def test_a_layer_whose_forward_is_replaced_is_left_alone(graphs):
    model = tiny_model()
    layers = model.model.layers
    replaced = layers[0].forward
    layers[0].forward = lambda *args, **kwargs: replaced(*args, **kwargs)  # as accelerate does
    with compiled(layers):
        assert "forward" in vars(layers[1])
    assert "forward" in vars(layers[0])
    assert "forward" not in vars(layers[1])


class Shifted(nn.Module):
    """Writes to a place that is its own at that time."""

    def __init__(self):
        super().__init__()
        self.layer_idx = 0

    def forward(self, states, past_key_values, turn):
        return past_key_values.update(states, states, self.layer_idx + turn)[0]


def test_layers_that_run_twice_with_one_place_for_each_time_see_the_whole_cache(graphs):
    shape = LayerShape(1, 2, 2, torch.float32, torch.device("cpu"))
    cache = SlotCache([shape, shape], batch=1, slots=1)
    cache.window.slots = torch.zeros((1, 1), dtype=torch.long)
    layer = Shifted()
    with compiled([layer]):
        for turn in (0, 1):
            layer(torch.full((1, 1, 1, 2), 3.0 + turn), past_key_values=cache, turn=turn)
    assert [float(one.keys.max()) for one in cache.layers] == [3, 4]
    assert len(graphs) == 2


def test_a_layer_of_several_indices_sees_the_whole_cache():
    class Layer(nn.Module):
        def __init__(self, *indices: int):
            super().__init__()
            for index in indices:
                part = nn.Identity()
                part.layer_idx = index
                self.add_module(str(index), part)

    assert module._index(Layer(3)) == 3
    assert module._index(Layer()) is None
    assert module._index(Layer(2, 3)) is None


def test_where_torch_cannot_compile_decoding_goes_on_and_says_it_once(backend):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found.\nSee the manual.")

    backend(broken)
    model = tiny_model()
    plain = generate(model, None, PROMPTS, max_new_tokens=8, fast=False)
    with pytest.warns(UserWarning, match=r"without torch\.compile: No working C\+\+ compiler found\.$") as told:
        got = generate(model, None, PROMPTS, max_new_tokens=8, compile=True)
    assert got.new_tokens == plain.new_tokens
    assert len(told) == 1
    assert generate(model, None, PROMPTS, max_new_tokens=8, compile=True).new_tokens == plain.new_tokens
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_layers_own_error_is_raised(graphs):
    class Layer(nn.Module):
        def forward(self, x):
            return x @ torch.ones(3, 3)

    layer = Layer()
    with compiled([layer]), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, 2))


def test_seconds_are_logged_once_for_a_shape(graphs, caplog):
    caplog.set_level(logging.INFO, logger="redrafter")
    for _ in range(2):
        generate(tiny_model(), None, PROMPTS, max_new_tokens=8, compile=True)
    (line,) = caplog.messages
    assert line.startswith("compiled LlamaDecoderLayer in ")
    assert 0 < float(line.split()[-2]) < 60


def test_the_command_says_how_long_it_compiled(model_folder, say, graphs):
    words = ("generate", "--model", model_folder, "--no-drafter", "--prompt", "ab", "--max-new-tokens", 4)
    status, plain, err = say(*words, "--no-fast")
    assert status == 0, err
    assert "compiled" not in err
    status, out, err = say(*words, "--compile")
    assert status == 0, err
    assert out == plain
    assert [line.split(" in ")[0] for line in err.splitlines()][:-1] == ["compiled LlamaDecoderLayer"]


def test_shapes_are_tuned_for_compiled_layers_where_that_is_asked_for(
    model_folder, drafter_folder, tmp_path, say, graphs
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Once"}')
    words = ["tune", "--model", model_folder, "--drafter", drafter_folder, "--prompts", tmp_path / "rows.jsonl"]
    words += ["--batch-sizes", 1, "--widths", 2, "--lengths", 2, "--budgets", 4, "--repeats", 1, "--context", 8]
    words += ["--max-new-tokens", 4]
    status, out, err = say(*words, "--output", tmp_path / "plain")
    assert (status, len(graphs)) == (0, 0), err
    assert "compiled" not in out
    status, out, err = say(*words, "--output", tmp_path / "compiled", "--compile")
    assert status == 0, err
    assert len(graphs) == 3, "trees of 1, 4 and 5 nodes"
    assert RecurrentDrafter.from_pretrained(tmp_path / "compiled").config.tuned_on.endswith(", compiled layers")


@pytest.mark.parametrize("told", [{"fast": False}, {}])
def test_nothing_is_compiled_where_the_kernels_do_not_run(told, graphs, monkeypatch):
    if not told:
        for name in KERNEL_USERS:
            monkeypatch.setattr(f"redrafter.{name}.has_kernels", lambda *_: False)
    model = tiny_model()
    generate(model, None, PROMPTS, max_new_tokens=4, compile=True, **told)
    assert not graphs
