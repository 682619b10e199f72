"""The choice of a shape from what was measured, the acceptance that it rests on, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from conftest import tiny_model
from redrafter import DrafterConfig, PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate, tuning
from redrafter.config import DecodingShape
from redrafter.eagle import EagleHead
from redrafter.medusa import MedusaHeads
from redrafter.tuning import Texts, Timed, choose, record, shapes, tune

MODEL = tiny_model()


def shape(width: int, length: int, budget: int | None = None, batch: int = 1) -> DecodingShape:
    return DecodingShape(batch=batch, beam_width=width, beam_length=length, node_budget=budget)


ALONE = Timed(shape(1, 0), 1.0, 10.0)


@pytest.mark.parametrize(
    ("drafted", "best"),
    [
        ([(2.0, 12.0), (3.0, 15.0), (4.0, 30.0)], 1),  # neither the most tokens nor the shortest step
        ([(2.0, 19.5), (2.0, 25.0)], None),  # 1.026 times as fast does not pay
        ([(2.0, 19.4)], 0),  # 1.031 times does
        ([(1.0, 12.0)], None),
    ],
)
def test_the_most_tokens_a_second_win_where_drafting_pays(drafted, best):
    timed = [Timed(shape(2, 2 + i), tokens, ms) for i, (tokens, ms) in enumerate(drafted)]
    assert choose(ALONE, timed) is (ALONE if best is None else timed[best])


def test_tokens_a_second_are_of_all_rows():
    assert Timed(shape(2, 2, batch=8), 2.5, 10.0).tokens_per_second == 2000


def test_shapes_are_whole_beams_and_budgets_that_cut_what_is_weighed():
    found = shapes([1, 2], [2, 3], [3, 4, 6, 50])
    assert found == [
        shape(1, 2), shape(1, 3),  # a chain has nothing to cut
        shape(2, 2), shape(2, 2, 3), shape(2, 2, 4), shape(2, 2, 6),
        shape(2, 3), shape(2, 3, 4), shape(2, 3, 6),  # three nodes cannot hold three drafted tokens
    ]  # fmt: skip


class Bench:
    """Times by formula; counts what is measured."""

    def __init__(self, batch: int, *, lie: float = 0.0):
        self.batch, self.lie, self.measured = batch, lie, []

    def tree(self, one: DecodingShape):
        return SimpleNamespace(size=one.node_budget or 1 + one.beam_width * one.beam_length)

    def verify_ms(self, nodes: int) -> float:
        self.measured.append("verify")
        return 8.0 + 0.05 * self.batch * nodes

    def draft_ms(self, one: DecodingShape) -> float:
        self.measured.append("draft")
        return 0.1 * one.beam_width * one.beam_length

    def rest_ms(self, one: DecodingShape) -> float:
        self.measured.append("rest")
        return 0.0

    def step_ms(self, one: DecodingShape | None = None) -> float:
        self.measured.append("step")
        if one is None:
            return 8.0 + 0.05 * self.batch
        return 8.0 + 0.05 * self.batch * self.tree(one).size + self.draft_ms(one) + self.lie * one.beam_length


TOKENS = {shape(2, 2): 2.0, shape(4, 4): 3.0, shape(4, 4, 12): 2.9, shape(4, 4, 8): 2.6, shape(1, 2): 1.5}


def test_the_larger_the_batch_the_smaller_the_tree_until_drafting_does_not_pay():
    found = {batch: tune(Bench(batch), TOKENS) for batch in (1, 4, 16, 400)}
    assert [found[batch].best.shape for batch in found] == [
        shape(4, 4), shape(4, 4, 12, batch=4), shape(4, 4, 8, batch=16), shape(1, 0, batch=400)
    ]  # fmt: skip
    assert found[4].best.tokens_per_step == 2.9
    assert found[4].best.milliseconds == pytest.approx(8 + 2.4 + 1.6)
    assert found[4].speed_up == pytest.approx(2.9 / 12 * 8.2)
    assert found[400].speed_up == 1.0


def test_whole_steps_decide_among_the_finalists():
    only = {shape(4, 4, 12): 2.9, shape(2, 2): 2.0}
    assert tune(Bench(1), only).best.shape == shape(4, 4, 12)
    assert tune(Bench(1, lie=4.0), only).best.shape.beam_length == 0
    assert tune(Bench(1, lie=2.5), only).best.shape == shape(2, 2)


def test_no_part_is_timed_twice():
    bench = Bench(1)
    tune(bench, TOKENS)
    steps = bench.measured.count("step")
    assert steps == 1 + tuning.FINALISTS
    assert bench.measured.count("verify") == 5  # 5, 17, 12, 8 and 3 nodes
    assert bench.measured.count("draft") - (steps - 1) == 4  # both budgets are one search


@pytest.mark.parametrize("law", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "seed": 5}])
@pytest.mark.parametrize(
    ("kind", "one"),
    [("recurrent", shape(4, 2)), ("recurrent", shape(40, 3, 60)), ("recurrent", shape(1, 4)),
     ("medusa", shape(40, 3, 20)), ("eagle", shape(40, 3, 60)), ("two models", shape(2, 3)),
     ("prompt lookup", shape(1, 4))],
)  # fmt: skip
def test_acceptance_is_what_decoding_counts(law, kind, one):
    torch.manual_seed(0)
    drafter = {
        "recurrent": lambda: RecurrentDrafter.for_target(MODEL),
        "medusa": lambda: MedusaHeads.fresh(MODEL, beam_width=40),
        "eagle": lambda: EagleHead.fresh(MODEL),
        "two models": lambda: TwoModel(MODEL),
        "prompt lookup": PromptLookup,
    }[kind]()
    prompts = [[5, 9, 12], [7], [30, 31]]
    texts = Texts.written(MODEL, drafter, prompts, max_new_tokens=24, **law)
    told = one.model_dump(exclude={"batch"})
    stats = generate(MODEL, drafter, prompts, max_new_tokens=24, **told, **law).stats
    assert [row.input_ids[len(p) :] for row, p in zip(texts.rows, prompts, strict=True)] == generate(
        MODEL, None, prompts, max_new_tokens=24, **law
    ).new_tokens
    drafts = stats.steps - len(prompts)
    assert texts.tokens_per_step(one) == pytest.approx(1 + stats.accepted / drafts)
    if one.beam_width == 40 or kind == "two models":
        assert stats.accepted > 0, "what is never accepted shows nothing"


def test_rows_to_time_are_cut_from_the_texts():
    torch.manual_seed(0)
    texts = Texts.written(MODEL, RecurrentDrafter.for_target(MODEL), [[5, 9, 12], [7]], max_new_tokens=4)
    assert texts.length == (7 + 5) // 2
    whole = texts.rows[0].input_ids + texts.rows[1].input_ids
    rows = [row.prompt for row in texts.again(3, 5).rows]
    assert rows == [whole[:5], whole[5:10], (whole + whole)[10:15]]


@pytest.fixture
def folder(drafter_folder, tmp_path):
    return shutil.copytree(drafter_folder, tmp_path / "drafter")


def test_what_was_found_is_kept_beside_all_that_the_config_says(folder):
    told = json.loads((folder / "config.json").read_text()) | {"architectures": ["Drafter"]}
    (folder / "config.json").write_text(json.dumps(told))
    found = [shape(2, 3, 5), shape(1, 0, batch=4)]
    assert record(folder, found, "here") == folder
    assert json.loads((folder / "config.json").read_text()) == told | {
        "shapes": [
            {"batch": 1, "beam_width": 2, "beam_length": 3, "node_budget": 5},
            {"batch": 4, "beam_width": 1, "beam_length": 0},
        ],
        "tuned_on": "here",
    }
    config = RecurrentDrafter.from_pretrained(folder).config
    assert (list(config.shapes), config.tuned_on) == (found, "here")
    record(folder, found[1:], "there")
    assert list(RecurrentDrafter.from_pretrained(folder).config.shapes) == found[1:]


@pytest.mark.parametrize("head", [MedusaHeads, EagleHead])
def test_every_head_keeps_its_shapes(tmp_path, head):
    head.fresh(MODEL).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    record(tmp_path, [shape(2, 3)], "here")
    config = head.from_pretrained(tmp_path).config
    assert (list(config.shapes), config.tuned_on) == ([shape(2, 3)], "here")
    assert config.drafting(4) == (2, 3, None)
    lines = (tmp_path / "config.json").read_text().splitlines()
    assert len(lines) == len(before.splitlines()) + 8, "a tree's paths stand on a line each"
    with pytest.raises(ValidationError):
        record(tmp_path, [shape(2, 9), shape(1, 1)], "there")
    assert head.from_pretrained(tmp_path).config == config


def test_a_copy_is_a_whole_folder_and_the_source_is_left_alone(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert record(folder, [shape(2, 3)], "here", tmp_path / "copy") == tmp_path / "copy"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    names = {path.relative_to(folder) for path in before}
    assert {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()} == names
    assert RecurrentDrafter.from_pretrained(tmp_path / "copy").config.tuned_on == "here"


def test_a_write_that_fails_leaves_the_config_as_it_was(folder, monkeypatch):
    before = DrafterConfig.from_file(folder / "config.json")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redrafter.hub.os.replace", full)
    with pytest.raises(RedrafterError, match="could not be written: No space left"):
        record(folder, [shape(2, 3)], "here")
    assert DrafterConfig.from_file(folder / "config.json") == before
    assert not list(folder.glob(".*"))
