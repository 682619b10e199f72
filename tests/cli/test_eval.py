"""`redrafter eval` on its command line."""

from __future__ import annotations

import json

import pytest
import transformers

from conftest import refusal, tiny_model
from redrafter import RecurrentDrafter, generate
from redrafter.data.prompts import prompt_ids
from redrafter.engine.results import Stats
from redrafter.evaluation import acceptance as evaluation

ROWS = [
    {"prompt": "Once", "kind": "story"},
    {"messages": [{"role": "user", "content": "hi"}], "kind": "chat"},
    {"turns": ["a", "b"], "kind": "chat"},
    {"prompt": "Twice", "kind": "story"},
]


@pytest.fixture
def files(tmp_path):
    """Rows in two files."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, rows in zip(paths, (ROWS[:3], ROWS[3:]), strict=True):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return paths


@pytest.fixture
def command(model_folder, drafter_folder, files):
    words = ["eval", "--model", model_folder, "--drafter", drafter_folder, "--prompts", *files, "--dtype", "float32"]
    return [*words, "--max-new-tokens", 14]


def test_the_record_is_what_generate_counts(say, command, model_folder, drafter_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    drafter = RecurrentDrafter.from_pretrained(drafter_folder, target=model)
    prompts = [prompt_ids(row, tokenizer, "here") for row in ROWS]
    shape = {"beam_width": 40, "beam_length": 2, "node_budget": 90, "max_new_tokens": 14}
    words = ["--beam-width", 40, "--beam-length", 2, "--node-budget", 90, "--temperature", 0.7, "--seed", 4]
    status, out, err = say(*command, *words, "--json", "--by", "kind")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert out.count("\n") == 1
    assert record["prompts"] == 4
    assert record["walked_otherwise"] == {"greedy": 0, "sampled": 0}
    modes = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.7, "seed": 4}}
    for mode, sampling in modes.items():
        stats = generate(model, drafter, prompts, **shape, **sampling).stats
        found = record[mode]
        assert found["tokens"] == stats.tokens
        assert found["decoding"] == found["walked"]
        assert found["decoding"] == {
            "drafts": stats.steps,
            "draft_tokens": stats.drafted,
            "accepted_tokens": stats.accepted,
            "mean_acceptance_length": round(1 + stats.accepted / stats.steps, 4),
            "accepted_by_position": stats.accepted_by_position,
            "acceptance_by_position": [round(count / stats.steps, 4) for count in stats.accepted_by_position],
        }
        assert found["teacher_forced"]["drafts"] == stats.tokens
        assert stats.accepted > 0, "otherwise the test cannot fail"
        groups = record["by"]["kind"]
        assert list(groups) == ["story", "chat"]
        for name, members in (("story", (0, 3)), ("chat", (1, 2))):
            assert groups[name]["prompts"] == 2
            own = Stats.total([stats.rows[row] for row in members], seconds=0.0)
            assert groups[name][mode]["decoding"]["accepted_by_position"] == own.accepted_by_position
            assert groups[name][mode]["decoding"]["draft_tokens"] == own.drafted


def test_the_table(say, command):
    status, out, _ = say(*command, "--by", "kind", "--limit", 3)
    assert status == 0
    for words in ("kind story: 1 prompts", "kind chat: 2 prompts", "\n3 prompts"):
        assert words in out
    for words in ("greedy", "sampled", "decoding", "walked", "teacher-forced", "draft", "accepted", "acceptance"):
        assert words in out
    assert "recomputed counts differ" not in out
    record = json.loads(say(*command, "--json", "--limit", 3)[1])
    (line, *_) = [line for line in out[out.index("\n3 prompts") :].splitlines() if "decoding" in line]
    found = record["greedy"]["decoding"]
    cells = [f"{found['drafts']}", f"{found['draft_tokens']}", f"{found['accepted_tokens']}"]
    cells += [f"{found['mean_acceptance_length']:.2f}", *(f"{rate:.0%}" for rate in found["acceptance_by_position"])]
    assert line.split() == ["greedy", "decoding", *cells]


@pytest.mark.parametrize(("dtype", "reason"), [("float32", "almost equal"), ("bfloat16", "rounding may explain")])
def test_recomputed_counts_that_differ_from_decoding_are_reported(say, command, monkeypatch, dtype, reason):
    def changed(*arguments, **settings):
        out = generate(*arguments, **settings)
        out.stats.rows[1].accepted += 1
        return out

    monkeypatch.setattr(evaluation, "generate", changed)
    words = [dtype if word == "float32" else word for word in command]
    status, out, _ = say(*words)
    assert status == 0
    lines = [line for line in out.splitlines() if "recomputed counts differ" in line]
    assert len(lines) == 2
    for line in lines:
        assert "of 4 texts" in line
        assert f"in {dtype}" in line
        assert reason in line
    _, out, err = say(*words, "--json")
    assert min(json.loads(out)["walked_otherwise"].values()) >= 1
    assert "recomputed counts differ" in err


def test_bad_input_is_one_sentence(say, command, model_folder, files, tmp_path):
    assert "--limit" in refusal(say(*command, "--limit", 0))
    for value in (0, -1):
        assert "temperature must be positive" in refusal(say(*command, "--temperature", value))
    assert "a.jsonl line 1: --by topic: the row has no" in refusal(say(*command, "--by", "topic"))
    files[0].write_text("")
    files[1].write_text("")
    assert "holds no prompt" in refusal(say(*command))
    files[0].write_text('{"words": "a"}\n')
    assert "line 1: a row needs" in refusal(say(*command))
    files[0].write_text(json.dumps(ROWS[0]))
    other = tmp_path / "other"
    RecurrentDrafter.for_target(tiny_model(vocab_size=70)).save_pretrained(other)
    words = ["eval", "--model", model_folder, "--drafter", other, "--prompts", files[0]]
    assert "vocabulary 70" in refusal(say(*words))
