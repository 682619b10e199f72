"""`redrafter train` and `data`, as a user types them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from conftest import refusal
from processes import ENVIRONMENT, PYTHON, Fork, new_process, signalled, two_forks
from redrafter import RedrafterError
from redrafter.training import states
from redrafter.training.checks import newest_checkpoint


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"{number} sheep went over the fence, then {number + 1}"} for number in range(40)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_data_shows_rows_as_training_reads_them(say, model_folder, tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]}
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (chat, {"text": "plain"})) + "\n{")
    assert "line 3 is not JSON" in refusal(say("data", path, "--model", model_folder))
    status, out, err = say("data", path, "--model", model_folder, "--bad-rows", "skip", "--max-length", "8")
    assert status == 0
    assert "skipped: " in err
    assert err.endswith("1 bad rows were skipped.\n")
    assert [line.split() for line in out.splitlines()[:6]] == [
        ["rows", "2"], ["tokens", "14"], ["tokens", "to", "learn", "5,", "6", "different", "ones"],
        ["rows", "without", "tokens", "to", "learn", "1"],
        ["lengths", "6", "to", "14,", "median", "14,", "95", "%", "up", "to", "14"],
        ["cut", "to", "8", "1", "rows"],
    ]  # fmt: skip
    assert "<s>u:hi</" in out
    path.write_text(path.read_text()[:-2])
    assert "--row 3: the data has 2 rows" in refusal(say("data", path, "--model", model_folder, "--row", "3"))


def test_a_chat_template_from_a_file(say, model_folder, tmp_path):
    path, template = tmp_path / "chat.jsonl", tmp_path / "t.jinja"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]})
    )
    template.write_text("{% for m in messages %}[{{ m.content }}]{% if m.role == 'user' %}>{% endif %}{% endfor %}")
    status, out, _ = say("data", path, "--model", model_folder, "--template", template)
    assert status == 0
    assert "[hi]>[yes?]" in out
    assert "cannot be read" in refusal(say("data", path, "--model", model_folder, "--template", tmp_path / "none"))


def test_the_command_line_overrides_options_from_a_file(say, model_folder, rows, tmp_path):
    config = tmp_path / "train.yaml"
    options = {
        "model": str(model_folder),
        "data": [str(rows)],
        "max-steps": 9,
        "beam_length": 2,
        "exit-dim": 16,
        "kl": 0.5,
    }
    config.write_text(yaml.safe_dump(options))
    status, _, err = say("train", "--config", config, "--output", tmp_path / "d", "--max-steps", "1", "--held-out", "3")
    assert status == 0, err
    assert "37 rows" in err
    made = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (made["beam_length"], made["exit_dim"]) == (2, 16)
    card = (tmp_path / "d" / "README.md").read_text()
    assert "kl 0.5" in card
    assert "| steps | 1 of" in card

    config.write_text(yaml.safe_dump({**options, "beam_lenght": 2}))
    assert "beam_lenght" in refusal(say("train", "--config", config, "--output", tmp_path / "e"))
    config.write_text("[1")
    assert "YAML" in refusal(say("train", "--config", config, "--output", tmp_path / "e"))
    config.write_text("3")
    assert "NAME: VALUE" in refusal(say("train", "--config", config, "--output", tmp_path / "e"))
    assert "cannot be read" in refusal(say("train", "--config", tmp_path / "none", "--output", tmp_path / "e"))


def test_a_dry_run_prints_the_expected_cost(say, model_folder, rows, tmp_path):
    words = ("train", "--model", model_folder, "--data", rows, "--output", tmp_path / "d")
    status, out, err = say(*words, "--dry-run", "--epochs", "3", "--batch-size", "4")
    assert status == 0
    assert out == ""
    assert "38 rows" in err
    assert "30 steps, about" in err
    assert "GiB of weights and moments" in err
    assert not (tmp_path / "d").exists()
    assert ", about 600 s;" in say(*words, "--dry-run", "--minutes", "10")[2]
    assert "set one of them" in refusal(say(*words, "--minutes", "1", "--max-steps", "2"))
    words += ("--cache-states", tmp_path / "states", "--draft-vocabulary", "12", "--held-out", "0")
    status, _, err = say(*words, "--dry-run")
    assert status == 0
    assert "0.00 GiB of states on disk." in err
    learnt = "".join(json.loads(line)["text"] for line in rows.read_text().splitlines()) + "$" * 40  # end tokens
    most = sorted(map(learnt.count, set(learnt)))[-12:]
    covered = f"{sum(most) / len(learnt):.2%}"
    assert f"The draft vocabulary of 12 covers {covered} of the tokens to learn." in err
    assert not (tmp_path / "states").exists()


def test_chosen_values_and_the_expected_time_are_printed(say, model_folder, rows, tmp_path):
    rows.write_text("\n".join(rows.read_text().splitlines()[:20]))
    words = ("train", "--model", model_folder, "--data", rows, "--batch-size", "8")
    status, out, err = say(*words, "--output", tmp_path / "a")
    assert (status, out) == (0, "")
    err = " ".join(err.split())
    assert "Chosen: 20 epochs of 3 steps, because 19 rows are few" in err
    assert "all 259 tokens are drafted" in err
    assert "the head is 64 wide" in err
    assert re.search(r"Expected time: about \d+ s \(60 steps of [\d.e-]+ s, 6 measurements of [\d.e-]+ s\)", err)
    assert "60 of 60 steps, loss " in err
    assert err.count("tokens per step on held-out rows") == 6
    assert re.search(
        r"Held-out tokens per step: ([\d.]+, ){5}[\d.]+; (still rising .* raise --epochs|no longer|little)", err
    )
    assert re.search(r"Loss [\d.]+ nats per drafted token \([\d.]+ over 4 draft positions\)\. Wrote ", err)

    options = ("--epochs", "2", "--draft-vocabulary", "12", "--exit-dim", "16", "--held-out", "0")
    status, _, err = say(*words, "--output", tmp_path / "b", *options)
    assert status == 0
    assert "Chosen" not in err, "the user chose"
    assert "6 of 6 steps" in err
    made = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (made["draft_vocab_size"], made["exit_dim"]) == (12, 16)
    assert "No rows were held out" in " ".join(err.split())
    status, _, err = say(*words, "--output", tmp_path / "c", "--draft-vocabulary", "0", "--max-steps", "1")
    assert status == 0
    assert "tokens are drafted" not in err
    assert json.loads((tmp_path / "c" / "config.json").read_text()).get("draft_vocab_size") is None


def test_data_without_tokens_to_learn_is_refused_before_the_target_is_loaded(say, model_folder, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7], "loss_mask": [1, 1, 0]}))

    def loaded(*_):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr("redrafter.cli.train.load_model", loaded)
    words = ("train", "--model", model_folder, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "d")
    assert "no token to learn" in refusal(say(*words))


def test_optional_parts_of_the_recurrent_head(say, model_folder, rows, tmp_path):
    words = ("train", "--model", model_folder, "--data", rows, "--output", tmp_path / "d", "--max-steps", "1")
    form = ("--gated", "--context-layer", "1", "--context-positions", "2")
    assert say(*words, *form)[0] == 0
    made = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (made["gated"], made["context_layers"], made["context_positions"]) == (True, [1], 2)
    assert "layer 1, at 2 positions" in (tmp_path / "d" / "README.md").read_text()
    status, out, _ = say("generate", "--model", model_folder, "--drafter", tmp_path / "d", "--prompt", "9 sheep")
    plain = say("generate", "--model", model_folder, "--no-drafter", "--prompt", "9 sheep")
    assert (status, out) == plain[:2]
    again = (*words[:6], tmp_path / "e")
    assert "1 to 1" in refusal(say(*again, "--context-layer", "2"))
    assert "--no-rnn" in refusal(say(*again, "--gated", "--no-rnn"))


def test_medusa_heads_from_rows_to_text(say, model_folder, rows, tmp_path):
    folder, prompts = tmp_path / "heads", tmp_path / "prompts.jsonl"
    words = ("train", "--model", model_folder, "--data", rows, "--method", "medusa", "--max-steps", "4")
    status, _, err = say(*words, "--output", folder, "--beam-length", "3", "--node-budget", "20", "--held-out", "5")
    assert status == 0, err
    assert "35 rows" in err
    made = json.loads((folder / "config.json").read_text())
    assert (made["heads"], made["blocks"], made["node_budget"], len(made["tree"])) == (3, 1, 20, 63)
    assert made["fitted_on"] == "5 held-out rows"
    assert "# Medusa heads for tiny" in (folder / "README.md").read_text()
    status, out, _ = say("info", folder)
    assert status == 0
    assert "3 heads of 1 block" in out
    assert "a tree of 20 nodes, 3 deep, fitted on 5 held-out rows" in " ".join(out.split())

    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("9 sheep", "went over")))
    pair = ("--model", model_folder, "--drafter", folder)
    plain = say("generate", "--model", model_folder, "--no-drafter", "--prompts", prompts, "--max-new-tokens", "20")
    for shape in ((), ("--beam-length", "2", "--beam-width", "3", "--node-budget", "6")):
        drafted = say("generate", *pair, "--prompts", prompts, "--max-new-tokens", "20", *shape)
        assert drafted[:2] == plain[:2]
    status, out, _ = say("check", *pair, "--prompts", prompts, "--max-new-tokens", "20", "--do-sample", "--seed", "3")
    assert status == 0
    assert "2 of 2 texts equal" in out
    status, out, err = say("eval", *pair, "--prompts", prompts, "--max-new-tokens", "20", "--json")
    assert status == 0
    assert err == ""
    counts = json.loads(out)
    for mode in ("greedy", "sampled"):
        assert counts[mode]["decoding"] == counts[mode]["walked"]
        assert counts[mode]["decoding"]["draft_tokens"] == 19 * counts[mode]["decoding"]["drafts"]


def test_a_cartesian_tree_and_a_draft_vocabulary(say, model_folder, rows, tmp_path):
    words = ("train", "--model", model_folder, "--data", rows, "--method", "medusa", "--max-steps", "1")
    words += ("--beam-length", "2", "--cartesian", "4,3", "--blocks", "2", "--draft-vocabulary", "12")
    status, _, err = say(*words, "--output", tmp_path / "d")
    assert status == 0, err
    made = json.loads((tmp_path / "d" / "config.json").read_text())
    assert sorted(made["tree"]) == sorted([[i] for i in range(4)] + [[i, j] for i in range(4) for j in range(3)])
    assert (made["blocks"], made["draft_vocab_size"]) == (2, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method other", "'other' is not one of 'recurrent', 'medusa'"),
        ("--precision int8", "'int8' is not one of 'auto', 'float32'"),
        ("--method eagle --blocks 1", "--blocks is an option of --method recurrent and medusa, not of eagle"),
        ("--method medusa --no-rnn", "--no-rnn is an option of --method recurrent, not of medusa"),
        ("--cartesian 4,3", "--cartesian is an option of --method medusa, not of recurrent"),
        ("--method medusa --exit-dim 8", "--exit-dim is an option of --method recurrent, not of medusa"),
        ("--method medusa --gated", "--gated is an option of --method recurrent, not of medusa"),
        ("--method medusa --context-layer 1", "--context-layer is an option of --method recurrent, not of medusa"),
        ("--method medusa --cartesian 4,x", "--cartesian takes a number"),
        ("--method medusa --cartesian 4,3", "for each of 4 heads"),
        ("--method medusa --cartesian 9,9,9,9", "from 2 to 1,024 nodes, not 7,381"),
    ],
)
def test_options_of_another_method_are_refused_before_anything_is_loaded(say, tmp_path, words, message):
    command = ("train", "--model", tmp_path / "none", "--data", tmp_path / "none", "--output", tmp_path / "d")
    assert message in refusal(say(*command, *words.split()))


def written(answer: tuple[int, str, str], folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a successful run wrote."""
    assert answer[0] == 0, answer[2]
    return load_file(folder / "model.safetensors")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small_shards_slowly() -> None:
    """Cached states are in many files, and each takes its time."""
    save, states.SHARD = states.save_file, SHARD

    def save_file(*arguments):
        time.sleep(0.02)
        save(*arguments)

    states.save_file = save_file


SHARD = 2**13


@pytest.fixture
def alone(say, model_folder, rows, tmp_path):
    """A command line that lacks its batch size and output, and the weights of one process with batches of 4."""
    rows.write_text(
        "\n".join(rows.read_text().splitlines()[10:26])
    )  # of one length: the mean of two halves is that of all
    words = ("train", "--model", model_folder, "--data", rows, "--max-steps", "3", "--exit-dim", "16")
    words += ("--device", "cpu", "--held-out", "4", "--kl", "0.5", "--batch-size")
    return words, written(say(*words, 4, "--output", tmp_path / "one"), tmp_path / "one")


def assert_trained_equally(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=1e-5)
    assert not (folder / "checkpoints").exists()


def test_torchrun_trains_like_one_process(alone, tmp_path):
    words, weights = alone
    torchrun = [*PYTHON, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m redrafter".split()]
    words = [*torchrun, *map(str, (*words, 2, "--output", tmp_path / "two"))]
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert_trained_equally(tmp_path / "two", weights)


ACCELERATE = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()


@pytest.mark.parametrize("how", ["accelerate", "sharded"])
def test_two_processes_train_like_one(alone, tmp_path, how):
    """As accelerate's launcher starts them, and with a sharded target; each caches a part of the states."""
    words, weights = alone
    words += (2, "--output", tmp_path / "two", "--cache-states", tmp_path / "states")
    environment = {}
    if how == "accelerate":
        options = launch_command_parser().parse_args([*ACCELERATE, "--main_process_port", "0", "redrafter"])
        environment = {name: value for name, value in prepare_multi_gpu_env(options).items() if "ACCELERATE" in name}
        assert environment
    else:
        words += ("--shard-target",)
    two_forks(*words, folder=tmp_path, before=small_shards_slowly, **environment)
    assert_trained_equally(tmp_path / "two", weights)
    assert len(list((tmp_path / "states").iterdir())) > 3


def test_a_run_killed_while_it_caches_states_resumes_from_the_last_complete_file(
    say, model_folder, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(states, "SHARD", SHARD)
    words = ("train", "--model", model_folder, "--data", rows, "--max-steps", "3", "--exit-dim", "16")
    words += ("--device", "cpu", "--cache-states")
    whole = written(say(*words, tmp_path / "all", "--output", tmp_path / "whole"), tmp_path / "whole")
    folder = tmp_path / "states"
    again = (*words, folder, "--output", tmp_path / "killed")
    third = folder / "states-00002.safetensors"
    assert signalled(Fork(*again, before=small_shards_slowly), signal.SIGKILL, third.exists) == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert 3 <= len(there) < len(list((tmp_path / "all").glob("*.safetensors")))
    resumed = written(say(*again), tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == moment for path, moment in there.items()), (
        "complete files are not computed again"
    )
    assert files_of(folder) == files_of(tmp_path / "all")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("step", [2, 6])
def test_a_killed_run_resumes_to_the_same_weights(say, model_folder, rows, tmp_path, step):
    """Killed when it has written a checkpoint."""
    options = "--max-steps 16 --save-steps 2 --device cpu --batch-size 4 --exit-dim 16 --output".split()
    words = ("train", "--model", model_folder, "--data", rows, *options)
    whole = written(say(*words, tmp_path / "whole"), tmp_path / "whole")
    folder = tmp_path / "killed"
    complete = folder / "checkpoints" / f"checkpoint-{step}" / "complete"
    signalled(Fork(*words, folder), signal.SIGKILL, complete.exists)
    if not (folder / "model.safetensors").exists():
        assert say(*words, folder, "--resume")[0] == 0
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


SLOWLY = """
import time
from redrafter.training import checkpointing
from redrafter.utils import progress
progress.FIRST = progress.INTERVAL = 0.02
step = checkpointing.Trainer.training_step
checkpointing.Trainer.training_step = lambda *words: time.sleep(0.1) or step(*words)
"""


@pytest.mark.parametrize(
    ("start", "sign", "status"),
    [
        (partial(new_process, before=SLOWLY), signal.SIGINT, 130),
        (partial(Fork, before=lambda: exec(SLOWLY, {})), signal.SIGTERM, 143),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_saves_a_checkpoint_to_resume_from(say, model_folder, rows, tmp_path, start, sign, status):
    """No checkpoint was due, and the final weights are those of an uninterrupted run."""
    options = "--max-steps 40 --device cpu --batch-size 4 --exit-dim 16 --held-out 2 --save-steps 1000".split()
    words = ("train", "--model", model_folder, "--data", rows, *options, "--output")
    log, folder = tmp_path / "log", tmp_path / "stopped"

    def steps_shown() -> int:
        return max((int(step) for step in re.findall(r"^(\d+) of \d+ steps", log.read_text(), re.MULTILINE)), default=0)

    assert signalled(start(*words, folder, log=log), sign, lambda: steps_shown() > 2) == status, log.read_text()
    last = log.read_text().splitlines()[-1]
    step = int(re.fullmatch(r"redrafter: Interrupted; .*--resume.* checkpoint-(\d+) .*", last)[1])
    assert 3 <= step < 40
    assert newest_checkpoint(folder / "checkpoints").name == f"checkpoint-{step}"
    assert say(*words, folder, "--resume")[0] == 0
    assert say(*words, tmp_path / "whole")[0] == 0
    assert weights_of(tmp_path / "whole") == weights_of(folder)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_an_interrupt_before_the_first_step(say, model_folder, rows, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("redrafter.training.trainer.held_out_acceptance", stop)
    words = ("train", "--model", model_folder, "--data", rows, "--output", tmp_path / "d", "--max-steps", "2")
    status, out, err = say(*words)
    assert (status, out) == (130, "")
    assert "Interrupted before the first step" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_processes_uploads(say, model_folder, rows, tmp_path, monkeypatch, rank):
    uploaded, checked = [], []
    monkeypatch.setattr(
        "redrafter.utils.hub.push", lambda *words, **options: uploaded.append((*words, options)) or "there"
    )
    monkeypatch.setattr("redrafter.utils.hub.check_login", checked.append)
    monkeypatch.setenv("RANK", str(rank))
    words = ("--model", model_folder, "--data", rows, "--max-steps", "1", "--exit-dim", "16", "--device", "cpu")
    status, _, err = say("train", *words, "--output", tmp_path / "out", "--push-to-hub", "me/it")
    assert status == 0
    assert uploaded == [(tmp_path / "out", "me/it", {"public": False})][rank:]
    assert ("Uploaded to there." in err) == (rank == 0)
    assert checked == ["me/it"][rank:]

    def refused(name):
        raise RedrafterError(f"Nothing could be uploaded to {name}: you may not.")

    monkeypatch.setattr("redrafter.utils.hub.check_login", refused)
    words = ("train", "--model", "none", "--data", "none", "--output", tmp_path / "new", "--push-to-hub", "me/it")
    message = refusal(say(*words))  # before anything is read
    assert ("Nothing could be uploaded to me/it" in message) == (rank == 0)
    assert "--public" in refusal(say(*words[:-2], "--public"))
