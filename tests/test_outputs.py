"""Commands write only into new or empty folders, or over their own files; all else stays unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from conftest import refusal
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.utils.outputs import (
    check_bench_folder,
    check_drafter_folder,
    check_rows_file,
    check_states_folder,
    locked,
)


def digest(*paths, but=()) -> dict[str, str]:
    """Hashes of all files, links and folders in `paths`, except below those in `but`."""
    found = {}
    for path in paths:
        for one in [path, *sorted(path.rglob("*"))]:
            if any(one == left or left in one.parents for left in but):
                continue
            content = os.readlink(one) if one.is_symlink() else one.read_bytes() if one.is_file() else b""
            content = content.encode() if isinstance(content, str) else content
            found[str(one)] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture
def disk(tmp_path, model_folder, drafter_folder):
    """A disk with a model, links to it, a drafter, foreign folders, and data."""
    root = tmp_path / "disk"
    shutil.copytree(model_folder, root / "model")
    (root / "link").symlink_to(root / "model")
    shutil.copytree(drafter_folder, root / "drafter")
    (root / "drafter" / "notes.txt").write_text("mine")
    (root / "papers").mkdir()
    (root / "papers" / "thesis.txt").write_text("years of work")
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "README.md").write_text("mine")
    snapshot = root / "models--me--it" / "snapshots" / "0123"
    shutil.copytree(drafter_folder, snapshot)
    (root / "cached").symlink_to(snapshot)
    trainer = root / "trainer" / "checkpoints" / "checkpoint-5"
    trainer.mkdir(parents=True)
    (trainer / "model.safetensors").write_text("of another run")
    linked = shutil.copytree(drafter_folder, root / "linked")
    shutil.rmtree(linked / "custom_generate")
    (linked / "custom_generate").symlink_to(root / "papers")
    (root / "rows.jsonl").write_text('{"text": "once upon a time there was"}\n' * 8)
    (root / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    (root / "file").write_text("mine")
    return root


FOREIGN = ("model", "link", "link/", "model/inside", "model/a/b", ".", "papers", "adapter", "adapter/inside", "cached")
FOREIGN += ("trainer", "linked", "file", "file/inside", "models--me--it/new")


def commands(disk, output):
    """Commands that write a drafter folder, with `--overwrite` if they have it."""
    model, drafter = ("--model", disk / "model"), ("--drafter", disk / "drafter")
    yield "train", *model, "--data", disk / "rows.jsonl", "--output", output, "--max-steps", 1, "--overwrite"
    yield "export", disk / "drafter", "--output", output, "--overwrite"
    yield "tune", *model, *drafter, "--prompts", disk / "prompts.jsonl", "--output", output


@pytest.mark.parametrize("path", FOREIGN)
def test_no_command_writes_a_drafter_into_a_foreign_folder(say, disk, path, monkeypatch):
    monkeypatch.chdir(disk)
    before = digest(disk)
    for output in (f"{disk}/{path}", path):
        for words in commands(disk, output):
            refusal(say(*words))
            assert digest(disk) == before, words
        for words in ("bench", "sweep"):
            command = (
                words,
                "--model",
                disk / "model",
                "--method",
                disk / "drafter",
                "--prompts",
                disk / "prompts.jsonl",
            )
            refusal(say(*command, "--output", output, "--overwrite"))
            assert digest(disk) == before, words
        with pytest.raises(RedrafterError):
            RecurrentDrafter.from_pretrained(disk / "drafter").save_pretrained(output)
        assert digest(disk) == before, "save_pretrained"


@pytest.mark.parametrize("path", ["model", "link", "model/rows.jsonl", "link/new/rows", "drafter/rows.jsonl"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_distill_does_not_write_into_folders_that_it_reads(say, disk, path, overwrite):
    assert_rows_rejected(say, disk, path, overwrite)


@pytest.mark.parametrize("path", ["prompts.jsonl", "alias.jsonl", "hard.jsonl", "rows.jsonl", "file", "noted.jsonl"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_distill_does_not_overwrite_foreign_files(say, disk, path, overwrite):
    (disk / "alias.jsonl").symlink_to(disk / "prompts.jsonl")
    os.link(disk / "prompts.jsonl", disk / "hard.jsonl")
    (disk / "noted.jsonl.state").write_text('{"a": "file of somebody else"}')
    assert_rows_rejected(say, disk, path, overwrite)


def assert_rows_rejected(say, disk, path, overwrite):
    before = digest(disk)
    words = ("--model", disk / "model", "--drafter", disk / "drafter", "--prompts", disk / "prompts.jsonl")
    refusal(say("distill", *words, "--output", disk / path, *overwrite))
    assert digest(disk) == before


@pytest.mark.parametrize("path", ["model", "link", "papers", "drafter", "file", "out", "cached"])
def test_states_are_not_written_into_a_foreign_folder(say, disk, path):
    before = digest(disk)
    words = ("train", "--model", disk / "model", "--data", disk / "rows.jsonl", "--output", disk / "out")
    (disk / "out").mkdir()
    refusal(say(*words, "--cache-states", disk / path))
    (disk / "out").rmdir()
    assert digest(disk) == before


def test_a_command_does_not_replace_its_inputs(say, disk):
    before = digest(disk)
    refusal(say("export", disk / "drafter", "--output", disk / "drafter", "--overwrite"))
    words = ("--model", disk / "model", "--drafter", disk / "drafter", "--prompts", disk / "prompts.jsonl")
    refusal(say("tune", *words, "--output", disk / "drafter"))
    refusal(say("tune", *words[:3], disk / "cached", *words[4:]))
    refusal(say("train", "--model", disk / "model", "--data", disk / "drafter" / "README.md", "--output",
                disk / "drafter", "--overwrite"))  # fmt: skip
    assert digest(disk) == before


def test_only_a_drafters_own_files_are_replaced_in_its_folder(say, disk):
    before = digest(disk, but=[disk / "drafter"])
    words = ("train", "--model", disk / "link", "--data", disk / "rows.jsonl", "--output", disk / "drafter")
    words += ("--max-steps", 1, "--exit-dim", 8)
    whole = digest(disk)
    assert "already holds a drafter: pass --overwrite" in refusal(say(*words))
    assert digest(disk) == whole
    assert say(*words, "--overwrite")[0] == 0
    assert json.loads((disk / "drafter" / "config.json").read_text())["exit_dim"] == 8
    assert (disk / "drafter" / "notes.txt").read_text() == "mine"
    names = ["README.md", "config.json", "custom_generate", "model.safetensors", "notes.txt"]
    assert sorted(os.listdir(disk / "drafter")) == names
    assert digest(disk, but=[disk / "drafter"]) == before


def test_a_new_or_empty_folder_is_written_and_nothing_else(say, disk):
    for name, words in (("new", ()), ("empty", ("--cache-states", disk / "empty" / "states"))):
        before = digest(disk)
        if name == "empty":
            (disk / "empty").mkdir()
        options = ("--model", disk / "model", "--data", disk / "rows.jsonl", "--output", f"{disk}/{name}/")
        assert say("train", *options, "--max-steps", 1, "--exit-dim", 8, *words)[0] == 0
        assert digest(disk, but=[disk / name]) == before


def test_a_drafter_replaces_a_drafter_and_follows_a_link_to_one(disk):
    drafter = RecurrentDrafter.from_pretrained(disk / "drafter")
    (disk / "alias").symlink_to(disk / "drafter")
    drafter.save_pretrained(disk / "alias")
    drafter.save_pretrained(disk / "new" / "drafter")
    assert (disk / "alias").is_symlink()
    check_drafter_folder(disk / "new" / "drafter")


def test_an_unfinished_run_is_recognised_by_its_files(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(RedrafterError, match="is not a checkpoint of this package"):
        check_drafter_folder(folder)
    (folder / "checkpoints" / "order.json").write_text('{"--batch-size": 8}')
    check_drafter_folder(folder, overwrite=False)
    (folder / "notes.txt").write_text("mine")
    check_drafter_folder(folder, overwrite=False)
    (folder / "model.safetensors").write_text("mine")
    with pytest.raises(RedrafterError, match=r"is not empty and holds no drafter \(model.safetensors\)"):
        check_drafter_folder(folder)


def test_a_benchmark_and_states_continue_in_their_own_folders(tmp_path):
    for name, content, check in (
        ("measurements.jsonl.state", '{"told": {}, "done": 0, "bytes": 0}', check_bench_folder),
        ("results.json", '{"about": {}, "asked": {}}', check_bench_folder),
        ("states.json", "{}", check_states_folder),
    ):
        folder = tmp_path / name
        check(folder)
        folder.mkdir()
        check(folder)
        (folder / name).write_text(content)
        check(folder)
        (folder / name).rename(folder / "other.json")
        with pytest.raises(RedrafterError, match="is not empty and holds no"):
            check(folder)


def test_rows_continue_in_their_own_file(tmp_path):
    check_rows_file(tmp_path / "new" / "rows.jsonl")
    (tmp_path / "rows.jsonl").touch()
    check_rows_file(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RedrafterError, match=r"is not an output of distill"):
        check_rows_file(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl.state").write_text('{"told": {}, "done": 1, "bytes": 3}')
    check_rows_file(tmp_path / "rows.jsonl")
    with pytest.raises(RedrafterError, match=r"rows\.jsonl\.state is one of the files"):
        check_rows_file(tmp_path / "rows.jsonl", inputs=[tmp_path / "rows.jsonl.state"])


HOLD = """
import sys, time
from pathlib import Path
from redrafter.utils.outputs import locked
with locked(Path(sys.argv[1]), is_file=sys.argv[2] == "file"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_holds_until_its_process_ends_even_when_killed(tmp_path, kind):
    output = tmp_path / "new" / "output"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(output), kind], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RedrafterError, match="Another process is writing"), locked(output, is_file=kind == "file"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with locked(output, is_file=kind == "file"):
        pass
    assert not [one for one in tmp_path.rglob("*") if one.is_file()]


def test_a_lock_leaves_no_files(tmp_path):
    with locked(tmp_path / "a" / "b"), locked(tmp_path / "rows.jsonl", is_file=True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_command_with_the_same_output_raises_an_error(say, disk):
    model, rows = ("--model", disk / "model"), disk / "rows.jsonl"
    options = ("--drafter", disk / "drafter", "--prompts", disk / "prompts.jsonl")
    bench = ("--method", disk / "drafter", "--prompts", disk / "prompts.jsonl", "--output", disk / "new")
    before = digest(disk)
    with locked(disk / "new"), locked(disk / "new.jsonl", is_file=True), locked(disk / "drafter"):
        for words in (
            ("train", *model, "--data", rows, "--output", disk / "new"),
            ("train", *model, "--data", rows, "--output", disk / "drafter", "--overwrite"),
            ("distill", *model, "--prompts", disk / "prompts.jsonl", "--output", disk / "new.jsonl"),
            ("tune", *model, *options),
            ("tune", *model, *options, "--output", disk / "new"),
            ("export", disk / "linked", "--output", disk / "new"),
            ("bench", *model, *bench),
            ("sweep", *model, *bench),
        ):
            assert "Another process is writing" in refusal(say(*words))
    assert digest(disk) == before
