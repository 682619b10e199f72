"""The caller's model is never changed by decoding: other threads may run or train it, also while a stream is open."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from types import MethodType

import accelerate
import pytest
import torch
from torch import nn

from conftest import greedy, tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate, stream
from redrafter.targets.isolation import isolated, original

PROMPTS = [[5, 9, 12, 3], [7], [8, 8, 4]]
TOKENS = torch.tensor([PROMPTS[0]])


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def gradients(model, tokens=TOKENS) -> int:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return sum(one.grad is not None and bool(one.grad.any()) for one in model.parameters())


def methods(model):
    return {
        "none": None,
        "recurrent": RecurrentDrafter.for_target(model, beam_width=3, beam_length=3),
        "two models": TwoModel(tiny_model(seed=1)),
        "its own draft": TwoModel(model),
    }


@pytest.mark.parametrize("method", ["none", "recurrent", "two models", "its own draft"])
@pytest.mark.parametrize("options", [{}, {"fast": False}, {"do_sample": True, "seed": 1}])
def test_an_open_stream_does_not_show_in_the_model(method, options):
    model = tiny_model("qwen2").train()
    drafter = methods(model)[method]
    kinds = [(type(part), set(vars(part)), part.training) for part in model.modules()]
    config = copy.deepcopy(model.config)
    places = [one.data_ptr() for one in model.parameters()]
    before = gradients(model)
    events = stream(model, drafter, PROMPTS, max_new_tokens=30, **options)
    for _ in range(3):
        next(events)
    assert [(type(part), set(vars(part)), part.training) for part in model.modules()] == kinds
    assert [one.data_ptr() for one in model.parameters()] == places
    assert model.config == config
    assert gradients(model) == before == sum(1 for _ in model.parameters())
    other = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.01)
    changed = logits(model.eval())
    events.close()
    assert torch.equal(logits(model), changed)
    assert not torch.allclose(logits(other.eval()), changed)


def test_forward_passes_in_other_threads_are_not_affected():
    model = tiny_model(attention_dropout=0.3)
    drafter, expected = methods(model)["recurrent"], logits(model)
    text = greedy(model, PROMPTS[0], 8)
    stop, errors = threading.Event(), []

    def decode(**options):
        while not stop.is_set():
            if generate(model, drafter, PROMPTS[:1], max_new_tokens=8, **options).new_tokens != [text]:
                errors.append("another text")

    threads = [threading.Thread(target=decode, kwargs={"fast": fast}) for fast in (True, False)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
            assert greedy(model, PROMPTS[0], 8) == text
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_dropout_changes_no_text_in_training_mode():
    model = tiny_model(attention_dropout=0.5)
    expected = greedy(model, PROMPTS[0], 16)
    model.train()
    for drafter in methods(model).values():
        assert generate(model, drafter, PROMPTS[:1], max_new_tokens=16).new_tokens == [expected]
    assert all(part.training for part in model.modules())


def test_a_drafter_may_be_trained_while_it_drafts():
    model = tiny_model()
    drafter = RecurrentDrafter.for_target(model, beam_width=3, beam_length=3).train()
    kinds = [(type(part), part.training) for part in drafter.modules()]
    events = stream(model, drafter, PROMPTS, max_new_tokens=30)
    next(events)
    assert [(type(part), part.training) for part in drafter.modules()] == kinds


def _resize(model):
    model.resize_token_embeddings(72)


def _permute(model):
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight.data
        weight[:] = weight.flip(0).clone()


def _replace_layer(model):
    torch.manual_seed(3)
    model.model.layers[0].mlp.down_proj = nn.Linear(model.config.intermediate_size, 32, bias=False)


def _fewer_layers(model):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize("change", [_resize, _permute, _replace_layer, _fewer_layers, nn.Module.double])
def test_a_model_may_be_changed_between_calls(change):
    model = tiny_model()
    options = {"max_new_tokens": 12}
    for drafter in (None, PromptLookup(), methods(model)["recurrent"]):
        generate(model, drafter, PROMPTS[:1], **options)
    change(model)
    expected = greedy(model, PROMPTS[0], 12)
    for drafter in (None, PromptLookup(), TwoModel(model)):
        assert generate(model, drafter, PROMPTS[:1], **options).new_tokens == [expected]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_model_that_accelerate_offloads_completely(offload, tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    drafter = methods(model)["recurrent"]
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(one.device.type == "meta" for one in model.parameters())
    for method in (None, drafter, PromptLookup()):
        assert generate(model, method, PROMPTS, max_new_tokens=12).new_tokens == expected
    assert all(one.device.type == "meta" for one in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_adapters_with_trainable_tokens():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    expected = greedy(model, PROMPTS[0], 12)
    for drafter in (None, PromptLookup(), methods(model)["recurrent"]):
        assert generate(model, drafter, PROMPTS[:1], max_new_tokens=12).new_tokens == [expected]


def test_a_copy_refers_to_copies_where_the_original_refers_to_originals():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(2, 2)
            self.listed, self.named = [self.part], {"part": self.part}
            self.register_buffer("count", torch.zeros(1))
            self.bound = self.part.forward

        def forward(self, x):
            self.count = self.count + 1
            return self.bound(x)

    model = Whole().train()
    model.part.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, model.part)
    own = isolated(model)
    assert original(own) is model
    assert original(model) is model
    assert own.part.weight is model.part.weight
    assert own.listed[0] is own.named["part"] is own.part is own.bound.__self__ is own.part.forward.__self__
    assert not own.part.training
    own(torch.ones(1, 2))
    assert (float(own.count), float(model.count)) == (1, 0)
    own.part.register_forward_hook(lambda *_: None)
    assert not model.part._forward_hooks
    model.part.weight = nn.Parameter(torch.zeros(2, 2))
    assert own.part.weight is model.part.weight, "weights assigned later are shared"
    reference = torch.utils.weak.weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None or original(own) is not None


def test_a_model_that_is_compiled_in_place():
    model = tiny_model()
    expected = greedy(model, PROMPTS[0], 8)
    model.compile(backend="eager")
    assert generate(model, None, PROMPTS[:1], max_new_tokens=8).new_tokens == [expected]


def test_a_function_in_place_of_forward_runs_unless_it_would_run_dropout():
    model = tiny_model()
    expected = greedy(model, PROMPTS[0], 8)
    attention = model.model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert generate(model, None, PROMPTS[:1], max_new_tokens=8).new_tokens == [expected]
    model.train()
    with pytest.raises(RedrafterError, match=r"call model\.eval\(\) first"):
        generate(model, None, PROMPTS[:1], max_new_tokens=8)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("default", "error:Decoding continues without torch.compile")  # torch has other warnings
def test_forward_passes_beside_captured_steps(compile, unchecked):
    """Captures of this thread raise no error in another one, and change no result there."""
    model = tiny_model().cuda().train()
    drafter = RecurrentDrafter.for_target(model, beam_width=3, beam_length=3)
    tokens, text = TOKENS.cuda(), generate(model, None, PROMPTS, max_new_tokens=20, fast=False).new_tokens
    with torch.no_grad():
        expected = model(tokens).logits
    stop, errors = threading.Event(), []

    def run():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    if not torch.equal(model(tokens).logits.cpu(), expected.cpu()):
                        errors.append("other logits")
        except Exception as error:
            errors.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(10):
            found = generate(model, drafter, PROMPTS, max_new_tokens=20, compile=compile)
            assert found.new_tokens == text
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert gradients(model, tokens) == sum(1 for _ in model.parameters())
