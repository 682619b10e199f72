"""The drafter that is chosen if the user names none."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from conftest import refusal, tiny_model
from redrafter import Engine, RecurrentDrafter, RedrafterError, generate, stream
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import ShapeOverrides
from redrafter.proposers.automatic import LEAST, LENGTH, NODES, PUBLISHED, LikelyLookup, automatic
from redrafter.proposers.base import resolved_shape
from redrafter.proposers.loading import load_drafter
from redrafter.targets.target import Target

MODEL = tiny_model()


@pytest.fixture
def own(model_folder, drafter_folder, tmp_path):
    """A model's folder with a drafter inside."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(drafter_folder, folder / "drafter")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def named(name: str) -> transformers.PreTrainedModel:
    model = tiny_model()
    model.config._name_or_path = name
    return model


def test_a_drafter_in_the_folder_of_the_model_is_chosen(own, model_folder, tmp_path):
    assert automatic(own).path == tmp_path / "model" / "drafter"
    assert isinstance(load_drafter("auto", own), RecurrentDrafter)
    (tmp_path / "model" / "drafter" / "config.json").unlink()
    assert automatic(own).path is None, "a folder of that name without a drafter"
    assert isinstance(load_drafter("auto", own), LikelyLookup)


def test_a_published_drafter_is_chosen_where_the_checkout_is(tmp_path, monkeypatch):
    (published, folder), *_ = PUBLISHED.items()
    monkeypatch.chdir(tmp_path)
    local = f"/somewhere/{published.rpartition('/')[2]}"
    assert automatic(named(published)).path is None
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text("{}")
    for name in (published, local):
        assert str(automatic(named(name)).path) == folder
        assert published in automatic(named(name)).reason
    assert automatic(named("owner/another")).path is None
    assert automatic(named("")).path is None


def test_the_python_interfaces_accept_the_name(own):
    prompts, told = [[5, 9, 12, 5, 9], [7]], {"max_new_tokens": 24}
    for model, drafts in ((own, True), (MODEL, False)):
        alone = generate(model, None, prompts, **told).new_tokens
        out = generate(model, "auto", prompts, **told)
        assert out.new_tokens == alone
        assert bool(out.stats.accepted_by_position[LENGTH:]) == drafts, "with a head, lookup drafts deeper"
        tokens = [token for event in stream(model, "auto", prompts[:1], **told) for token in event.tokens]
        assert tokens == alone[0]
        with Engine(model, "auto", slots=2, max_length=64) as engine:
            assert engine.submit(prompts[0], **told).result().new_tokens == alone[0]


def tree_for(*texts: list[int], width: int = 1):
    shape = LikelyLookup().shape(len(texts)).model_copy(update={"beam_width": width})
    proposer = LikelyLookup().proposer(Target(MODEL), shape)
    text = torch.zeros(len(texts), 40, dtype=torch.long)
    for row, tokens in enumerate(texts):
        text[row, : len(tokens)] = torch.tensor(tokens)
    number = torch.arange(len(texts))
    length = torch.tensor([len(tokens) - 1 for tokens in texts])
    rows = RowState(number, number, text, length=length, alive=torch.ones_like(number))
    return proposer.propose(None, rows, torch.zeros(len(texts), 1, 4), SamplingNoise())


@pytest.mark.parametrize("width", [1, 3])
def test_each_row_drafts_what_is_likely_and_nothing_else(width):
    once, circle = [3, *range(10, 20), 3], [20, 21, 22, 23] * 6
    tree = tree_for([5, 6, 7], once, circle, width=width)
    assert tree.valid.sum(dim=1).tolist() == [1, 1, 1 + LENGTH], "nothing new, nor after one equal token"
    twice = tree_for([3, 4, *range(10, 20), 3, 4], width=width)
    assert 1 < int(twice.valid.sum()) <= LENGTH
    assert LEAST > 0.25


def test_without_a_likely_match_a_step_on_a_cpu_runs_the_root_alone():
    assert tree_for([5, 6, 7], [3, *range(10, 20), 3]).trimmed().size == 1


def test_large_batches_draft_less():
    sizes = [batch * (1 + LikelyLookup().shape(batch).beam_length) for batch in (1, 2, 4, 8, 16)]
    assert sizes[0] == 1 + LENGTH
    assert sizes == sorted(sizes)
    assert max(sizes) <= NODES
    assert LikelyLookup().proposer(Target(MODEL), LikelyLookup().shape(NODES)) is None
    for lookup in (False, True):  # either way the text is all that drafts
        shape = resolved_shape(LikelyLookup(), 1, ShapeOverrides(beam_length=3, lookup=lookup))
        assert LikelyLookup().proposer(Target(MODEL), shape).length == 3


def test_a_drafter_of_another_model_in_the_folder_is_an_error(own, tmp_path):
    RecurrentDrafter.for_target(tiny_model(hidden_size=64)).save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "model" / "drafter", dirs_exist_ok=True)
    with pytest.raises(RedrafterError, match="This drafter was made for"):
        generate(own, "auto", [[5]], max_new_tokens=4)


def test_auto_is_no_folder(say):
    assert "auto" in refusal(say("info", "auto"))
