"""The choice of a shape from what was measured, the acceptance that it rests on, and what is kept of it."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from conftest import tiny_model
from redrafter import (
    DrafterConfig,
    PromptLookup,
    RecurrentDrafter,
    RedrafterError,
    TwoModel,
    generate,
)
from redrafter.core.shapes import DraftShape
from redrafter.decoding.settings import ONE_TEXT
from redrafter.evaluation import tuning
from redrafter.evaluation.profiling import StepProfiler
from redrafter.evaluation.tuning import Texts, Tuned, interval, promising, record, shapes, tune
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads

MODEL = tiny_model()


def shape(width: int, length: int, budget: int | None = None, batch: int = 1) -> DraftShape:
    return DraftShape(batch=batch, beam_width=width, beam_length=length, node_budget=budget)


def tuned(ratios: list[float]) -> Tuned:
    return Tuned(shape(2, 3, batch=4), 2.0, drafted=[10 * one for one in ratios], undrafted=[10.0] * len(ratios))


@pytest.mark.parametrize(
    ("ratios", "pays"),
    [
        ([1.15] * 9, True),
        ([0.93] * 9, False),
        ([1.02] * 9, False),  # steady, but not worth it
        ([1.04] * 9, True),
        ([1.15, 1.2, 1.1, 1.15, 1.3, 1.2, 1.1, 1.2, 0.9], True),  # one outlier
        ([1.15, 1.2, 1.1, 1.15, 1.3, 1.2, 1.1, 0.95, 0.9], False),  # the spread reaches below 1
        ([2.0, 0.5] * 4 + [2.0], False),
        ([1.15] * 5, False),  # too few pairs for any confidence
    ],
)
def test_drafting_is_switched_on_only_where_the_gain_exceeds_the_spread(ratios, pays):
    found = tuned(ratios)
    assert found.speed_up == pytest.approx(sorted(ratios)[len(ratios) // 2])
    assert found.pays is pays
    assert found.shape == (shape(2, 3, batch=4) if pays else shape(1, 0, batch=4))


def test_the_interval_holds_the_median_as_often_as_it_says():
    assert interval([float(i) for i in range(1, 10)]) == (
        2,
        8,
    )  # both ends together miss in 2 * (1 + 9) / 2**9 = 3.9 % of all cases
    assert interval([float(i) for i in range(1, 7)]) == (1, 6)  # 2 / 2**6 = 3.1 %
    assert interval([float(i) for i in range(1, 6)]) == (-math.inf, math.inf)  # 2 / 2**5 = 6.3 %
    torch.manual_seed(0)
    drawn = torch.randn(4000, tuning.PAIRS).exp()  # skewed, of median 1
    held = sum(low <= 1 <= high for low, high in (interval(row.tolist()) for row in drawn)) / len(drawn)
    assert 0.945 < held < 0.977  # 96.1 % are expected; a fixed seed, else the odds of a false alarm are 1 in 10**6


def test_shapes_are_whole_beams_and_budgets_that_cut_what_is_weighed():
    found = shapes([1, 2], [2, 3], [3, 4, 6, 50])
    assert found == [
        shape(1, 2), shape(1, 3),  # a chain has nothing to cut
        shape(2, 2), shape(2, 2, 3), shape(2, 2, 4), shape(2, 2, 6),
        shape(2, 3), shape(2, 3, 4), shape(2, 3, 6),  # three nodes cannot hold three drafted tokens
    ]  # fmt: skip


class FakeProfiler(StepProfiler):
    """Durations by formula.  Counts what is measured."""

    def __init__(self, batch: int):
        self.batch, self.measured = batch, []

    def tree(self, one: DraftShape):
        return SimpleNamespace(size=one.node_budget or 1 + one.beam_width * one.beam_length)

    def verify_ms(self, nodes: int) -> float:
        self.measured.append("verify")
        return 8.0 + 0.05 * self.batch * nodes

    def draft_ms(self, one: DraftShape) -> float:
        self.measured.append("draft")
        return 0.1 * one.beam_width * one.beam_length

    def rest_ms(self, one: DraftShape) -> float:
        self.measured.append("rest")
        return 0.0


TOKENS = {shape(2, 2): 2.0, shape(4, 4): 3.0, shape(4, 4, 12): 2.9, shape(4, 4, 8): 2.6, shape(1, 2): 1.5}


def test_parts_choose_a_few_candidates():
    assert promising(FakeProfiler(1), TOKENS)[0] == shape(4, 4)
    assert promising(FakeProfiler(4), TOKENS)[0] == shape(4, 4, 12, batch=4)
    found = promising(FakeProfiler(16), TOKENS)
    assert len(found) == len(set(found)) == tuning.FINALISTS
    assert {one.batch for one in found} == {16}


def test_no_part_is_timed_twice():
    profiler = FakeProfiler(1)
    promising(profiler, TOKENS)
    assert profiler.measured.count("verify") == 5  # 5, 17, 12, 8 and 3 nodes
    assert profiler.measured.count("draft") == 4  # both budgets are one search


class Calls:
    """Complete calls of a machine on which everything takes as long as `speeds` says; counts them."""

    def __init__(self, speeds, drift=0.0):
        self.speeds, self.drift, self.made = speeds, drift, []

    def __call__(self, one: DraftShape | None, number: int) -> float:
        self.made.append((one, number))
        return self.speeds[one] * (1 - self.drift) ** len(self.made)


FINALISTS = [shape(2, 3), shape(4, 4), shape(4, 4, 8)]


def test_complete_calls_decide_whatever_the_parts_promised():
    calls = Calls({None: 100.0, shape(2, 3): 93.0, shape(4, 4): 80.0, shape(4, 4, 8): 120.0})
    found = tune(FINALISTS, {one: 3.0 for one in FINALISTS}, calls)
    assert found.shape == shape(4, 4, 8)
    assert found.speed_up == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    slow = Calls({None: 100.0, shape(2, 3): 93.0, shape(4, 4): 80.0, shape(4, 4, 8): 90.0})
    found = tune(FINALISTS, {one: 3.0 for one in FINALISTS}, slow)
    assert found.candidate == shape(2, 3)
    assert (found.shape.beam_length, found.speed_up) == (0, pytest.approx(0.93))


def test_pairs_are_of_the_same_prompts_and_take_turns_so_that_a_drift_favours_neither():
    calls = Calls({None: 100.0} | dict.fromkeys(FINALISTS, 100.0), drift=0.01)
    found = tune(FINALISTS, {one: 3.0 for one in FINALISTS}, calls)
    assert len(calls.made) == 1 + 3 + tuning.SCREENED * 3 + 2 * tuning.PAIRS
    pairs = calls.made[-2 * tuning.PAIRS :]
    for (one, number), (other, same) in zip(pairs[::2], pairs[1::2], strict=True):
        assert number == same
        assert {one, other} == {None, found.candidate}
    assert {one for one, _ in pairs[::2]} == {None, found.candidate}
    screened = {number for _, number in calls.made[: -2 * tuning.PAIRS]}
    assert not screened & {number for _, number in pairs}, "what chose the shape does not measure it"
    assert not found.pays


def test_a_complete_call_is_one_of_generate(monkeypatch):
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=4)
    prompts = [[5, 9, 12], [7], [30, 31]]
    texts = Texts.written(MODEL, drafter, prompts, max_new_tokens=6)
    made, clock = [], iter(range(0, 100, 2))

    def watched(*args, **told):
        made.append((args[1:], told))
        return generate(*args, **told)

    monkeypatch.setattr(tuning, "generate", watched)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert texts.tokens_per_second(shape(2, 2, 4), 1, batch=2, compile=False) == 2 * 6 / 2
    assert texts.tokens_per_second(None, 1, batch=2, compile=False) == 2 * 6 / 2
    told = {"compile": False, "max_new_tokens": 6, **ONE_TEXT}
    drawn = [prompts[2], prompts[0]]
    assert made[0] == ((drafter, drawn), told | {"shape": shape(2, 2, 4)})
    assert made[1] == ((None, drawn), told | {"shape": None})


def test_the_time_of_a_tuning_is_estimated_from_short_calls(monkeypatch):
    clock = iter(range(0, 1000, 8))  # every call lasts 8 seconds, so a token half a second
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = tuning.estimate(MODEL, [[5, 9], [7]], [1, 4], max_new_tokens=64, eos_token_id=())
    calls = 1 + 3 + 2 * 3 + 2 * 9
    assert found == (2 * 1 + 2 * calls) * 64 * 0.5


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
    told = one.model_dump(exclude={"batch", "lookup"}) | {"lookup": False}
    stats = generate(MODEL, drafter, prompts, max_new_tokens=24, **told, **law).stats
    assert [row.input_ids[len(p) :] for row, p in zip(texts.rows, prompts, strict=True)] == generate(
        MODEL, None, prompts, max_new_tokens=24, **law
    ).new_tokens
    assert texts.tokens_per_step(one) == pytest.approx(1 + stats.accepted / stats.steps)
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
    assert config.shape(4) == shape(2, 3)
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

    monkeypatch.setattr("redrafter.utils.hub.os.replace", full)
    with pytest.raises(RedrafterError, match="could not be written: No space left"):
        record(folder, [shape(2, 3)], "here")
    assert DrafterConfig.from_file(folder / "config.json") == before
    assert not list(folder.glob(".*"))
