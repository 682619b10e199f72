"""All commands read rows alike and use the same option names."""

from __future__ import annotations

import json

import pytest
import transformers

from conftest import refusal, tiny_model

COMMANDS = ("generate", "check", "distill", "eval", "tune", "bench", "sweep", "train")


def words(command, model, drafter, data, output):
    own = ["--data" if command == "train" else "--prompts", data]
    if command in ("distill", "train", "bench", "sweep"):
        own += ["--output", output]
    if command in ("bench", "sweep"):
        own += ["--method", f"ours={drafter}"]
    elif command not in ("distill", "train"):
        own += ["--drafter", drafter]
    return [command, "--model", model, *own, "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_rows_and_variables_raise_an_error_at_once(say, command, model_folder, drafter_folder, data, tmp_path):
    ok = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}

    def answer(path, *more):
        return refusal(say(*words(command, model_folder, drafter_folder, path, tmp_path / "out.jsonl"), *more))

    assert "rows.jsonl line 2: " in answer(data(ok, {**ok, "prompt": "other"}))
    assert "rows.jsonl line 2: " in answer(data(ok, {"prompt": "half \ud800", "completion": "x"}))
    assert "the chat template has no such variable" in answer(
        data(ok), "--template-kwargs", '{"enable_thinking": false}'
    )
    assert "--template-kwargs" in answer(data(ok), "--template-kwargs", "[]")
    assert "--limit" in answer(data(ok), "--limit", 0)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture(scope="module")
def small_model(model_folder):
    """A model with fewer tokens than its tokenizer."""
    folder = model_folder.parent / "small"
    tiny_model(vocab_size=80).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_outside_the_models_vocabulary_raise_an_error(say, command, small_model, drafter_folder, data, tmp_path):
    path = data({"prompt": "A", "completion": "B"}, {"prompt": "zzzz", "completion": "zz"})
    sentence = refusal(say(*words(command, small_model, drafter_folder, path, tmp_path / "out.jsonl")))
    assert "rows.jsonl line 2: " in sentence
    assert "vocabulary of 80" in sentence


def test_rows_of_a_model_with_more_tokens_than_its_tokenizer_can_be_trained_on(say, model_folder, data, tmp_path):
    padded = tmp_path / "padded"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tiny_model(vocab_size=len(tokenizer) + 61).save_pretrained(padded)
    tokenizer.save_pretrained(padded)
    path, own = data(*[{"prompt": text} for text in ("Once", "Twice", "Never", "Ever")]), tmp_path / "own.jsonl"
    sampling = ["--temperature", 1.5, "--seed", 1, "--max-new-tokens", 30, "--limit", 3]
    assert say("distill", "--model", padded, "--prompts", path, "--output", own, *sampling)[0] == 0
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    assert len(rows) == 3
    assert max(token for row in rows for token in row["input_ids"]) >= len(tokenizer)
    train = ["train", "--model", padded, "--data", own, "--output", tmp_path / "d", "--max-steps", 1, "--exit-dim", 16]
    status, _, err = say(*train, "--held-out", 0)
    assert status == 0, err
    assert say("data", own, "--model", padded)[0] == 0


def test_the_output_of_generate_can_be_read_again(say, model_folder, drafter_folder, data, tmp_path):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "id": 1},
        {"turns": ["a", "b"], "id": 2},
        {"prompt": "Once", "completion": " more", "id": 3},
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "yes"}], "id": 4},
    ]
    command = words("generate", model_folder, drafter_folder, data(*rows, {"prompt": "x"}), None)
    status, out, err = say(*command, "--limit", 4, "--max-new-tokens", 5, "--json")
    assert status == 0, err
    written = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in written] == [1, 2, 3, 4]
    assert [m["content"] for m in written[0]["messages"][:2]] == ["Be brief.", "Add\n1 2"]
    own = tmp_path / "own.jsonl"
    own.write_text(out)
    assert say("data", own, "--model", model_folder)[0] == 0
    again = words("generate", model_folder, drafter_folder, own, None)
    assert [json.loads(line)["text"] for line in say(*again, "--max-new-tokens", 5, "--json")[1].splitlines()] == [
        row["text"] for row in written
    ]
