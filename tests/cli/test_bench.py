"""`redrafter bench` and `redrafter sweep` on the command line; no test depends on a duration."""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import refusal
from processes import Fork, signalled
from redrafter.bench import plots, runner, units


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
def quick(monkeypatch):
    """Fewer repetitions and no plots."""
    monkeypatch.setattr(runner, "REPEATS", 1)
    monkeypatch.setattr(runner, "WARM_UP_TOKENS", 1)
    monkeypatch.setattr(plots, "draw", lambda results: {})


@pytest.fixture
def common(quick, model_folder, data, tmp_path):
    return ["--model", model_folder, "--prompts", data, "--output", tmp_path / "out", "--device", "cpu"]


@pytest.fixture
def command(common, drafter_folder):
    words = ["bench", *common, "--method", f"ours={drafter_folder}", "--limit", 1, "--rounds", 1, "--temperatures", 0]
    return [*words, "--max-new-tokens", 6, "--answers", "none", "--no-transformers"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def test_methods_are_compared(say, command, drafter_folder, tmp_path):
    words = ["--method", f"ours, wide={drafter_folder}@10x2:9", "--transformers", "--temperatures", "0,1"]
    words += ["--rounds", 2, "--batches", "2", "--answers", "4,12,512", "--seed", 4]
    status, output, err = say(*command, *words)
    assert status == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_output(output, err, tmp_path / "out")
    check_conditions(results)
    check_speeds(results)
    check_calls(results)


def check_output(output: str, err: str, out: Path) -> None:
    assert err.count("not measured") == 1
    assert "not measured: Answers of 512 tokens" in err
    assert output.startswith("In greedy decoding, ours")
    assert "At temperature 1, ours" in output
    assert "the fastest method end to end: a call that generates 12 tokens takes" in output
    assert f"Wrote {out / 'results.json'}, {out / 'report.md'}, {out / 'report.html'}." in output
    assert output[output.index("Wrote") :].count("\n| 12 | ours |") == 2, "a short table comes last"
    page = (out / "report.md").read_text()
    assert page.index("## End to end") < page.index("## Decoding speed by category")
    assert "Answers of 512 tokens" in page


def check_conditions(results: dict) -> None:
    assert results["data"] == {
        "files": ["spec.jsonl"],
        "categories": {name: {"prompts": 1, "of": 3} for name in ("qa", "maths")},
        "too_long": 0,
    }
    assert [one["method"] for one in results["methods"]] == ["autoregressive", "transformers", "ours", "ours, wide"]
    assert results["methods"][3]["shape"] == "10 beams of 2 tokens, the 9 most probable nodes, with lookup"
    assert results["methods"][2]["path"] == "drafter"
    assert results["methods"][2]["parameters"] > 0
    assert results["asked"]["seed"] == 4
    assert results["asked"]["answers"] == [4, 12, 512]
    assert results["about"]["model"] == "tiny"


def check_speeds(results: dict) -> None:
    speed = {(one["method"], one["category"], one["temperature"]): one for one in results["speed"]}
    assert len(speed) == 4 * 3 * 2
    for (method, category, _), one in speed.items():
        assert one["rounds"] == 2
        if method.startswith("ours"):
            assert one["texts_equal"] == one["texts"] == (2 if category == "all" else 1)
            assert len(one["acceptance_by_position"]) == (8 if "wide" in method else 10)
            assert one["speed_up"]["least"] <= one["speed_up"]["median"] <= one["speed_up"]["most"]
            assert one["speed_up_over_transformers"]["median"] > 0
    assert speed["ours, wide", "qa", 0.0]["nodes_per_draft"] == 8.0
    names = ("autoregressive", "transformers", "ours", "ours, wide")
    assert {(one["method"], one["batch"]) for one in results["batches"]} == {(name, 2) for name in names}
    assert len(results["parts"]) == 3 * 2


def check_calls(results: dict) -> None:
    calls = {(one["method"], one["temperature"], one["new_tokens"]): one for one in results["calls"]}
    assert len(calls) == 4 * 2 * 2
    for (method, _, new_tokens), one in calls.items():
        assert new_tokens in (4, 12)
        assert (one["rounds"], one["requests"]) == (2, 2)
        assert one["seconds"]["least"] <= one["seconds"]["median"] <= one["seconds"]["most"]
        assert ("speed_up" in one) == ("speed_up" in one["decoding"]) == (method != "autoregressive")
        assert ("speed_up_over_transformers" in one) == (method != "transformers")


def test_the_default_lengths_are_measured_if_they_fit(say, command, tmp_path):
    status, _, err = say(*command[: command.index("--answers")])
    assert status == 0
    for length in (128, 512):
        assert f"Answers of {length} tokens" in err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["new_tokens"] for one in results["calls"]} == {64}
    assert {one["method"] for one in results["calls"]} == {"autoregressive", "transformers", "ours"}


def test_a_second_run_measures_only_missing_units(say, command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert say(*command)[0] == 0
    lines_before = (out / "measurements.jsonl").read_text()
    results, lines = json.loads((out / "results.json").read_text()), lines_before.splitlines(keepends=True)
    kept = lines[:4]
    note = json.loads((out / "measurements.jsonl.state").read_text())
    (out / "measurements.jsonl").write_text("".join(kept) + lines[4][:20])  # the last line is incomplete
    note |= {"done": 4, "bytes": len("".join(kept).encode())}
    (out / "measurements.jsonl.state").write_text(json.dumps(note))
    assert say(*command)[0] == 0
    again = (out / "measurements.jsonl").read_text()
    assert again.startswith("".join(kept))
    key = ("kind", "method", "category", "temperature", "batch", "round")
    assert [[one[k] for k in key] for one in lines_of(out)] == [[json.loads(one)[k] for k in key] for one in lines]
    assert json.loads((out / "results.json").read_text())["methods"] == results["methods"]

    def never(*args):
        raise AssertionError("everything is measured")

    monkeypatch.setattr(runner.Runner, "measure", never)
    before = (out / "results.json").read_text()
    assert say(*command)[0] == 0
    assert (out / "results.json").read_text() == before
    sentence = refusal(say(*command, "--seed", 9))
    assert "seed 0, now 9" in sentence
    assert "temperatures [0.0], now [0.5]" in refusal(say(*command, "--temperatures", "0.5"))


def test_units_that_exceed_the_time_are_reported_and_measured_later(say, command, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(units, "time", SimpleNamespace(monotonic=count().__next__))  # each reading is a second later
        status, _, err = say(*command, "--minutes", 0)
        assert (status, "Nothing could be measured: 8 measurements" in err) == (2, True)
        status, _, err = say(*command, "--minutes", 0.07)
    assert status == 0
    assert "not measured: 4 measurements" in err
    begun = (tmp_path / "out" / "measurements.jsonl").read_text()
    assert begun.count("\n") == 4
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["speed"]) == 4 + 2, (
        "two methods, two categories and their total"
    )
    status, _, err = say(*command)
    assert (status, "not measured" in err) == (0, False)
    assert (tmp_path / "out" / "measurements.jsonl").read_text().startswith(begun)
    assert len(lines_of(tmp_path / "out")) == 8


def test_changed_weights_are_an_error(say, command, drafter_folder):
    assert say(*command)[0] == 0
    config = drafter_folder / "config.json"
    moment = config.stat().st_mtime_ns
    try:
        os.utime(config, ns=(moment, moment + 10**9))
        assert "weights" in refusal(say(*command))
    finally:
        os.utime(config, ns=(moment, moment))
    assert say(*command, "--overwrite")[0] == 0


def test_a_killed_run_resumes(say, command, tmp_path):
    command = [*map(str, command), "--rounds", "2"]
    file = tmp_path / "out" / "measurements.jsonl"
    signalled(Fork(*command), signal.SIGKILL, lambda: file.exists() and file.read_text().count("\n") > 2)
    assert not (tmp_path / "out" / "report.html").exists()
    note = json.loads(file.with_name("measurements.jsonl.state").read_text())
    before = file.read_bytes()[: note["bytes"]]
    assert before.count(b"\n") > 1
    status, _, err = say(*command)
    assert status == 0, err
    assert file.read_bytes().startswith(before)
    keys = [
        json.dumps([one[k] for k in ("kind", "method", "category", "temperature", "round")])
        for one in lines_of(file.parent)
    ]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 + 2 + 2
    assert (tmp_path / "out" / "report.html").exists()


def test_a_sweep_varies_shapes_batches_and_temperatures(say, common, drafter_folder, tmp_path):
    words = ["sweep", *common, "--method", f"ours={drafter_folder}@4x3:9", "--limit", 1, "--rounds", 1]
    words += ["--method", "lookup=prompt-lookup@1x2"]
    words += ["--widths", "1,3,300", "--lengths", "1,2", "--budgets", "3,4,6,99", "--batches", "2"]
    status, output, err = say(*words, "--temperatures", "0,1", "--max-new-tokens", 10)
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
    assert 4 <= nodes[3, 2] <= 6  # beams share prefixes
    assert [one["nodes_per_draft"] for one in sweep["budgets"]] == [3, 5]
    assert [(one["temperature"], one["coupled"]) for one in sweep["temperatures"]] == [(0, True), (1, True), (1, False)]
    coupled, uncoupled = (one["tokens_per_step"] for one in sweep["temperatures"][1:])
    assert coupled > uncoupled
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
    assert "Wrote" in output


def test_the_demo_measures_all_bundled_drafters(say, quick, tmp_path, monkeypatch):
    bench = sys.modules["redrafter.cli.bench"]
    assert set(bench.CATEGORIES) == {"dialogue", "maths", "code", "open question"}
    for name in ("PROMPTS", "CATEGORIES"):
        monkeypatch.setattr(bench, name, getattr(bench, name)[3:5])
    words = ["bench", "--demo", "--output", tmp_path, "--rounds", 1, "--limit", 1, "--max-new-tokens", 8]
    words += ["--answers", 4]
    status, output, err = say(*words, "--temperatures", "0", "--device", "cpu")
    assert status == 0, err
    assert "10 of 10 drafted texts" in output
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["data"]["categories"]) == ["dialogue", "maths"]
    assert [one["method"] for one in found["methods"]] == [
        "autoregressive", "transformers", "recurrent", "Medusa", "EAGLE", "two models", "prompt lookup",
    ]  # fmt: skip
    assert [(one["method"], one["requests"]) for one in found["calls"]] == [
        (one["method"], 2) for one in found["methods"]
    ]
    assert set(found["asked"]["methods"].values()) == {"the bundled pair's", "prompt-lookup"}
    assert found["methods"][2] == {
        "method": "recurrent",
        "path": "drafter",
        "weights": "one recurrent step, 3 blocks of width 512",
        "draft_vocabulary": "2,048 of 4,096 tokens",
        "shape": "4 beams of 5 tokens, the 21 most probable nodes, with lookup",
        "parameters": found["methods"][2]["parameters"],
    }
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()
    total = next(one for one in found["speed"] if (one["method"], one["category"]) == ("recurrent", "all"))
    assert total["tokens_per_step"] > 1.5
    assert not found["failed"]


def test_a_sweep_of_the_demo_measures_all_bundled_drafters(say, quick, data, tmp_path):
    data.write_text(data.read_text().splitlines()[0])
    words = ["sweep", "--demo", "--prompts", data, "--output", tmp_path / "out", "--rounds", 1, "--limit", 1]
    words += ["--max-new-tokens", 4]
    axes = ["--widths", "2", "--lengths", "1", "--budgets", "4", "--batches", "1", "--temperatures", "0"]
    status, _, err = say(*words, *axes, "--device", "cpu")
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["recurrent", "Medusa", "EAGLE", "two models", "prompt lookup"]
    assert [one["method"] for one in found["sweep"]["heads"]] == names
    assert {one["shape"]["width"] for one in found["sweep"]["grid"]} == {2}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "x"], "x is neither a folder"),
        (["--method", "a=b@"], "ours=folder@10x4:32"),
        (["--minutes", "-1"], "'--minutes'"),
        (["--rounds", "0"], "'--rounds'"),
        (["--method", "=b"], "--method takes NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES"),
        (["--method", "ours=b"], "--method ours: the name is taken"),
        (["--temperatures", "-1"], "--temperatures takes numbers from 0"),
        (["--temperatures", "warm"], "--temperatures takes numbers from 0"),
        (["--answers", "0"], "--answers takes whole numbers from 1"),
        (["--batches", "0"], "--batches takes whole numbers from 1"),
        (["--by", "question_id", "--max-new-tokens", "127"], "prompts are too long"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dtype", "float8"], "float8"),
        (["--demo"], "omit --model"),
        (["--max-new-tokens", "127"], "prompts are too long"),
    ],
)
def test_bad_input_is_one_sentence(say, command, tmp_path, words, sentence):
    assert sentence in refusal(say(*command, *words))
    assert not (tmp_path / "out").exists()


def test_missing_options_are_named(say, tmp_path, model_folder, drafter_folder):
    out = ["--output", tmp_path / "out"]
    assert "--model" in refusal(say("bench", *out))
    assert "--method" in refusal(say("bench", *out, "--model", model_folder))
    assert "--prompts" in refusal(say("sweep", *out, "--model", model_folder, "--method", f"a={drafter_folder}"))
    assert "--widths takes whole numbers" in refusal(say("sweep", *out, "--demo", "--widths", "x"))


@pytest.mark.parametrize("command", ["bench", "sweep"])
def test_a_missing_extra_is_one_sentence(say, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install 'redrafter[bench]'" in refusal(say(command, "--demo", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
