"""The order of units, their records, resumed runs, and the measurement of units."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.bench import runner as runner_module
from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS, BenchMethod
from redrafter.bench.runner import Runner, RunOptions, call_prompts
from redrafter.bench.tasks import ALL, Tasks
from redrafter.bench.units import Comparison, Unit, comparison_units, rotated, run
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import chain
from redrafter.proposers import Proposer, method_of
from redrafter.utils.journal import Journal

MODEL = tiny_model()
TASKS = Tasks({"a": [[5, 9, 12], [7, 8]], "b": [[30]]}, {"a": 2, "b": 1}, 0)


def plan(only_sampling=(), **options):
    methods = [AUTOREGRESSIVE, "ours", TRANSFORMERS]
    return comparison_units(methods, ["a", "b"], Comparison([0.0, 1.0], **options), only_sampling)


def test_duplicates_in_greedy_decoding_are_measured_only_with_sampling():
    without, full = plan({"ours"}, batches=[2]), plan(batches=[2])
    skipped = [unit for unit in full if unit not in without]
    assert skipped == [unit for unit in full if unit.method == "ours" and unit.temperature == 0]
    assert {unit.kind for unit in without if unit.method == "ours"} == {"decode", "together", "parts", "texts"}


def make_runner(drafter=None, **options) -> Runner:
    if drafter is None:
        torch.manual_seed(0)
        drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=4)
    methods = {
        AUTOREGRESSIVE: BenchMethod(AUTOREGRESSIVE),
        "ours": BenchMethod("ours", "x", method_of(drafter)),
        TRANSFORMERS: BenchMethod(TRANSFORMERS),
    }
    return Runner(MODEL, methods, TASKS, RunOptions(**({"max_new_tokens": 12, "seed": 3} | options)))


def test_methods_are_measured_next_to_each_other_in_rotating_order():
    assert [rotated("abc", number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        [*"abc"],
    ]
    decoded = [one for one in plan(rounds=3) if one.kind == "decode"]
    blocks = [decoded[begin : begin + 3] for begin in range(0, len(decoded), 3)]
    for block in blocks:
        assert len({(one.category, one.temperature, one.round) for one in block}) == 1
        assert {one.method for one in block} == {AUTOREGRESSIVE, "ours", TRANSFORMERS}
    assert {block[0].method for block in blocks} == {AUTOREGRESSIVE, "ours", TRANSFORMERS}
    assert len(blocks) == 3 * 2 * 2


def test_texts_and_parts_come_last_and_exclude_transformers():
    found = plan(batches=[1, 2], rounds=2)
    assert len(found) == len(set(found))
    together = [one for one in found if one.kind == "together"]
    assert len(together) == 2 * 2 * 2 * 3
    assert all(one.category == ALL for one in together)
    last = found[-8:]
    assert {(one.kind, one.method) for one in last} == {("parts", AUTOREGRESSIVE), ("parts", "ours"), ("texts", "ours")}


def test_complete_calls_come_first_from_the_longest_answers():
    found = plan(answers=[6, 12], rounds=2)
    calls = [one for one in found if one.kind == "calls"]
    assert [one.new_tokens for one in calls[:6]] == [12] * 3 + [6] * 3
    assert found[:12] == calls[:12]
    assert len(calls) == 2 * 2 * 2 * 3
    assert {(one.category, one.batch) for one in calls} == {(ALL, 1)}
    for begin in range(0, len(calls), 3):
        assert {one.method for one in calls[begin : begin + 3]} == {AUTOREGRESSIVE, "ours", TRANSFORMERS}, (
            "next to each other"
        )


def test_calls_use_prompts_that_leave_room_for_the_answer():
    own = make_runner()
    assert call_prompts(TASKS, 12, MODEL) == TASKS.mixed
    assert call_prompts(TASKS, 126, MODEL) == [[30], [7, 8]]
    assert call_prompts(TASKS, 127, MODEL) == [[30]]
    assert call_prompts(TASKS, 128, MODEL) == []
    for name in (AUTOREGRESSIVE, "ours", TRANSFORMERS):
        found = own.measure(Unit("calls", name, ALL, 0.0, 1, 0, 12))
        assert {len(values) for values in found.values()} == {3}
        assert found["decoding_tokens"] == [11] * 3
        for total, *parts in zip(
            *(found[f"{part}seconds"] for part in ("", "first_token_", "starting_", "decoding_")), strict=True
        ):
            assert total == pytest.approx(sum(parts))
    few = make_runner(requests=2).measure(Unit("calls", AUTOREGRESSIVE, ALL, 0.0, 1, 0, 12))
    assert len(few["seconds"]) == 2


def test_each_prompt_is_read_once_before_its_first_token_is_timed(monkeypatch):
    own, runs = make_runner(), []
    original = own._run

    def recording(unit, prompts, new_tokens):
        runs.append((prompts, new_tokens))
        return original(unit, prompts, new_tokens)

    monkeypatch.setattr(own, "_run", recording)
    monkeypatch.setattr(runner_module, "WARM_UP_TOKENS", 5)
    unit = Unit("decode", "ours", "a", 0.0, 1, 0)
    own.measure(unit)
    assert runs == [([[5, 9, 12]], 5), (TASKS.prompts["a"], 1), (TASKS.prompts["a"], 12)]
    runs.clear()
    own.measure(unit._replace(round=1))
    own.measure(unit._replace(category="b"))
    assert runs == [(TASKS.prompts["a"], 12), ([[30]], 1), ([[30]], 12)]
    runs.clear()
    own.measure(unit._replace(method=TRANSFORMERS))
    assert runs[0] == ([[5, 9, 12]], 12), "transformers compiles for the length of the call"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_unit_records_what_generate_does(temperature):
    own = make_runner()
    sampling = own.options.sampling(temperature)
    expected = {"do_sample": True, "temperature": 0.8, "seed": 3} if temperature else {"do_sample": False}
    assert sampling.items() >= expected.items()
    for name in (AUTOREGRESSIVE, "ours"):
        unit = Unit("decode", name, "a", temperature, 2, 0)
        found = own.measure(unit)
        own.remember(unit, found)
        expected = generate(MODEL, own.methods[name].method, TASKS.prompts["a"], max_new_tokens=12, **sampling)
        assert found["texts"] == expected.new_tokens
        assert found["accepted_by_position"] == expected.stats.accepted_by_position
        assert (found["drafted"], found["accepted"]) == (expected.stats.drafted, expected.stats.accepted)
    comparison = own.measure(Unit("texts", "ours", "a", temperature, 2, 0))
    assert comparison == {"texts_compared": 2, "parted": []}
    assert "texts" not in own.measure(Unit("decode", "ours", "a", temperature, 2, 1)), "only the first round has them"


def test_a_diverging_text_is_recorded_with_its_margin():
    own = make_runner()
    for name in (AUTOREGRESSIVE, "ours"):
        unit = Unit("decode", name, "b", 0.0, 1, 0)
        own.remember(unit, own.measure(unit))
    (text,) = own.texts["ours", "b", 0.0, 1]
    own.texts["ours", "b", 0.0, 1] = [[*text[:4], (text[4] + 1) % 61, *text[5:]]]
    (parted,) = own.measure(Unit("texts", "ours", "b", 0.0, 1, 0))["parted"]
    assert (parted["row"], parted["position"], parted["explained"]) == (0, 4, False)
    assert parted["margin"] > parted["rounding"] > 0


def test_rows_of_a_fixed_batch_do_not_finish(monkeypatch):
    first = generate(MODEL, None, TASKS.mixed, max_new_tokens=3).new_tokens[0][1]
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", first)
    own = make_runner()
    for name in (AUTOREGRESSIVE, TRANSFORMERS):
        found = own.measure(Unit("together", name, ALL, 0.0, 3, 0))
        assert found["tokens"] == 3 * found["steps"]
        assert found["steps"] == (11 if name == TRANSFORMERS else 10)  # the last step of ours is not timed
        assert len(found["first_token_seconds"]) == 3
    assert own._groups(1) == TASKS.mixed
    assert own._groups(2) == TASKS.mixed[:2]
    assert own._groups(7) == TASKS.repeated(7)


def test_parts_are_timed_at_the_average_text_length(monkeypatch):
    own = make_runner()
    unit = Unit("decode", AUTOREGRESSIVE, "a", 0.0, 2, 0)
    with pytest.raises(RedrafterError, match="there are no texts"):
        own.measure(unit._replace(kind="parts"))
    own.remember(unit, own.measure(unit))
    monkeypatch.setattr(runner_module, "REPEATS", 1)
    undrafted, ours = (own.measure(Unit("parts", name, ALL, 0.0, 2, 0)) for name in (AUTOREGRESSIVE, "ours"))
    assert undrafted["context"] == ours["context"] == (3 + 12 + 2 + 12) // 2
    assert (undrafted["nodes"], undrafted["draft_ms"]) == (1, 0.0)
    assert 1 < ours["nodes"] <= 13 + 10
    assert all(one > 0 for one in (undrafted["step_ms"], ours["step_ms"], ours["draft_ms"], ours["verify_ms"]))


class Remembering(Proposer):
    """A method with a memory: it drafts the root's token again, one node deep."""

    layers, length, size = (), 1, 2

    def __init__(self):
        self.seen = []

    def shape(self, batch):
        return DraftShape(beam_width=1, beam_length=1)

    def proposer(self, target, shape):
        self.target = target
        return self

    def memory(self, *, batch, slots):
        return self.target.new_cache(batch=batch, slots=slots + 5)

    def read(self, memory, chunk, states):
        assert memory is not None

    def propose(self, memory, rows, context, noise):
        self.seen.append((memory.slots, memory.visible))
        return chain(torch.stack((rows.root, rows.root), dim=1))


def test_a_method_with_a_memory_is_measured_and_timed(monkeypatch):
    monkeypatch.setattr(runner_module, "REPEATS", 1)
    method = Remembering()
    own = make_runner(method)
    for name in (AUTOREGRESSIVE, "ours"):
        unit = Unit("decode", name, "a", 0.0, 2, 0)
        own.remember(unit, own.measure(unit))
    assert own.measure(Unit("texts", "ours", "a", 0.0, 2, 0))["parted"] == []
    method.seen.clear()
    found = own.measure(Unit("parts", "ours", ALL, 0.0, 2, 0))
    assert found["nodes"] == 2
    assert method.seen
    (slots,) = {seen for seen, _ in method.seen}
    assert all(found["context"] < visible <= slots for _, visible in method.seen)


class Counting:
    """A fake runner that counts the units it measures and fails for one method."""

    def __init__(self, failing: str = ""):
        self.measured, self.remembered, self.failing = [], [], failing

    def measure(self, unit):
        self.measured.append(unit)
        if unit.method == self.failing:
            raise RedrafterError("No memory.")
        return {"number": len(self.measured)}

    def remember(self, unit, found):
        self.remembered.append(unit)


def test_a_run_resumes_with_the_missing_units(tmp_path):
    full, path, options = plan(rounds=2), tmp_path / "measurements.jsonl", {"seed": 3}
    first = Counting()
    records, failed = run(full[:5], first, Journal(path, options), lambda unit: None)
    assert (first.measured, failed) == (full[:5], [])
    lines = path.read_text()
    path.write_text(lines + '{"kind": "deco')  # a line that was not finished
    again, reported = Counting(), []
    found, _ = run(full, again, Journal(path, options), reported.append)
    assert again.measured == full[5:]
    assert again.remembered == reported == full
    assert found[:5] == records
    assert path.read_text().startswith(lines)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [one.round for one in full]
    assert not run(full, last := Counting(), Journal(path, options), reported.append)[1]
    assert last.measured == []
    with pytest.raises(RedrafterError, match="seed 3, now 4"):
        Journal(path, {"seed": 4})


def test_a_failed_unit_is_reported_and_not_tried_in_other_rounds(tmp_path):
    full, own = plan(rounds=3), Counting("ours")
    records, failed = run(full, own, Journal(tmp_path / "m.jsonl", {}), lambda unit: None)
    ours = [one for one in own.measured if one.method == "ours"]
    assert len(ours) == len({one._replace(round=0) for one in ours}) == len(failed)
    assert "ours on a, temperature 1, 1 rows: No memory." in failed
    assert all(one["method"] != "ours" for one in records)
    assert len(records) == sum(one.method != "ours" for one in full)


def test_labels_of_earlier_versions_are_read(tmp_path):
    path, unit = tmp_path / "m.jsonl", Unit("decode", "ours, uncoupled", ALL, 1.0, 1, 0)
    run([unit._replace(method="ours, without the draws' noise")], Counting(), Journal(path, {}), lambda unit: None)
    again = Counting()
    (record,), _ = run([unit], again, Journal(path, {}), lambda unit: None)
    assert (again.measured, record["method"]) == ([], "ours, uncoupled")
