"""`redrafter bench` and `redrafter sweep` as a user types them; no test depends on a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from types import SimpleNamespace

import pytest

from conftest import refusal
from redrafter.bench import units

MAIN = "from redrafter.cli import main; main()"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def data(tmp_path):
    rows = [
        {"question_id": i, "category": name, "turns": [f"{name} {i}", "more"]}
        for name in ("qa", "maths")
        for i in (1, 2, 3)
    ]
    path = tmp_path / "spec.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def common(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "REPEATS", 1)
    return ["--model", model_folder, "--prompts", data, "--output", tmp_path / "out", "--device", "cpu"]


@pytest.fixture
def command(common, drafter_folder):
    words = ["bench", *common, "--method", f"ours={drafter_folder}", "--method", f"ours, wide={drafter_folder}@10x2:9"]
    return [*words, "--limit", 1, "--rounds", 2, "--max-new-tokens", 6, "--answers", "none", "--no-transformers"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def test_methods_are_compared_by_task(say, command, tmp_path):
    out = tmp_path / "out"
    status, told, err = say(*command, "--transformers", "--batches", "2", "--seed", 4)
    assert status == 0, err
    assert "not measured" not in err
    assert "In greedy decoding ours" in told
    assert "At temperature 1 ours" in told
    assert f"Wrote {out / 'results.json'}, {out / 'report.md'}, {out / 'report.html'}." in told
    found = json.loads((out / "results.json").read_text())
    assert found["data"] == {
        "files": ["spec.jsonl"],
        "categories": {name: {"prompts": 1, "of": 3} for name in ("qa", "maths")},
        "too_long": 0,
    }
    assert [one["method"] for one in found["methods"]] == ["autoregressive", "transformers", "ours", "ours, wide"]
    assert found["methods"][3]["shape"] == "10 beams of 2 tokens, the 9 most probable nodes"
    assert found["methods"][2]["path"] == "drafter"
    assert found["methods"][2]["parameters"] > 0
    assert found["asked"]["seed"] == 4
    assert found["about"]["model"] == "tiny"
    speed = {(one["method"], one["category"], one["temperature"]): one for one in found["speed"]}
    assert len(speed) == 4 * 3 * 2
    for (method, category, _), one in speed.items():
        assert one["rounds"] == 2
        if method.startswith("ours"):
            assert one["texts_equal"] == one["texts"] == (2 if category == "all" else 1)
            assert len(one["acceptance_by_position"]) == (2 if "wide" in method else 3)
            assert one["speed_up"]["least"] <= one["speed_up"]["median"] <= one["speed_up"]["most"]
            assert one["speed_up_over_transformers"]["median"] > 0
    assert speed["ours, wide", "qa", 0.0]["nodes_per_draft"] == 8.0
    assert {(one["method"], one["batch"]) for one in found["batches"]} == {
        (name, batch) for name in ("autoregressive", "transformers", "ours", "ours, wide") for batch in (2,)
    }
    assert len(found["parts"]) == 3 * 2


def test_complete_calls_are_timed_at_every_length_for_which_there_is_room(say, command, tmp_path):
    out = tmp_path / "out"
    status, told, err = say(*command, "--answers", "4,12,512", "--transformers")
    assert status == 0, err
    assert "not measured: Answers of 512 tokens: the model's context of 128 tokens has no room." in " ".join(
        err.split()
    )
    assert told.startswith("In greedy decoding ours")
    assert "the fastest end to end: a call that writes 12 tokens takes" in told
    assert told[told.index("Wrote") :].count("\n| 12 | ours |") == 2, "a short table comes last"
    found = json.loads((out / "results.json").read_text())
    calls = {(one["method"], one["temperature"], one["new_tokens"]): one for one in found["calls"]}
    assert len(calls) == 4 * 2 * 2
    for (method, _, new_tokens), one in calls.items():
        assert new_tokens in (4, 12)
        assert (one["rounds"], one["requests"]) == (2, 2)
        assert one["seconds"]["least"] <= one["seconds"]["median"] <= one["seconds"]["most"]
        assert ("speed_up" in one) == ("speed_up" in one["decoding"]) == (method != "autoregressive")
        assert ("speed_up_over_transformers" in one) == (method != "transformers")
    assert found["asked"]["answers"] == [4, 12, 512]
    page = (out / "report.md").read_text()
    assert page.index("## End to end") < page.index("## Speed by task")
    assert "Answers of 512 tokens" in page


def test_the_usual_lengths_are_measured_where_the_context_has_room(say, command, tmp_path):
    cut = command.index("--answers")
    words = [*command[:cut], "--rounds", 1, "--temperatures", 0]
    status, _, err = say(*words)
    assert status == 0
    for length in (128, 512):
        assert f"Answers of {length} tokens" in err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["new_tokens"] for one in found["calls"]} == {64}
    assert {one["method"] for one in found["calls"]} == {"autoregressive", "transformers", "ours", "ours, wide"}


def test_a_second_run_measures_only_what_is_missing(say, command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = [*command, "--rounds", 1, "--temperatures", 0]
    assert say(*command)[0] == 0
    whole = (out / "measurements.jsonl").read_text()
    results, lines = json.loads((out / "results.json").read_text()), whole.splitlines(keepends=True)
    kept = lines[:4]
    note = json.loads((out / "measurements.jsonl.state").read_text())
    (out / "measurements.jsonl").write_text("".join(kept) + lines[4][:20])  # as a kill leaves it
    note |= {"done": 4, "bytes": len("".join(kept).encode())}
    (out / "measurements.jsonl.state").write_text(json.dumps(note))
    assert say(*command)[0] == 0
    again = (out / "measurements.jsonl").read_text()
    assert again.startswith("".join(kept))
    key = ("kind", "method", "category", "temperature", "batch", "round")
    assert [[one[k] for k in key] for one in lines_of(out)] == [[json.loads(one)[k] for k in key] for one in lines]
    assert json.loads((out / "results.json").read_text())["methods"] == results["methods"]

    def never(*args):
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(units.Runner, "measure", never)
    before = (out / "results.json").read_text()
    assert say(*command)[0] == 0
    assert (out / "results.json").read_text() == before
    sentence = refusal(say(*command, "--seed", 9))
    assert "was begun with other options (seed 0, now 9): give the same" in sentence
    assert "temperatures [0.0], now [0.5]" in refusal(say(*command, "--temperatures", "0.5"))


def test_what_there_was_no_time_for_is_told_and_measured_by_the_same_command(say, command, tmp_path, monkeypatch):
    command = [*command, "--rounds", 1, "--temperatures", 0]
    with monkeypatch.context() as patched:
        patched.setattr(units, "time", SimpleNamespace(monotonic=count().__next__))  # each look at it is a second
        status, _, err = say(*command, "--minutes", 0)
        assert (status, "Nothing could be measured: 13 measurements, for which no time was left" in err) == (2, True)
        status, _, err = say(*command, "--minutes", 0.07)
    assert status == 0
    assert "not measured: 9 measurements, for which no time was left; the same command goes on" in err
    begun = (tmp_path / "out" / "measurements.jsonl").read_text()
    assert begun.count("\n") == 4
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["speed"]) == 4 + 1, "all categories of one"
    status, _, err = say(*command)
    assert (status, "not measured" in err) == (0, False)
    assert (tmp_path / "out" / "measurements.jsonl").read_text().startswith(begun)
    assert len(lines_of(tmp_path / "out")) == 13


def test_other_weights_at_the_same_place_are_other_work(say, command, drafter_folder):
    command = [*command, "--rounds", 1, "--temperatures", 0]
    assert say(*command)[0] == 0
    config = drafter_folder / "config.json"
    moment = config.stat().st_mtime_ns
    try:
        os.utime(config, ns=(moment, moment + 10**9))
        assert "begun with other options (weights" in refusal(say(*command))
    finally:
        os.utime(config, ns=(moment, moment))
    assert say(*command, "--overwrite")[0] == 0


def test_a_killed_run_goes_on(say, command, tmp_path):
    command = [*map(str, command), "--temperatures", "0"]
    words = [sys.executable, "-c", MAIN, *command]
    killed = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "out" / "measurements.jsonl"
    while killed.poll() is None and not (file.exists() and file.read_text().count("\n") > 3):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out" / "report.html").exists()
    note = json.loads(file.with_name("measurements.jsonl.state").read_text())
    before = file.read_bytes()[: note["bytes"]]
    assert before.count(b"\n") > 2
    status, _, err = say(*command)
    assert status == 0, err
    assert file.read_bytes().startswith(before)
    keys = [
        json.dumps([one[k] for k in ("kind", "method", "category", "temperature", "round")])
        for one in lines_of(file.parent)
    ]
    assert len(keys) == len(set(keys)) == 2 * 3 * 2 + 3 + 2 * 2
    assert (tmp_path / "out" / "report.html").exists()


def test_a_sweep_goes_through_shapes_batches_and_temperatures(say, common, drafter_folder, tmp_path):
    words = ["sweep", *common, "--method", f"ours={drafter_folder}@4x3:9", "--limit", 1, "--rounds", 1]
    words += ["--method", "lookup=prompt-lookup@1x2"]
    words += ["--widths", "1,3,300", "--lengths", "1,2", "--budgets", "3,4,6,99", "--batches", "2"]
    status, told, err = say(*words, "--temperatures", "0,1", "--max-new-tokens", 10)
    assert status == 0, err
    refused = "not measured: 300 beams of 1 token; 300 beams of 2 tokens: beam_width must lie between 1 and"
    assert refused in " ".join(err.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    sweep = found["sweep"]
    assert [(one["shape"]["width"], one["shape"]["length"]) for one in sweep["grid"]] == [
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 2),
    ]
    assert [one["shape"]["budget"] for one in sweep["budgets"]] == [4, 6]
    for one in sweep["grid"]:
        assert one["texts_equal"] == one["texts"] == 2
        assert len(one["acceptance_by_position"]) == one["shape"]["length"]
    nodes = {(one["shape"]["width"], one["shape"]["length"]): one["nodes_per_draft"] for one in sweep["grid"]}
    assert nodes[1, 1] == 1
    assert nodes[1, 2] == 2
    assert nodes[3, 1] == 3
    assert 4 <= nodes[3, 2] <= 6  # beams that begin alike are folded
    assert [one["nodes_per_draft"] for one in sweep["budgets"]] == [3, 5]
    assert [(one["temperature"], one["coupled"]) for one in sweep["temperatures"]] == [(0, True), (1, True), (1, False)]
    known, blind = (one["tokens_per_step"] for one in sweep["temperatures"][1:])
    assert known > blind
    assert {(one["method"], one["batch"]) for one in found["batches"]} == {("autoregressive", 2), ("ours", 2)}
    assert [(one["method"], one["texts_equal"]) for one in sweep["heads"]] == [("ours", 2), ("lookup", 2)]
    assert [one["method"] for one in found["methods"]] == ["autoregressive", "ours", "lookup"]
    assert {one["method"] for one in found["parts"]} == {"autoregressive", "ours", "lookup"}
    for axis, places in (("widths", [(3, 1), (4, 1)]), ("batches", [(4, 2)])):
        tree, chains = (
            {(one["shape"]["width"], one["batch"]): one for one in sweep["folding"][axis] if one["folded"] is folded}
            for folded in (True, False)
        )
        assert sorted(tree) == sorted(chains) == places
        for place, one in tree.items():
            assert one["speed_up_over_unfolded"]["median"] > 0
            assert one["acceptance_by_position"] == chains[place]["acceptance_by_position"]
            assert one["nodes_per_draft"] < chains[place]["nodes_per_draft"] == 3 * place[0]
    assert "<h2>Width and length</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert "Wrote" in told


def test_the_demo_measures_all_that_is_bundled_and_needs_nothing_else(say, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "REPEATS", 1)
    words = ["bench", "--demo", "--output", tmp_path, "--rounds", 1, "--limit", 1, "--max-new-tokens", 16]
    words += ["--answers", 8]
    status, told, err = say(*words, "--temperatures", "0", "--device", "cpu")
    assert status == 0, err
    assert "20 of 20 drafted texts are, token for token, what is written without a drafter." in told
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["data"]["categories"]) == ["dialogue", "maths", "code", "open question"]
    assert [one["method"] for one in found["methods"]] == [
        "autoregressive", "transformers", "recurrent", "Medusa", "EAGLE", "two models", "prompt lookup",
    ]  # fmt: skip
    assert [(one["method"], one["requests"]) for one in found["calls"]] == [
        (one["method"], 4) for one in found["methods"]
    ]
    assert set(found["asked"]["methods"].values()) == {"the bundled pair's", "prompt-lookup"}
    assert found["methods"][2] == {
        "method": "recurrent",
        "path": "drafter",
        "weights": "one recurrent step, 3 blocks of width 512",
        "draft_vocabulary": "2,048 of 4,096 tokens",
        "shape": "4 beams of 5 tokens, the 21 most probable nodes",
        "parameters": found["methods"][2]["parameters"],
    }
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()
    whole = next(one for one in found["speed"] if (one["method"], one["category"]) == ("recurrent", "all"))
    assert whole["tokens_per_step"] > 2
    assert not found["failed"]


def test_a_sweep_of_the_demo_has_its_rivals_beside_the_recurrent_drafter(say, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "REPEATS", 1)
    words = ["sweep", "--demo", "--output", tmp_path, "--rounds", 1, "--limit", 1, "--max-new-tokens", 6]
    axes = ["--widths", "2", "--lengths", "1", "--budgets", "4", "--batches", "1", "--temperatures", "0"]
    status, _, err = say(*words, *axes, "--device", "cpu")
    assert status == 0, err
    found = json.loads((tmp_path / "results.json").read_text())
    names = ["recurrent", "Medusa", "EAGLE", "two models", "prompt lookup"]
    assert [one["method"] for one in found["sweep"]["heads"]] == names
    assert {one["shape"]["width"] for one in found["sweep"]["grid"]} == {2}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "x"], "x is neither a folder nor a hub repository within reach"),
        (["--method", "a=b@"], "as ours=folder@10x4:32"),
        (["--minutes", "-1"], "'--minutes'"),
        (["--rounds", "0"], "'--rounds'"),
        (["--method", "=b"], "--method takes NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES"),
        (["--method", "ours=b"], "--method ours: the name is taken"),
        (["--temperatures", "-1"], "--temperatures takes numbers from 0, as 0,0.7,1, not '-1'."),
        (["--temperatures", "warm"], "--temperatures takes numbers from 0"),
        (["--answers", "0"], "--answers takes whole numbers from 1"),
        (["--batches", "0"], "--batches takes whole numbers from 1"),
        (["--by", "question_id", "--max-new-tokens", "127"], "prompts are too long for the model"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dtype", "float8"], "--dtype float8 is not one of"),
        (["--demo"], "--demo brings its own model: leave --model out."),
        (["--max-new-tokens", "127"], "prompts are too long for the model and for what is to be written."),
    ],
)
def test_bad_input_is_one_sentence(say, command, tmp_path, words, sentence):
    assert sentence in refusal(say(*command, *words))
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_what_is_missing_is_asked_for(say, tmp_path, model_folder, drafter_folder):
    out = ["--output", tmp_path / "out"]
    assert "Give a --model, or --demo" in refusal(say("bench", *out))
    assert "Give a --method" in refusal(say("bench", *out, "--model", model_folder))
    assert "Give --prompts" in refusal(say("sweep", *out, "--model", model_folder, "--method", f"a={drafter_folder}"))
    assert "--widths takes whole numbers" in refusal(say("sweep", *out, "--demo", "--widths", "x"))
