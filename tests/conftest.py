"""Shared by all tests: shapes are checked at every call, `torch.empty` returns NaN, models are tiny and random."""

from __future__ import annotations

import contextlib
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
import warnings

import checked_imports

with warnings.catch_warnings():  # other packages warn at import
    warnings.simplefilter("ignore")
    gc.disable()
    import transformers

    with contextlib.suppress(ImportError):
        import torchao.quantization  # noqa: F401
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401

    if "redrafter" in sys.modules:
        raise RuntimeError("redrafter was imported before its shapes could be checked")
    checked_modules = (
        "core",
        "decoding",
        "engine",
        "evaluation",
        "heads",
        "proposers",
        "targets",
        "training",
    )
    checked_imports.install([f"redrafter.{name}" for name in checked_modules])

from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch.utils._python_dispatch import TorchDispatchMode

settings.register_profile(
    "redrafter",
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=40,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure that runs models takes many minutes
)
settings.load_profile("redrafter")
torch.set_num_threads(1)  # the suite runs in parallel
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process ends with one of them while another is idle."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")


def pytest_collection_finish():
    """Excludes imported modules from garbage collection, which would take seconds."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup():
    """In every test the first calls are checked."""
    checked_imports.CALLS.clear()


MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
"""Models that others trained; tests that use them are skipped if they are absent."""


TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The shape of a model for tests, with the names of most families' configs."""


def tiny_model(family: str = "llama", *, seed: int = 0, spread: float = 0.4, **changes: object):
    """A random causal language model of two layers; a large `spread` avoids near ties between logits."""
    torch.manual_seed(seed)
    shape = TINY | {"initializer_range": spread}
    if family == "gpt2":
        shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 2}
        shape |= {"initializer_range": spread, "bos_token_id": 1, "pad_token_id": 0}
    if family == "gemma3_text":
        shape |= {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    if family in ("bloom", "mpt"):
        shape = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "n_heads": 4}
    if family == "mamba":
        shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    config = transformers.AutoConfig.for_model(family, **(shape | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None  # a random model would stop at random
    return model


@pytest.fixture(scope="session")
def llama():
    return tiny_model()


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs the command line in this process; returns exit status, stdout and stderr, without progress lines."""
    from redrafter.cli import main
    from redrafter.utils import progress

    monkeypatch.setattr(progress, "FIRST", 600.0)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def captured(monkeypatch) -> list:
    """The step of every call of decoding, with what came of its capture."""
    from redrafter.engine import runner

    made = []

    class Kept(runner.Captured):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(runner, "Captured", Kept)
    return made


@pytest.fixture
def unchecked():
    """Types of arguments are not checked, as for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refusal(answer: tuple[int, str, str]) -> str:
    """The sentence of an error that a command reports."""
    status, out, err = answer
    assert status == 2, (out, err)
    assert out == ""
    assert err.startswith("redrafter: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


class AsksNothing(TorchDispatchMode):
    """Fails if the host reads a tensor or a shape depends on its values, which a CUDA graph cannot capture."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.READS), f"{func} reads the device"
        return func(*args, **(kwargs or {}))


class Given:
    """A drafting method with a given proposer."""

    layers = ()

    def __init__(self, proposer):
        self.given = proposer

    def shape(self, batch):
        from redrafter.core.shapes import DraftShape

        return DraftShape(beam_width=1, beam_length=self.given.length)

    def proposer(self, target, shape):
        return self.given


def random_tree(batch: int, size: int, *, vocabulary: int, malformed: bool, generator: torch.Generator):
    """Random trees with equal siblings and nodes in any order; malformed ones have contradictory fields."""
    from redrafter.core.tree import DraftTree, ancestors_of

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    parents = torch.zeros((batch, size), dtype=torch.long)
    depth = torch.zeros_like(parents)
    for row in range(batch):
        order = [0, *(1 + torch.randperm(size - 1, generator=generator)).tolist()]
        for place, node in enumerate(order[1:], start=1):
            parents[row, node] = order[int(draw(place, 1))]
            depth[row, node] = depth[row, parents[row, node]] + 1
    ancestors = ancestors_of(parents, max_depth=size)
    valid = draw(6, batch, size) > 0
    tokens = draw(vocabulary, batch, size)
    if malformed:  # about one field in eight, also of the root
        wrong = draw(8, batch, size) == 0
        parents = torch.where(wrong, draw(3 * size, batch, size) - size, parents)
        depth = torch.where(draw(8, batch, size) == 0, draw(2 * size, batch, size) - 2, depth)
        ancestors = ancestors ^ (draw(8 * size, batch, size, size) == 0)
    return DraftTree(tokens, parents, depth, valid, ancestors)


def rooted(root: torch.Tensor):
    """The state of rows whose text is only its last token."""
    from redrafter.core.rows import RowState

    none = torch.zeros_like(root)
    return RowState(none, none, root[:, None], length=none, alive=none + 1)


def sampled_noise(gumbel: torch.Tensor, **law: object):
    """Noise [B, depths, V] for rows that are sampled by a law, as tensors of settings."""
    from redrafter.core.rows import SamplingNoise
    from redrafter.decoding.state import sampler_of, settings_of
    from redrafter.engine.request import request

    (row,) = request(tiny_model(), None, [[5]], do_sample=True, **law).rows
    settings = settings_of(row, count=len(gumbel), vocabulary=gumbel.shape[-1], device=gumbel.device)
    return SamplingNoise(gumbel, sampler_of({0: row}).features, settings)


def prompts_read(asked, *, slots: int = 64):
    """A runner that has read the prompts of a request and has made no step."""
    from redrafter.engine.runner import Runner
    from redrafter.engine.scheduler import Scheduler

    runner = Runner({1: asked.decoder}, batch=len(asked.rows), slots=slots, fast=asked.fast)
    scheduler = Scheduler(runner)
    for task in asked.tasks:
        scheduler.add(task)
    scheduler.read_prompts()
    return runner


def launch_ahead(monkeypatch) -> None:
    """Steps are launched before the last one was read, as on a GPU whose steps are short."""
    from redrafter.engine.runner import Runner

    monkeypatch.setattr(Runner, "launches_ahead", True)


def read_in_parts(monkeypatch, first: int, later: int) -> None:
    """A forward pass reads at most so many tokens of a prompt: from its beginning, and later."""
    from redrafter.engine import scheduler

    monkeypatch.setattr(scheduler, "MAX_READ", first)
    monkeypatch.setattr(scheduler, "MAX_LATER_READ", later)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The tokens that transformers' greedy generation adds to a prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def shared_models() -> Path:
    if not MODELS.is_dir():
        pytest.skip("the shared models are not available")
    return MODELS


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model with a byte tokenizer and a chat template, as a user would have it on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<s>{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>a:{% endif %}",
    ).save_pretrained(folder)
    tiny_model(vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drafter_folder(model_folder) -> Path:
    """A random drafter for it."""
    from redrafter import RecurrentDrafter

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    folder = model_folder.parent / "drafter"
    RecurrentDrafter.for_target(model, beam_length=3, beam_width=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(model_folder) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of `model_folder`: one token per byte."""
    return transformers.AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def make_server(byte_tokenizer):
    """Makes HTTP servers over an engine without a model (`tests/server/serving.py`)."""
    from serving import make_local

    return partial(make_local, byte_tokenizer)
