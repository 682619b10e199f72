"""`redrafter profile` on its command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from conftest import refusal
from redrafter.core.shapes import DraftShape
from redrafter.engine import runner
from redrafter.evaluation import profiling, tuning
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads

QUICK = ("--device", "cpu", "--repeats", 1, "--nodes", "1,8", "--widths", "1,4,300")


@pytest.fixture
def timed(monkeypatch):
    """Every measurement runs once and takes half a millisecond more than the one before it."""
    count = 0

    def run(function, device, repeats):
        nonlocal count
        with torch.inference_mode():
            function()
        count += 1
        return count / 2

    for module in (profiling, runner):
        monkeypatch.setattr(module, "milliseconds", run)


def profile(say, *words) -> tuple[list[str], dict]:
    status, out, err = say("profile", *words, *QUICK)
    assert (status, err) == (0, "")
    *lines, record = out.splitlines()
    return lines, json.loads(record)


def test_a_shape_needs_no_model(say, timed):
    lines, record = profile(say, "--shape", "tiny", "--batch", 2, "--context", 30, "--do-sample")
    assert "1,073.7 GB/s" in lines[0]  # that is the first that is timed
    assert record["bytes_per_second"] == 2 * 2**28 / 0.0005
    assert (record["target"], record["batch"], record["context"]) == ("tiny", 2, 30)
    assert record["dtype"] == "float32"
    assert record["floor_ms"] == pytest.approx(
        1e3 * (record["weight_bytes"] + record["cache_bytes"]) / record["bytes_per_second"], abs=1e-5
    )
    assert f"{record['weight_bytes'] / 1e6:,.1f} MB of weights" in lines[1]
    assert "(2 x 30 tokens)" in lines[1]
    assert [(one["name"], one["size"], one["ms"], one["ratio"]) for one in record["pieces"]] == [
        ("autoregressive step", None, 1.0, 1.0),
        ("verify, nodes", 1, 1.5, 1.5),
        ("verify, nodes", 8, 2.0, 2.0),
        ("draft, beams", 1, 2.5, 2.5),
        ("draft, beams", 4, 3.0, 3.0),  # the drafter has no 300 tokens
        ("rest", None, 3.5, 3.5),
        ("drafted step", None, 4.0, 4.0),
    ]
    rows = [line.split() for line in lines]
    assert ["verify,", "nodes", "8", "2.000", "2.000"] in rows
    assert ["drafted", "step", "4.000", "4.000"] in rows
    assert "10 beams of 4 tokens" in lines[-1]


def test_the_random_drafter_takes_a_shape(say, timed):
    _, record = profile(say, "--shape", "tiny", "--exit-dim", 48, "--draft-vocab", 12, "--beam-width", 3)
    assert record["shape"] == {"beam_width": 3, "beam_length": 4, "node_budget": None, "lookup": 10}
    assert record["context"] == 256  # what fits
    assert "--beam-width" in refusal(say("profile", "--shape", "tiny", "--draft-vocab", 12, "--beam-width", 13, *QUICK))


def test_a_model_and_its_drafter(say, timed, model_folder, drafter_folder, tmp_path):
    words = ["--model", model_folder, "--drafter", drafter_folder]
    _, record = profile(say, *words)
    assert record["shape"] == {"beam_width": 4, "beam_length": 3, "node_budget": None, "lookup": 10}
    assert record["context"] == 128
    tuned = shutil.copytree(drafter_folder, tmp_path / "tuned")
    shapes = [DraftShape(batch=2, beam_width=2, beam_length=2, node_budget=5)]
    tuning.record(tuned, [*shapes, DraftShape(batch=4, beam_width=1, beam_length=0)], "here")
    for batch, width in ((1, 4), (2, 2), (4, 4)):  # without drafting there were no drafts to time
        _, record = profile(say, "--model", model_folder, "--drafter", tuned, "--batch", batch)
        assert record["shape"]["beam_width"] == width


def test_other_drafting_methods(say, timed, model_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    MedusaHeads.fresh(model, heads=2, nodes=9).save_pretrained(tmp_path / "medusa")
    EagleHead.fresh(model).save_pretrained(tmp_path / "eagle")
    every = {tmp_path / "medusa": [1, 4], tmp_path / "eagle": [1, 4], model_folder: [1, 4]}
    every["prompt-lookup"] = [1, 4, 300]
    for drafter, widths in every.items():
        lines, record = profile(say, "--model", model_folder, "--drafter", drafter, "--context", 20)
        drafted = [one["size"] for one in record["pieces"] if one["name"] == "draft, beams"]
        assert drafted == widths, "no head or model has 300 beams here"
        assert record["pieces"][-1]["name"] == "drafted step"
        assert "nodes, 10 deep, with lookup" in lines[-1] if "medusa" in str(drafter) else "tokens" in lines[-1]
    words = ["profile", "--model", model_folder, "--drafter", "prompt-lookup", "--lookup"]
    assert "leave out lookup" in refusal(say(*words, *QUICK))


def test_real_times_are_positive(say):
    _, record = profile(say, "--shape", "tiny", "--context", 8)
    assert all(one["ms"] > 0 for one in record["pieces"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--shape"),
        (["--shape", "tiny", "--model", "x"], "--shape"),
        (["--shape", "tiny", "--drafter", "x"], "--drafter needs"),
        (["--model", "x", "--drafter", "y", "--exit-dim", 4], "--exit-dim"),
        (["--shape", "llama-9b"], "llama-9b"),
        (["--shape", "tiny", "--context", 257], "--context 257"),
        (["--shape", "tiny", "--dtype", "float8"], "--dtype"),
        (["--shape", "tiny", "--draft-vocab", 257], "257"),
    ],
)
def test_bad_input_is_one_sentence(say, words, sentence):
    assert sentence in refusal(say("profile", *words, *QUICK))


@pytest.mark.parametrize("nodes", ["", "0", "1,x", "-1", "1.5"])
def test_bad_lists_are_named(say, nodes):
    assert "--nodes takes whole numbers from 1" in refusal(say("profile", "--shape", "tiny", "--nodes", nodes))
    assert "--device nowhere" in refusal(say("profile", "--shape", "tiny", "--device", "nowhere"))
