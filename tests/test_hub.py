"""Folders are read whole and written whole."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from torch import nn

from redrafter import RedrafterError, hub


@pytest.fixture
def folder(tmp_path):
    hub.save_folder(tmp_path / "drafter", '{"a": 1}\n', nn.Linear(3, 2).state_dict(), card="old card")
    return tmp_path / "drafter"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(folder):
    module = nn.Linear(3, 2)
    hub.load_weights(module, hub.fetch(folder))
    again = nn.Linear(3, 2)
    hub.load_weights(again, folder)
    assert torch.equal(module.weight, again.weight)
    assert sorted(contents(folder)) == sorted([hub.CARD, hub.CONFIG, hub.WEIGHTS, *hub.CUSTOM_GENERATE])
    assert hub.size_on_disk(folder) == sum((folder / n).stat().st_size for n in (hub.CARD, hub.CONFIG, hub.WEIGHTS))
    assert hub.count_parameters(module) == 8


def test_weights_bring_their_dtype(tmp_path):
    hub.save_folder(tmp_path, "{}", nn.Linear(3, 2).bfloat16().state_dict())
    module = nn.Linear(3, 2)
    hub.load_weights(module, tmp_path)
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [hub.CONFIG, hub.WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(RedrafterError, match=f"is not a drafter folder: {name} is missing"):
        hub.fetch(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(RedrafterError, match=f"no drafter folder at {tmp_path}/none"):
        hub.fetch(tmp_path / "none")


def test_a_hub_name_out_of_reach_is_named():
    with pytest.raises(RedrafterError, match="someone/drafter is neither a folder nor a hub repository within reach"):
        hub.fetch("someone/drafter")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_weights_are_refused(folder, kept):
    weights = (folder / hub.WEIGHTS).read_bytes()
    (folder / hub.WEIGHTS).write_bytes(weights[:kept])
    with pytest.raises(RedrafterError, match=r"model\.safetensors is damaged or truncated"):
        hub.load_weights(nn.Linear(3, 2), folder)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight should be \(2, 3\) and is \(2, 4\)"),
        ({"weight": torch.zeros(2, 3)}, r"bias should be \(2,\) and is absent"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)},
            r"x should be absent and is \(1,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tensors, named):
    save_file(tensors, folder / hub.WEIGHTS)
    with pytest.raises(RedrafterError, match=named):
        hub.load_weights(nn.Linear(3, 2), folder)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_old_folder_as_it_was(folder, monkeypatch, broken):
    before = contents(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(RedrafterError, match="drafter could not be written: No space left on device"):
        hub.save_folder(folder, '{"a": 2}\n', nn.Linear(30, 20).state_dict(), card="new card")
    assert contents(folder) == before


def test_an_upload_sends_the_drafter_alone(drafter_folder, tmp_path, monkeypatch):
    folder = tmp_path / "drafter"
    shutil.copytree(drafter_folder, folder)
    (folder / "checkpoints").mkdir()
    sent = []

    class ConnectError(Exception):
        """As of a library that asks the network."""

    class Api:
        def create_repo(self, name, exist_ok):
            if name == "someone/forbidden":
                raise HFValidationError("you may not.\nMore words")
            if name == "someone/far":
                raise ConnectError("No such host")
            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            sent.append((repo_id, folder_path, sorted(allow_patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.push(folder, "someone/drafter") == "https://huggingface.co/someone/drafter"
    files = ["README.md", "config.json", "custom_generate/generate.py", "custom_generate/requirements.txt"]
    assert sent == [("someone/drafter", folder, [*files, "model.safetensors"])]
    hub.reserve("someone/drafter")
    assert len(sent) == 1
    with pytest.raises(RedrafterError, match="could not be uploaded to someone/forbidden: you may not"):
        hub.push(folder, "someone/forbidden")
    with pytest.raises(RedrafterError, match=r"^Nothing could be uploaded to someone/forbidden: you may not"):
        hub.reserve("someone/forbidden")
    with pytest.raises(RedrafterError, match=r"^Nothing could be uploaded to someone/far: No such host\.$"):
        hub.reserve("someone/far")
