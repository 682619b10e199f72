"""Every command on its command line, with valid and invalid input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import typer

from conftest import greedy, refusal, tiny_model
from redrafter import RecurrentDrafter, __version__
from redrafter.cli import app, main
from redrafter.cli.loading import chosen_device


def fine_tuned(model_folder, folder):
    """A copy of a model with slightly changed weights in its last layer."""
    shutil.copytree(model_folder, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[-1].mlp.down_proj.weight.data *= 1.01
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": "Once"}, {"messages": [{"role": "user", "content": "hi"}], "id": 7}, {"turns": ["a", "b"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


COMMANDS = (
    "demo",
    "generate",
    "distill",
    "train",
    "data",
    "check",
    "eval",
    "profile",
    "tune",
    "bench",
    "sweep",
    "info",
    "export",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_command_and_every_option(say, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    status, out, _ = say("--help")
    assert status == 0
    assert command in out
    status, out, _ = say(command, "--help")
    assert status == 0
    for parameter in typer.main.get_command(app).commands[command].params:
        assert all(name in out for name in parameter.opts if name.startswith("-")), parameter.name
        for word in (getattr(parameter, "help", None) or "").replace("\\[", "[").split():
            assert word in out, parameter.name


def test_the_version(say):
    assert say("--version")[:2] == (0, f"redrafter {__version__}\n")


def test_generate_equals_transformers(say, model_folder, drafter_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    expected = tokenizer.decode(greedy(model, tokenizer("Once").input_ids, 12), skip_special_tokens=True)
    command = ["generate", "--model", model_folder, "--prompt", "Once", "--max-new-tokens", 12]
    for drafting in (["--drafter", drafter_folder], ["--no-drafter"]):
        status, out, err = say(*command, *drafting)
        assert (status, out) == (0, expected + "\n")
        assert "12 tokens" in err


def test_any_setting_of_transformers_can_be_passed(say, model_folder, drafter_folder, prompts):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    given = {"repetition_penalty": 1.7, "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 3}
    ids = tokenizer("Once", return_tensors="pt")
    expected = model.generate(**ids, do_sample=False, max_new_tokens=12, **given)[0, ids.input_ids.shape[1] :]
    assert expected.tolist() != greedy(model, ids.input_ids[0].tolist(), 12), "otherwise the test cannot fail"
    words = [f"--set={name}={json.dumps(value)}" for name, value in given.items()]
    command = ["generate", "--model", model_folder, "--drafter", drafter_folder, "--max-new-tokens", 12]
    status, out, _ = say(*command, "--prompt", "Once", *words)
    assert (status, out) == (0, tokenizer.decode(expected, skip_special_tokens=True) + "\n")
    status, out, _ = say("check", *command[1:], "--prompts", prompts, *words, "--set", "stop_strings=e")
    assert status == 0
    assert "3 of 3 texts equal" in out
    command += ["--prompt", "Once"]
    assert "--set takes NAME=VALUE, not top_k" in refusal(say(*command, "--set", "top_k"))
    assert "use --seed" in refusal(say(*command, "--set", "seed=3"))
    assert "num_beams" in refusal(say(*command, "--set", "num_beams=3"))
    assert "nonsense" in refusal(say(*command, "--set", "nonsense=3"))


def test_a_node_budget_limits_drafted_tokens(say, model_folder, drafter_folder):
    command = ["generate", "--model", model_folder, "--drafter", drafter_folder, "--prompt", "Once", "--json"]
    command += ["--max-new-tokens", 20, "--beam-width", 5, "--beam-length", 3]
    texts = []
    for budget in (4, 9):
        _, out, _ = say(*command, "--node-budget", budget)
        row = json.loads(out)
        assert row["drafted"] <= row["steps"] * (budget - 1)
        texts.append(row["text"])
    assert texts[0] == texts[1] == json.loads(say(*command)[1])["text"]
    assert "--node-budget must" in refusal(say(*command, "--node-budget", 3))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_file_is_answered_in_order_one_line_each(say, model_folder, drafter_folder, prompts, batch_size):
    status, out, _ = say(
        "generate", "--model", model_folder, "--drafter", drafter_folder, "--prompts", prompts,
        "--batch-size", batch_size, "--max-new-tokens", 9, "--beam-width", 3, "--beam-length", 2, "--no-lookup",
        "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [row.get("prompt") or row.get("id") or row["turns"][0] for row in rows] == ["Once", 7, "a"]
    for row in rows:
        assert row["tokens"] == 9
        assert row["tokens_per_step"] == pytest.approx(row["tokens"] / row["steps"], abs=1e-4)
        assert len(row["accepted_by_position"]) == 2
        assert row["finish_reason"] == "length"
    assert rows[1]["messages"][-1] == {"role": "assistant", "content": rows[1]["text"]}


def test_a_seed_gives_the_same_texts_with_and_without_a_drafter_in_any_batches(
    say, model_folder, drafter_folder, prompts
):
    command = ["generate", "--model", model_folder, "--prompts", prompts, "--max-new-tokens", 15]
    sampling = ["--do-sample", "--temperature", 0.8, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--seed", 4]
    texts = [
        say(*command, *drafting, *sampling, "--batch-size", size)[:2]
        for drafting in (["--no-drafter"], ["--drafter", drafter_folder])
        for size in (1, 2, 8)
    ]
    assert texts[0][0] == 0
    assert texts == [texts[0]] * 6
    assert say(*command, "--no-drafter", *sampling[:-1], 5)[1] != texts[0][1]
    assert "temperature has no effect in greedy" in refusal(say(*command, "--no-drafter", "--temperature", 0.8))
    assert "greedy" in refusal(say(*command, "--no-drafter", "--seed", 8))
    status, out, _ = say("check", "--drafter", drafter_folder, *command[1:], *sampling)
    assert status == 0
    assert "3 of 3 texts equal" in out


def test_train_reads_the_output_of_generate_and_check_the_drafter(say, model_folder, prompts, tmp_path):
    own = tmp_path / "own.jsonl"
    _, out, _ = say(
        "generate", "--model", model_folder, "--no-drafter", "--prompts", prompts, "--max-new-tokens", 40, "--json"
    )
    own.write_text(out)
    drafter = tmp_path / "drafter"
    train = ["train", "--model", model_folder, "--data", own, "--output", drafter, "--max-steps", 3]
    status, _, err = say(*train)
    assert status == 0, err
    assert f"Wrote {drafter}" in err
    status, out, _ = say(
        "check", "--model", model_folder, "--drafter", drafter, "--prompts", prompts, "--max-new-tokens", 20
    )
    assert status == 0
    assert "3 of 3 texts equal" in out
    assert "drafting changes nothing" in out
    status, out, _ = say("info", drafter)
    assert status == 0
    assert "tiny" in out
    assert "10 beams of 4 tokens" in out
    status, out, _ = say("info", "--model", model_folder)
    assert status == 0
    assert "--model" in refusal(say("info"))
    assert f"{model_folder} is a model" in refusal(say("info", model_folder))
    other = fine_tuned(model_folder, tmp_path / "other")
    assert say("info", drafter, "--model", model_folder)[0] == 0
    status, out, err = say("info", drafter, "--model", other)
    assert status == 2
    assert "LlamaForCausalLM" in out, "both are described before the error"
    assert "weights differ" in err
    assert say("info", drafter, "--model", other, "--any-target")[0] == 0
    assert "--any-target needs" in refusal(say("info", drafter, "--any-target"))
    assert "--overwrite" in refusal(say(*train))
    (tmp_path / "file").touch()
    assert "--output" in refusal(say(*train, "--output", tmp_path / "file"))
    assert say(*train, "--overwrite")[0] == 0


def test_a_text_that_differs_beyond_rounding_fails_the_check(say, model_folder, drafter_folder, prompts, monkeypatch):
    from redrafter.evaluation import checking

    generate = checking.generate

    def changed(model, drafter, *rest, **settings):
        out = generate(model, drafter, *rest, **settings)
        if drafter is not None:
            out.new_tokens[1][3] += 1
        return out

    monkeypatch.setattr(checking, "generate", changed)
    command = ["check", "--model", model_folder, "--drafter", drafter_folder, "--prompts", prompts]
    status, out, _ = say(*command, "--max-new-tokens", 8)
    assert status == 1
    assert "prompt 2: the texts differ from new token 4 on" in out
    assert "NOT explained by rounding" in out
    assert "2 of 3 texts equal" in out
    assert "1 differ beyond rounding" in out


def test_an_interrupt_says_how_to_resume(say, model_folder, tmp_path, monkeypatch):
    from redrafter.training.callbacks import SaveSchedule

    def stop(*_, **__):
        raise KeyboardInterrupt

    data, output = tmp_path / "data.jsonl", tmp_path / "drafter"
    data.write_text('{"text": "once upon a time there was"}\n' * 4)
    train = ["train", "--model", model_folder, "--data", data, "--output", output, "--max-steps", 4, "--save-steps", 2]
    with monkeypatch.context() as patched:
        patched.setattr(SaveSchedule, "on_save", stop)
        status, _, err = say(*train)
    assert status == 130
    assert "--resume" in err
    assert "checkpoint-2" in err
    assert not (output / "config.json").exists()
    assert say(*train, "--resume")[0] == 0
    files = ["README.md", "config.json", "custom_generate", "model.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == files


def test_bad_models_and_drafters(say, model_folder, drafter_folder, tmp_path):
    def answer(model, drafter):
        return refusal(say("generate", "--model", model, "--drafter", drafter, "--prompt", "Once"))

    assert f"There is no model folder at {tmp_path}/none." in answer(tmp_path / "none", drafter_folder)
    assert f"There is no drafter folder at {tmp_path}/none." in answer(model_folder, tmp_path / "none")

    broken = shutil.copytree(drafter_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((drafter_folder / "model.safetensors").read_bytes()[:-9])
    assert "damaged or truncated" in answer(model_folder, broken)
    (broken / "model.safetensors").unlink()
    assert "model.safetensors is missing" in answer(model_folder, broken)

    cut = shutil.copytree(model_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-9])
    assert f"The model {cut} cannot be loaded" in answer(cut, drafter_folder)

    other = tmp_path / "other"
    RecurrentDrafter.for_target(tiny_model(vocab_size=70)).save_pretrained(other)
    assert "vocabulary 70" in answer(model_folder, other)
    tuned = fine_tuned(model_folder, tmp_path / "tuned")
    assert "weights differ" in answer(tuned, drafter_folder)

    stateful = tmp_path / "mamba"
    tiny_model("mamba", vocab_size=259).save_pretrained(stateful)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, stateful / name)
    assert "MambaForCausalLM" in answer(stateful, drafter_folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2: the prompt is empty"),
        ('{"words": "a"}\n', 'line 1: a row needs "messages"'),
        (json.dumps({"prompt": "a" * 129}) + "\n", "has 129 tokens, the model's context 128"),
        ("", "p.jsonl holds no prompt"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "check"])
def test_bad_prompts(say, model_folder, drafter_folder, tmp_path, command, content, sentence):
    (tmp_path / "p.jsonl").write_text(content)
    words = [command, "--model", model_folder, "--drafter", drafter_folder, "--prompts", tmp_path / "p.jsonl"]
    assert sentence in refusal(say(*words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "--prompts"),
        (["--prompt", "a", "--prompts", "x"], "--prompts"),
        (["--prompt", "a", "--beam-width", 300], "259"),
        (["--prompt", "a", "--dtype", "float8"], "--dtype"),
        (["--prompt", "a", "--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_options(say, model_folder, drafter_folder, words, sentence):
    assert sentence in refusal(say("generate", "--model", model_folder, "--drafter", drafter_folder, *words))


def test_generate_chooses_a_drafter_and_says_which(say, model_folder, drafter_folder, tmp_path):
    words = ["--prompt", "abcabcab", "--max-new-tokens", 12]
    alone = say("generate", "--model", model_folder, *words, "--no-drafter")
    assert "Drafter" not in alone[2]
    status, out, err = say("generate", "--model", model_folder, *words)
    assert (status, out) == alone[:2]
    assert err.count("Drafter: ") == 1
    assert "prompt lookup" in err
    own = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(drafter_folder, own / "drafter")
    status, out, err = say("generate", "--model", own, *words)
    assert (status, out) == alone[:2]
    assert f"Drafter: {own / 'drafter'}" in err


def test_the_error_names_the_bad_training_row(say, model_folder, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "once upon a time"}\n{"text": 3}\n')
    words = ["train", "--model", model_folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    assert "data.jsonl line 2" in refusal(say(*words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--epochs", 0], "The epochs must be positive, not 0"),
        (["--learning-rate", -1], "The learning rate must be positive, not -1"),
        (["--draft-vocabulary", 200], "fewer than a draft vocabulary of 200"),
    ],
)
def test_training_with_impossible_settings_is_rejected(say, model_folder, tmp_path, option, sentence):
    (tmp_path / "data.jsonl").write_text('{"text": "once upon a time"}\n')
    words = ["train", "--model", model_folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    assert sentence in refusal(say(*words, *option))


def test_an_unexpected_error_is_one_sentence(say, drafter_folder, monkeypatch):
    from redrafter.utils import hub

    def broken(folder):
        raise ZeroDivisionError("division\nby zero.")

    monkeypatch.setattr(hub, "size_on_disk", broken)
    assert "ZeroDivisionError: division by zero; add --debug" in refusal(say("info", drafter_folder))
    with pytest.raises(ZeroDivisionError):
        main(["info", str(drafter_folder), "--debug"])


def test_usage_errors_are_one_sentence(say):
    assert "No such command" in refusal(say("draw"))
    assert "see redrafter generate --help." in refusal(say("generate"))
    assert "No such option: --colour" in refusal(say("check", "--colour"))
    assert "'--max-new-tokens'" in refusal(say("generate", "--model", "x", "--max-new-tokens", 0))
    status, out, _ = say()
    assert status == 0
    assert "Usage: redrafter" in out


def test_debug_shows_the_traceback(model_folder):
    with pytest.raises(Exception, match="no drafter folder"):
        main(["info", "/none/such", "--debug"])


def test_the_demo_generates_the_same_text_with_and_without_its_drafter(say):
    from redrafter.cli.demo import PROMPTS

    some = [word for text in PROMPTS[::3] for word in ("--prompt", text)]
    status, out, err = say("demo", "--json", "--repeats", 1, "--max-new-tokens", 24, *some)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert set(result) == {"prompts", "median_speedup"}
    assert len(result["prompts"]) == len(PROMPTS[::3]) == 3
    for row in result["prompts"]:
        assert set(row) == {
            "prompt", "text", "same_text", "tokens", "steps", "tokens_per_step",
            "seconds_autoregressive", "seconds_drafted",
        }  # fmt: skip
        assert row["same_text"] is True
        assert row["text"]
    total = sum(row["tokens"] for row in result["prompts"])
    assert total / sum(row["steps"] for row in result["prompts"]) >= 2.5


def test_the_demo_shows_its_text_and_a_table(say):
    status, out, _ = say("demo", "--prompt", "I need a hotel in London.", "--repeats", 1, "--max-new-tokens", 12)
    assert status == 0
    for word in (
        "I need a hotel in London.",
        "tokens per step",
        "positions 1 to 10",
        "end-to-end speed-up",
        "same text: yes",
    ):
        assert word in out
    assert "the prompt is empty" in refusal(say("demo", "--json", "--prompt", ""))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_shows_any_model(say, model_folder, drafter_folder, dtype):
    """In bfloat16 texts may differ, which is no failure."""
    words = ("--prompt", "Hello", "--repeats", 1, "--max-new-tokens", 8, "--device", "cpu", "--dtype", dtype)
    for drafter in ((), ("--drafter", drafter_folder)):
        status, out, err = say("demo", "--model", model_folder, *drafter, *words)
        assert status == 0
        assert "same text" in out
        assert ("prompt lookup" in err) == (not drafter), "says which drafter was chosen"
    assert "--model" in refusal(say("demo", "--drafter", drafter_folder))
    assert "nowhere" in refusal(say("demo", "--model", "nowhere/at/all"))


def test_the_demo_times_complete_calls(say, monkeypatch):
    import redrafter.cli.demo  # noqa: F401
    from redrafter.engine import generate as decoding

    clock, plain = [0.0], decoding.generate

    def slow(model, drafter, *args, **given):
        """Takes 3 s without a drafter and 2 s with it."""
        clock[0] += 3.0 if drafter is None else 2.0
        return plain(model, drafter, *args, **given)

    monkeypatch.setattr(decoding, "generate", slow)
    monkeypatch.setattr(sys.modules["redrafter.cli.demo"], "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    status, out, _ = say("demo", "--json", "--prompt", "Hello", "--repeats", 1, "--max-new-tokens", 3)
    assert status == 0
    result = json.loads(out)
    assert (result["prompts"][0]["seconds_autoregressive"], result["prompts"][0]["seconds_drafted"]) == (3.0, 2.0)
    assert result["median_speedup"] == 1.5


def test_the_demo_generates_the_text_of_transformers():
    from redrafter import generate
    from redrafter.cli.demo import PROMPTS
    from redrafter.cli.loading import demo_folder, load_drafter, load_model
    from redrafter.data.prompts import prompt_ids

    model, tokenizer = load_model(str(demo_folder() / "redrafter-demo-12m"), device="cpu")
    assert model.num_parameters() >= 10_000_000
    drafter = load_drafter(str(demo_folder() / "drafter"), model)
    prompts = [prompt_ids({"turns": [text]}, tokenizer, "here") for text in PROMPTS[::3]]
    out = generate(model, drafter, prompts, max_new_tokens=24)
    assert out.new_tokens == [greedy(model, prompt, 24) for prompt in prompts]


def test_the_bundled_files_are_small():
    from redrafter.cli.loading import demo_folder

    sizes = {path: path.stat().st_size for path in demo_folder().rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 41e6
    assert all(size < 5e6 for path, size in sizes.items() if path.parent.name != "redrafter-demo-12m")


BUSY = """
import atexit, sys, torch, torch.distributed
from redrafter.cli import main
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
group = torch.distributed.group.WORLD
part = torch.ones(2**16)
def busy():
    sys.setswitchinterval(1000)  # seconds: Python is not handed over
    for _ in range(20):
        group._allgather_base(torch.zeros_like(part), part)
atexit.register(busy)
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("words", "status"), [("--version", 0), ("train --steps 3", 2)])
def test_work_of_a_process_group_does_not_abort_the_end_of_a_command(words, status):
    """With a normal exit, 30 of 30 runs aborted (status -6): threads waited for an interpreter that had shut down."""
    ended = subprocess.run([sys.executable, "-c", BUSY, *words.split()], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert (ended.stdout == f"redrafter {__version__}\n") == (status == 0)
    assert ("redrafter: No such option: --steps" in ended.stderr) == (status == 2)


def test_each_local_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen_device(name) for name in ("auto", "cuda", "cuda:2", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:2",
        "cpu",
    ]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [chosen_device(name) for name in ("auto", "cuda", "cuda:2", "cpu")] == [
        "cuda:3",
        "cuda:3",
        "cuda:2",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [chosen_device(name) for name in ("auto", "mps")] == ["cpu", "mps"]


@pytest.fixture
def stopping(model_folder, tmp_path) -> Path:
    """A model whose own generation config sets a stop string, scores, several texts and a length."""
    folder = shutil.copytree(model_folder, tmp_path / "stopping" / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :])
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"stop_strings": [text[5:6]], "num_return_sequences": 2, "output_scores": True, "max_length": 9}
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"return_dict_in_generate": True, "do_sample": True})
    )
    return folder


def test_stop_strings_of_the_models_config_finish_texts_in_every_command(say, stopping, drafter_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "a"}\n')
    tokenizer = transformers.AutoTokenizer.from_pretrained(stopping)
    model = transformers.AutoModelForCausalLM.from_pretrained(stopping)
    ids = tokenizer("Once", return_tensors="pt")
    given = {"do_sample": False, "max_new_tokens": 12, "num_return_sequences": 1, "tokenizer": tokenizer}
    expected = model.generate(**ids, **given).sequences[0, ids.input_ids.shape[1] :]
    assert len(expected) < 12, "otherwise the test cannot fail"
    own = ["--model", stopping, "--drafter", drafter_folder, "--max-new-tokens", 12]
    status, out, _ = say("generate", *own, "--prompt", "Once")
    assert (status, out) == (0, tokenizer.decode(expected, skip_special_tokens=True) + "\n")
    status, out, _ = say("generate", *own, "--prompt", "Once", "--set", "stop_strings=[]", "--json")
    assert json.loads(out)["tokens"] == 12
    status, out, _ = say("check", *own, "--prompts", tmp_path / "p.jsonl")
    assert (status, "2 of 2 texts equal" in out) == (0, True)
    status, out, _ = say("eval", *own, "--prompts", tmp_path / "p.jsonl", "--json")
    assert (status, json.loads(out)["greedy"]["tokens"] < 24) == (0, True)
    answers = tmp_path / "o.jsonl"
    status, *_ = say("distill", *own, "--prompts", tmp_path / "p.jsonl", "--output", answers, "--device", "cpu")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert (status, len(rows)) == (0, 2)
    assert rows[0]["finish_reasons"] == ["stop"]
    assert say("info", "--model", stopping)[0] == 0


@pytest.mark.parametrize("command", ["generate", "check"])
@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ("batch_size=2", "use --batch-size"),
        ("beam_length=2", "use --beam-length"),
        ("num_return_sequences=2", "--set num_return_sequences: "),
        ("output_scores=true", "--set output_scores: "),
        ("max_length=20", "use --max-new-tokens"),
        ("tokenizer=x", "--set: tokenizer"),
        ("generation_config={}", "--set: generation_config"),
        ("drafter=x", "--set: drafter"),
        ("top_h=null", "--set top_h: null"),
        ('watermarking_config={"hue": 3}', "WatermarkingConfig"),
        ('sequence_bias={"5": -1.0}', "transformers"),
    ],
)
def test_unsupported_settings_raise_an_error(say, model_folder, drafter_folder, prompts, command, pair, sentence):
    words = [command, "--model", model_folder, "--drafter", drafter_folder, "--prompts", prompts, "--set", pair]
    assert sentence in refusal(say(*words))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("watermarking_config", {"greenlist_ratio": 0.25, "bias": 9.0}),
        ("sequence_bias", [[[35], -9.0], [[36, 37], -9.0]]),
        ("compile_config", {"dynamic": True}),
    ],
)
def test_settings_that_are_dictionaries_can_be_set(say, model_folder, drafter_folder, name, value):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("Once", return_tensors="pt")
    given = {} if name == "compile_config" else {name: value}
    expected = model.generate(**ids, do_sample=False, max_new_tokens=9, **given)[0, ids.input_ids.shape[1] :]
    words = ["generate", "--model", model_folder, "--drafter", drafter_folder, "--max-new-tokens", 9]
    status, out, _ = say(*words, "--prompt", "Once", "--set", f"{name}={json.dumps(value)}")
    assert (status, out) == (0, tokenizer.decode(expected, skip_special_tokens=True) + "\n")


def test_error_messages_name_flags(say, model_folder, drafter_folder):
    words = ["generate", "--model", model_folder, "--drafter", drafter_folder, "--prompt", "Once"]
    err = refusal(say(*words, "--seed", 3))
    assert "set --do-sample" in err
    assert "do_sample" not in err
