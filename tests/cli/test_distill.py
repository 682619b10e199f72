"""`redrafter distill`, as a user types it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable

import pytest
import transformers

from conftest import refusal
from processes import Fork, new_process, signalled
from redrafter.utils import progress


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": "Once"}, {"messages": [{"role": "user", "content": "hi"}], "id": 7}, {"turns": ["a", "b"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(model_folder, prompts, tmp_path):
    return ["distill", "--model", model_folder, "--prompts", prompts, "--output", tmp_path / "own.jsonl"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_distilled_rows_can_be_trained_on(say, words, model_folder, drafter_folder, tmp_path):
    status, out, err = say(*words, "--max-new-tokens", 9, "--temperature", 0, "--temperature", 0.9, "--seed", 3)
    assert (status, out) == (0, "")
    own = tmp_path / "own.jsonl"
    rows = rows_of(own)
    assert [(row["row"], row["temperature"]) for row in rows] == [(n, t) for n in (1, 2, 3) for t in (0.0, 0.9)]
    assert [row.get("id") for row in rows] == [None, None, 7, 7, None, None]
    assert sum(map(sum, (row["loss_mask"] for row in rows))) == 9 * 8
    assert "3 of 3 rows, 72 tokens" in err
    assert "tokens/s, 1.00 per step" in err
    assert f"6 rows, 72 tokens, 1.00 per step; 8 of 8 answers were cut at the limit. Wrote {own}." in err
    status, _, err = say("data", own, "--model", model_folder)
    assert status == 0
    train = ["train", "--model", model_folder, "--data", own, "--output", tmp_path / "d", "--max-steps", 1]
    status, _, err = say(*train, "--exit-dim", 16)
    assert status == 0, err
    assert "72 tokens to learn" in err

    status, _, err = say(*words, "--max-new-tokens", 9, "--temperature", 0, "--temperature", 0.9, "--seed", 3)
    assert status == 0
    assert "Nothing is left to do" in err
    before = own.read_bytes()
    assert "temperatures [0.0, 0.9], now [0.0]; seed 3, now null" in refusal(say(*words, "--max-new-tokens", 9))
    assert own.read_bytes() == before
    drafted = [*words, "--drafter", drafter_folder, "--beam-length", 2, "--overwrite", "--max-new-tokens", 9]
    status, _, err = say(*drafted, "--temperature", 0, "--temperature", 0.9, "--seed", 3, "--batch-size", 2)
    assert status == 0
    assert own.read_bytes() == before, "drafter and batch size do not change the text"
    assert " 1.00 per step" not in err


def test_continuations_can_be_trained_on(say, model_folder, tmp_path):
    text, own = tmp_path / "text.jsonl", tmp_path / "own.jsonl"
    text.write_text('{"text": "one, two, three"}\n{"prompt": "q", "completion": " and so on"}\n')
    words = ["distill", "--model", model_folder, "--prompts", text, "--output", own, "--continuations", 5]
    status, _, err = say(*words, "--max-length", 12)
    assert status == 0, err
    rows = rows_of(own)
    assert [len(row["continuations"]) for row in rows] == [len(row["input_ids"]) for row in rows] == [12, 12]
    assert all(len(more) == 5 for row in rows for more in row["continuations"])
    train = ["train", "--model", model_folder, "--data", own, "--output", tmp_path / "d", "--max-steps", 1]
    assert say(*train, "--exit-dim", 16)[0] == 0
    assert "--temperature has no effect with --continuations" in refusal(say(*words, "--temperature", 1))
    text.write_text('{"text": 3}\n')
    assert 'text.jsonl line 1: "text" must be text' in refusal(say(*words, "--overwrite"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "http://x"], "Give either --model or --endpoint"),
        (["--endpoint-model", "m"], "--endpoint-model"),
        (["--temperature", -1], "temperature must be 0"),
        (["--top-k", 3], "--top-k has no effect in greedy"),
        (["--beam-width", 3], "--beam-width has no effect without --drafter"),
        (["--set", "num_return_sequences=2"], "--temperature"),
        (["--set", "temperature=2"], "--set temperature: use --temperature"),
        (["--set", "nonsense=3"], "nonsense"),
        (["--limit", 0], "limit"),
        (["--bad-rows", "heal"], "not one of"),
        (["--insecure-endpoint"], "--insecure-endpoint has no effect without --endpoint"),
        (["--any-target"], "--any-target has no effect without --drafter"),
        (["--max-length", 4], "line 1: the prompt has 4 tokens"),
        (["--template", "/none/such"], "cannot be read"),
    ],
)
def test_bad_options(say, words, tmp_path, options, message):
    status, out, err = say(*words, *options)
    assert status == 2
    assert out == ""
    assert message in err
    assert not (tmp_path / "own.jsonl").exists() or not (tmp_path / "own.jsonl").read_bytes()


def test_bad_rows_are_named_or_skipped(say, words, prompts, tmp_path):
    prompts.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "' + "b" * 200 + '"}\n{\n{"words": 1}\n')
    assert "line 2: the prompt is empty" in refusal(say(*words))
    status, _, err = say(*words, "--bad-rows", "skip", "--max-new-tokens", 3)
    assert status == 0
    assert "4 bad rows" in err
    assert "line 3: the prompt has 200 tokens" in err
    assert [row["row"] for row in rows_of(tmp_path / "own.jsonl")] == [1]
    prompts.write_text("")
    assert "holds no row to work on" in refusal(say(*words, "--overwrite"))


def test_inputs_are_not_overwritten(say, words, prompts, tmp_path):
    words[-1] = tmp_path / "." / "prompts.jsonl"
    assert "is one of the files to read" in refusal(say(*words, "--overwrite"))
    words[4:] = [tmp_path / "*.jsonl", *words[5:]]
    assert "is one of the files to read" in refusal(say(*words, "--overwrite"))


def test_a_tokenizer_without_a_template(say, words, model_folder, prompts, tmp_path):
    bare = tmp_path / "bare"
    transformers.AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(bare)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    words[2] = bare
    assert "line 2: the tokenizer has no chat template; give one" in refusal(say(*words))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    own = [*words, "--max-new-tokens", 4]
    assert say(*own, "--template", tmp_path / "t.jinja", "--chat")[0] == 0
    row = rows_of(tmp_path / "own.jsonl")[0]
    assert tokenizer.decode(row["input_ids"][:6]) == "[Once]"
    assert row["messages"][0] == {"role": "user", "content": "Once"}
    assert "other options (chat_template" in refusal(say(*own, "--chat"))


def show_progress_often() -> None:
    progress.FIRST = progress.INTERVAL = 0.02


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_finished_answers(say, words, prompts, tmp_path, sign, status):
    """Although no checkpoint is due; all rows are in one chunk, and some have a second turn."""
    lines = [{"turns": [f"a {n}", "and"]} if n % 3 == 1 else {"prompt": f"b {n}"} for n in range(24)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max-new-tokens", 20, "--batch-size", 3, "--save-seconds", 1000, "--device", "cpu"]
    log = tmp_path / "log"

    def rows_shown() -> int:
        return max((int(row) for row in re.findall(r"^(\d+) of 24 rows", log.read_text(), re.MULTILINE)), default=0)

    stopped = Fork(*words, *options, log=log, before=show_progress_often)
    assert signalled(stopped, sign, lambda: rows_shown() >= 3) == status, log.read_text()
    last = log.read_text().splitlines()[-1]
    saved = int(re.fullmatch(r"redrafter: Interrupted; (\d+) finished rows are saved: .*again.*", last)[1])
    assert 1 <= saved < 24
    result, _, err = say(*words, *options)
    assert result == 0
    assert f"Continuing after {saved} of 24 rows." in err
    own = tmp_path / "own.jsonl"
    words[-1] = tmp_path / "whole.jsonl"
    assert say(*words, *options)[0] == 0
    assert own.read_bytes() == words[-1].read_bytes()


def test_an_interrupt_before_any_answer(say, words, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("redrafter.training.distillation.survey", stop)
    status, out, err = say(*words)
    assert (status, out) == (130, "")
    assert "Interrupted; 0 finished rows are saved" in err
    assert not (tmp_path / "own.jsonl").exists()


def test_an_endpoint_receives_the_key_of_the_environment(say, words, tmp_path, monkeypatch):
    from redrafter.training.endpoint import Endpoint

    calls = []

    def answer(self, prompt, settings):
        calls.append((self.url, self.model, self.key, self.timeout))
        return "an answer", "stop", 2

    monkeypatch.setattr(Endpoint, "answer", answer)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    served = ["--endpoint", "http://localhost:8000", "--endpoint-model", "m"]
    words = ["distill", *words[3:], *served, "--timeout", 5]
    status, _, err = say(*words)
    assert status == 0, err
    assert calls[0] == ("http://localhost:8000/v1", "m", "secret", 5.0)
    assert "3 rows, 8 tokens. Wrote" in err
    assert "secret" not in err + (tmp_path / "own.jsonl.state").read_text()
    rows = rows_of(tmp_path / "own.jsonl")
    assert rows[0]["completion"] == "an answer"
    assert len(rows[2]["messages"]) == 4
    assert "--max-length has no effect with --endpoint" in refusal(say(*words, "--max-length", 9))
    assert "URL" in refusal(say(*words, "--endpoint", "localhost"))


def test_a_killed_run_resumes_to_the_same_file(say, words, prompts, tmp_path):
    """Killed with SIGKILL: before any row is finished, and at two later moments."""
    prompts.write_text("".join(json.dumps({"turns": [f"a {n}", "and"]}) + "\n" for n in range(24)))
    options = ["--save-seconds", 0, "--max-new-tokens", 9, "--temperature", 0, "--temperature", 1, "--batch-size", 3]
    options += ["--device", "cpu"]
    own, note = tmp_path / "own.jsonl", tmp_path / "own.jsonl.state"

    def done() -> int:
        return json.loads(note.read_text())["done"] if note.exists() else 0

    def answers() -> int:
        ahead = json.loads(note.read_text())["ahead"] if note.exists() else {}
        return sum(len(own) for result in ahead.values() for own in result.get("part", []))

    def kill(start: Callable, count: Callable[[], int], moment: int) -> None:
        ended = signalled(start(*words, *options), signal.SIGKILL, lambda: count() >= moment)
        assert ended == -signal.SIGKILL, "it should be killed before its end"

    kill(new_process, answers, 3)
    assert answers() >= 3, "answers are saved before their row is finished"
    for moment in (2, 6):
        kill(Fork, done, moment)
        assert moment <= done() < 24
        known = json.loads(note.read_text())
        assert own.read_bytes()[: known["bytes"]].count(b"\n") == known["counts"]["rows"] >= 2 * done()
    with own.open("ab") as file:
        file.write(b'{"row": 999, "inp')  # a kill in the middle of a line
    assert say(*words, *options)[0] == 0
    words[-1] = tmp_path / "whole.jsonl"
    assert say(*words, *options)[0] == 0
    assert own.read_bytes() == words[-1].read_bytes()
    assert len({(row["row"], row["temperature"]) for row in rows_of(own)}) == 48
