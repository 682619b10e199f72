"""The order of what is measured, what is kept of it, and what a run that was stopped does again."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.bench import units
from redrafter.bench.contenders import ALONE, THEIRS, Contender
from redrafter.bench.tasks import ALL, Tasks
from redrafter.bench.units import Asked, Runner, Unit, of_bench, requests, run, turned
from redrafter.training.journal import Journal

MODEL = tiny_model()
TASKS = Tasks({"a": [[5, 9, 12], [7, 8]], "b": [[30]]}, {"a": 2, "b": 1}, 0)


def plan(**told):
    how = {"batch": 1, "batches": [], "rounds": 1} | told
    return of_bench([ALONE, "ours", THEIRS], ["a", "b"], [0.0, 1.0], **how)


def test_what_greedy_decoding_does_not_tell_apart_is_measured_where_tokens_are_drawn():
    found, whole = plan(batches=[2], only_sampling={"ours"}), plan(batches=[2])
    assert [one for one in whole if one not in found] == [
        one for one in whole if one.method == "ours" and one.temperature == 0
    ]
    assert {one.kind for one in found if one.method == "ours"} == {"decode", "together", "parts", "texts"}


def runner(drafter=None, **told) -> Runner:
    if drafter is None:
        torch.manual_seed(0)
        drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=4)
    contenders = {ALONE: Contender(ALONE), "ours": Contender("ours", "x", drafter), THEIRS: Contender(THEIRS)}
    return Runner(MODEL, contenders, TASKS, Asked(**({"max_new_tokens": 12, "seed": 3, "compile": False} | told)))


def test_methods_take_their_turn_next_to_each_other_each_first_once():
    assert [turned("abc", number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        [*"abc"],
    ]
    decoded = [one for one in plan(rounds=3) if one.kind == "decode"]
    blocks = [decoded[begin : begin + 3] for begin in range(0, len(decoded), 3)]
    for block in blocks:
        assert len({(one.category, one.temperature, one.round) for one in block}) == 1
        assert {one.method for one in block} == {ALONE, "ours", THEIRS}
    assert {block[0].method for block in blocks} == {ALONE, "ours", THEIRS}
    assert len(blocks) == 3 * 2 * 2


def test_texts_and_parts_come_last_and_are_not_of_transformers():
    found = plan(batches=[1, 2], rounds=2)
    assert len(found) == len(set(found))
    together = [one for one in found if one.kind == "together"]
    assert len(together) == 2 * 2 * 2 * 3
    assert all(one.category == ALL for one in together)
    last = found[-8:]
    assert {(one.kind, one.method) for one in last} == {("parts", ALONE), ("parts", "ours"), ("texts", "ours")}


def test_complete_calls_come_first_the_longest_answers_before_the_shorter():
    found = plan(answers=[6, 12], rounds=2)
    calls = [one for one in found if one.kind == "calls"]
    assert [one.new_tokens for one in calls[:6]] == [12] * 3 + [6] * 3
    assert found[:12] == calls[:12]
    assert len(calls) == 2 * 2 * 2 * 3
    assert {(one.category, one.batch) for one in calls} == {(ALL, 1)}
    for begin in range(0, len(calls), 3):
        assert {one.method for one in calls[begin : begin + 3]} == {ALONE, "ours", THEIRS}, "one right after the other"


def test_calls_are_of_one_prompt_each_that_leaves_room():
    own = runner()
    assert requests(TASKS, 12, MODEL) == TASKS.mixed
    assert requests(TASKS, 126, MODEL) == [[30], [7, 8]]
    assert requests(TASKS, 127, MODEL) == [[30]]
    assert requests(TASKS, 128, MODEL) == []
    for name in (ALONE, "ours", THEIRS):
        found = own.measure(Unit("calls", name, ALL, 0.0, 1, 0, 12))
        assert {len(values) for values in found.values()} == {3}
        assert found["decoding_tokens"] == [11] * 3
        for whole, *parts in zip(
            *(found[f"{part}seconds"] for part in ("", "first_token_", "starting_", "decoding_")), strict=True
        ):
            assert whole == pytest.approx(sum(parts))
    few = runner(requests=2).measure(Unit("calls", ALONE, ALL, 0.0, 1, 0, 12))
    assert len(few["seconds"]) == 2


def test_every_prompt_is_read_before_its_first_token_is_timed(monkeypatch):
    own, runs = runner(), []
    plain = own._run

    def watched(unit, prompts, new_tokens):
        runs.append((prompts, new_tokens))
        return plain(unit, prompts, new_tokens)

    monkeypatch.setattr(own, "_run", watched)
    monkeypatch.setattr(units, "WARM_UP", 5)
    unit = Unit("decode", "ours", "a", 0.0, 1, 0)
    own.measure(unit)
    assert runs == [([[5, 9, 12]], 5), (TASKS.prompts["a"], 1), (TASKS.prompts["a"], 12)]
    runs.clear()
    own.measure(unit._replace(round=1))
    own.measure(unit._replace(category="b"))
    assert runs == [(TASKS.prompts["a"], 12), ([[30]], 1), ([[30]], 12)]
    runs.clear()
    own.measure(unit._replace(method=THEIRS))
    assert runs[0] == ([[5, 9, 12]], 12), "what transformers compiles depends on the length of the call"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_unit_is_what_decoding_does(temperature):
    own = runner()
    law = own.asked.law(temperature)
    assert law == ({"do_sample": True, "temperature": 0.8, "seed": 3} if temperature else {"do_sample": False})
    for name in (ALONE, "ours"):
        unit = Unit("decode", name, "a", temperature, 2, 0)
        found = own.measure(unit)
        own.remember(unit, found)
        expected = generate(MODEL, own.contenders[name].method, TASKS.prompts["a"], max_new_tokens=12, **law)
        assert found["texts"] == expected.new_tokens
        assert found["accepted_by_position"] == expected.stats.accepted_by_position
        assert (found["drafted"], found["accepted"]) == (expected.stats.drafted, expected.stats.accepted)
    held = own.measure(Unit("texts", "ours", "a", temperature, 2, 0))
    assert held == {"texts_compared": 2, "parted": []}
    assert "texts" not in own.measure(Unit("decode", "ours", "a", temperature, 2, 1)), "one round keeps them"


def test_a_text_that_parts_is_told_with_its_reason():
    own = runner()
    for name in (ALONE, "ours"):
        unit = Unit("decode", name, "b", 0.0, 1, 0)
        own.remember(unit, own.measure(unit))
    (text,) = own.texts["ours", "b", 0.0, 1]
    own.texts["ours", "b", 0.0, 1] = [[*text[:4], (text[4] + 1) % 61, *text[5:]]]
    (parted,) = own.measure(Unit("texts", "ours", "b", 0.0, 1, 0))["parted"]
    assert (parted["row"], parted["position"], parted["explained"]) == (0, 4, False)
    assert parted["margin"] > parted["rounding"] > 0


def test_together_no_row_ends(monkeypatch):
    first = generate(MODEL, None, TASKS.mixed, max_new_tokens=3).new_tokens[0][1]
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", first)
    own = runner()
    for name in (ALONE, THEIRS):
        found = own.measure(Unit("together", name, ALL, 0.0, 3, 0))
        assert found["tokens"] == 3 * found["steps"]
        assert found["steps"] == (11 if name == THEIRS else 10)  # of ours the last step is not timed
        assert len(found["first_token_seconds"]) == 3
    assert own._groups(1) == TASKS.mixed
    assert own._groups(2) == TASKS.mixed[:2]
    assert own._groups(7) == TASKS.repeated(7)


def test_parts_stand_where_the_texts_are_on_average(monkeypatch):
    own = runner()
    unit = Unit("decode", ALONE, "a", 0.0, 2, 0)
    with pytest.raises(RedrafterError, match="there are no texts"):
        own.measure(unit._replace(kind="parts"))
    own.remember(unit, own.measure(unit))
    monkeypatch.setattr(units, "REPEATS", 1)
    alone, ours = (own.measure(Unit("parts", name, ALL, 0.0, 2, 0)) for name in (ALONE, "ours"))
    assert alone["context"] == ours["context"] == (3 + 12 + 2 + 12) // 2
    assert (alone["nodes"], alone["draft_ms"]) == (1, 0.0)
    assert 1 < ours["nodes"] <= 13
    assert all(one > 0 for one in (alone["step_ms"], ours["step_ms"], ours["draft_ms"], ours["verify_ms"]))


class Remembering:
    """A method that keeps a memory: it drafts the token that it remembers, one node deep."""

    layers, length, size, positions, modules = (), 1, 2, 1, ()

    def __init__(self):
        self.seen = []

    def drafting(self, batch, width=None, length=None, budget=None):
        return 1, 1, None

    def proposer(self, target, width, length, budget):
        self.target = target
        return self

    def prepare(self):
        return self

    def memory(self, *, batch, slots):
        return self.target.new_cache(batch=batch, slots=slots + 5)

    def read(self, memory, place, states, start):
        assert memory is not None

    def propose(self, memory, place, context, draw):
        from redrafter.core.tree import chain

        self.seen.append((memory.slots, memory.visible))
        return chain(torch.stack((place.root, place.root), dim=1))


def test_a_method_with_a_memory_is_measured_and_timed(monkeypatch):
    monkeypatch.setattr(units, "REPEATS", 1)
    method = Remembering()
    own = runner(method)
    for name in (ALONE, "ours"):
        unit = Unit("decode", name, "a", 0.0, 2, 0)
        own.remember(unit, own.measure(unit))
    assert own.measure(Unit("texts", "ours", "a", 0.0, 2, 0))["parted"] == []
    method.seen.clear()
    found = own.measure(Unit("parts", "ours", ALL, 0.0, 2, 0))
    assert found["nodes"] == 2
    slots = found["context"] + 2 * 2 + 5
    assert method.seen
    assert {seen for seen, _ in method.seen} == {slots}
    assert all(visible <= slots for _, visible in method.seen)


class Counting:
    """Stands in for a runner: counts what it is asked, and fails where it is told to."""

    def __init__(self, failing: str = ""):
        self.asked, self.remembered, self.failing = [], [], failing

    def measure(self, unit):
        self.asked.append(unit)
        if unit.method == self.failing:
            raise RedrafterError("No memory.")
        return {"number": len(self.asked)}

    def remember(self, unit, found):
        self.remembered.append(unit)


def test_a_run_goes_on_with_what_is_missing(tmp_path):
    whole, path, told = plan(rounds=2), tmp_path / "measurements.jsonl", {"seed": 3}
    first = Counting()
    records, failed = run(whole[:5], first, Journal(path, told), lambda unit: None)
    assert (first.asked, failed) == (whole[:5], [])
    lines = path.read_text()
    path.write_text(lines + '{"kind": "deco')  # the line that a kill cut off
    again, heard = Counting(), []
    found, _ = run(whole, again, Journal(path, told), heard.append)
    assert again.asked == whole[5:]
    assert again.remembered == heard == whole
    assert found[:5] == records
    assert path.read_text().startswith(lines)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [one.round for one in whole]
    assert not run(whole, last := Counting(), Journal(path, told), heard.append)[1]
    assert last.asked == []
    with pytest.raises(RedrafterError, match="begun with other options \\(seed 3, now 4\\)"):
        Journal(path, {"seed": 4})


def test_what_fails_is_told_and_not_tried_again_in_this_run(tmp_path):
    whole, own = plan(rounds=3), Counting("ours")
    records, failed = run(whole, own, Journal(tmp_path / "m.jsonl", {}), lambda unit: None)
    ours = [one for one in own.asked if one.method == "ours"]
    assert len(ours) == len({one._replace(round=0) for one in ours}) == len(failed)
    assert "ours on a, temperature 1, 1 rows: No memory." in failed
    assert all(one["method"] != "ours" for one in records)
    assert len(records) == sum(one.method != "ours" for one in whole)
