"""`redrafter tune` on its command line, with made-up times."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from conftest import refusal
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.data.prompts import prompt_ids
from redrafter.engine.request import request
from redrafter.evaluation.profiling import StepProfiler
from redrafter.evaluation.tuning import Texts
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import method_of
from redrafter.targets.target import Target


@pytest.fixture
def folder(drafter_folder, tmp_path):
    return shutil.copytree(drafter_folder, tmp_path / "drafter")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("Once", "Twice", "Never", "Often")))
    return path


@pytest.fixture
def command(model_folder, folder, prompts):
    words = ["tune", "--model", model_folder, "--drafter", folder, "--prompts", prompts, "--device", "cpu"]
    words += ["--batch-sizes", "1,4", "--widths", "2,40", "--lengths", "2,3", "--budgets", "4,90"]
    return [*words, "--limit", 3, "--max-new-tokens", 12, "--repeats", 1]


@pytest.fixture
def times(monkeypatch):
    """Times by formula: verification costs grow with nodes and rows, so that drafting does not pay in large batches.

    Both the parts of a step and complete calls, whose texts are as the drafters' acceptance makes them.
    """

    def verify(profiler, nodes):
        return 0.001 * nodes * profiler.batch**8

    def speed(texts, shape, number, *, batch, compile):
        if shape is None:
            return 1e3 * batch / (10 + 0.001 * batch**8)
        proposer = method_of(texts.drafter).proposer(texts.request.target, shape)
        tokens = texts.tokens_per_step(shape.model_copy(update={"batch": 1}))
        return 1e3 * batch * tokens / (10 + 0.001 * proposer.size * batch**8)

    monkeypatch.setattr(StepProfiler, "verify_ms", verify)
    monkeypatch.setattr(StepProfiler, "draft_ms", lambda profiler, shape: 10.0)
    monkeypatch.setattr(StepProfiler, "rest_ms", lambda profiler, shape: 0.0)
    monkeypatch.setattr(Texts, "tokens_per_second", speed)


@pytest.mark.parametrize("sampling", [(), ("--do-sample", "--temperature", 0.7, "--seed", 3)])
def test_the_fastest_shapes_are_printed_stored_and_used(say, command, times, folder, model_folder, sampling):
    status, out, err = say(*command, *sampling)
    assert status == 0
    assert "This takes at most about" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    drafter = RecurrentDrafter.from_pretrained(folder, target=model)
    one, four = drafter.config.shapes
    assert (one.batch, one.beam_width) == (1, 40)  # so much is accepted that nothing else comes near
    assert (four.batch, four.beam_length) == (4, 0)
    assert f"Wrote the shapes to {folder}" in " ".join(out.split())
    assert ("sampled" if sampling else "greedy") in drafter.config.tuned_on
    assert "float32" in drafter.config.tuned_on
    assert "complete calls of up to 12 tokens" in drafter.config.tuned_on

    ids = [prompt_ids({"prompt": text}, tokenizer, "here") for text in ("Once", "Twice", "Never")]
    options = {"do_sample": True, "temperature": 0.7, "seed": 3} if sampling else {}
    stats = generate(model, drafter, ids, batch_size=1, max_new_tokens=12, **options).stats
    assert stats.accepted > 0
    tokens = 1 + stats.accepted / stats.steps
    rows = [line.split() for line in out.splitlines()]
    decoder = request(model, drafter, ids[:1]).decoder
    assert decoder.length == 10, "with lookup"
    ms = 10 + 0.001 * decoder.size
    up = f"{tokens / ms * 10.001:.2f}"
    assert [
        "1", *one.description.split(), f"{tokens:.2f}", f"{1e3 * tokens / ms:,.0f}", "100", up, up, "to", up, "on",
    ] in rows  # fmt: skip
    (off,) = (row for row in rows if row[:1] == ["4"])
    assert off[-1] == "off"
    assert float(off[-5]) < 1, "what it would be is said"
    assert request(model, drafter, ids * 2).decoder.proposer is None
    _, out, _ = say("info", folder)
    for words in ("from batch 1 on", one.description, "from batch 4 on", "without"):
        assert words in out
    assert "tuned on" in out
    status, _, _ = say("generate", "--model", model_folder, "--drafter", folder, "--prompt", "Once", "--json")
    assert status == 0


def test_batch_sizes_that_do_not_fit_into_memory_do_not_stop_the_others(say, command, times, folder, monkeypatch):
    def new_cache(target, *, batch, slots):
        if batch in full:
            raise RedrafterError("Keys and values take too much.")
        return make(target, batch=batch, slots=slots)

    command += ["--widths", "2", "--lengths", "2", "--budgets", "4"]
    make, full = Target.new_cache, [4]
    monkeypatch.setattr(Target, "new_cache", new_cache)
    status, _, err = say(*command)
    assert status == 0
    assert err.endswith("not measured: batches of 4: Keys and values take too much.\n")
    assert [one.batch for one in RecurrentDrafter.from_pretrained(folder).config.shapes] == [1]
    full.append(1)
    status, _, err = say(*command)
    assert status == 2
    assert err.endswith("redrafter: Keys and values take too much.\n")


def test_a_dry_run_writes_nothing(say, command, times, folder):
    before = (folder / "config.json").read_bytes()
    status, out, _ = say(*command, "--dry-run", "--widths", "40", "--lengths", "2")
    assert status == 0
    assert "nothing is written" in out
    assert "40 beams of" in out
    assert (folder / "config.json").read_bytes() == before


def test_a_copy_can_be_tuned_instead(say, command, times, folder, tmp_path):
    command += ["--widths", "2", "--lengths", "2", "--budgets", "4"]
    assert say(*command, "--output", tmp_path / "copy")[0] == 0
    assert not RecurrentDrafter.from_pretrained(folder).config.shapes
    assert len(RecurrentDrafter.from_pretrained(tmp_path / "copy").config.shapes) == 2
    assert "already holds a drafter" in refusal(say(*command, "--output", tmp_path / "copy"))
    (tmp_path / "file").touch()
    assert "give a folder as --output" in refusal(say(*command, "--output", tmp_path / "file"))
    status, _, _ = say("export", tmp_path / "copy", "--output", tmp_path / "theirs", "--format", "apple")
    assert status == 0  # Apple's format does not store shapes
    assert not RecurrentDrafter.from_pretrained(tmp_path / "theirs").config.shapes


def test_real_times_lead_to_a_choice(say, command, folder):
    few = ("--max-new-tokens", 5, "--widths", "2", "--lengths", "2", "--budgets", "4")
    status, out, _ = say(*command, *few, "--context", 9)
    assert status == 0
    assert [one.batch for one in RecurrentDrafter.from_pretrained(folder).config.shapes] == [1, 4]
    assert "median of 9 pairs of a drafted and an undrafted call, with its 95% interval" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch-sizes", "0"], "--batch-sizes takes whole numbers"),
        (["--widths", "300"], "300 beams of 2 tokens; 300 beams of 2 tokens"),
        (["--lengths", "x"], "--lengths takes whole numbers"),
        (["--budgets", ""], "--budgets takes whole numbers"),
        (["--context", 129], "--context 129"),
        (["--drafter", "someone/drafter"], "--output"),
        (["--drafter", "/none/such"], "There is no drafter folder at /none/such."),
        (["--temperature", 0.5], "temperature has no effect"),
        (["--drafter", "prompt-lookup"], "--dry-run"),
    ],
)
def test_bad_input_is_one_sentence(say, command, words, sentence):
    assert sentence in refusal(say(*command, *words))


@pytest.mark.parametrize("head", [MedusaHeads, EagleHead])
def test_other_heads_are_tuned_with_the_shapes_that_they_support(say, command, times, model_folder, tmp_path, head):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    options = {"heads": 2, "beam_width": 40} if head is MedusaHeads else {}
    head.fresh(model, **options).save_pretrained(tmp_path / "head")
    status, out, err = say(*command, "--drafter", tmp_path / "head", "--widths", "40", "--batch-sizes", 1)
    assert status == 0, err
    assert ("not tried: 40 beams of 3 tokens" in err) == (head is MedusaHeads)
    assert "beam_length" in err or head is EagleHead
    (shape,) = head.from_pretrained(tmp_path / "head").config.shapes
    assert shape.description in out
    assert (shape.beam_width, shape.beam_length) == (40, 2 if head is MedusaHeads else shape.beam_length)


def test_methods_without_a_folder_need_a_dry_run(say, command, times, model_folder):
    words = [*command, "--dry-run", "--budgets", 4, "--batch-sizes", 1]
    status, out, _ = say(*words, "--drafter", model_folder, "--widths", 2)
    assert status == 0
    (row,) = (line.split() for line in out.splitlines() if "2 beams of 3 tokens" in line)
    assert float(row[7]) > 3, "a model drafts for itself"
    status, out, _ = say(*words, "--drafter", "prompt-lookup", "--widths", "1,2")
    assert status == 0
    assert "nothing is written" in out
    words = [*command, "--drafter", model_folder]
    assert "--dry-run" in refusal(say(*words))


def test_a_file_without_prompts_is_named(say, command, prompts):
    prompts.write_text("")
    assert "prompts.jsonl holds no prompt" in refusal(say(*command))
