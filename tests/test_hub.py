"""Drafter folders on disk and on the Hub."""

from __future__ import annotations

import errno
import os
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from safetensors.torch import save_file
from torch import nn

from redrafter import RedrafterError
from redrafter.utils import hub
from redrafter.utils.paths import may_be_on_the_hub


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


def test_a_module_takes_the_dtype_of_its_weights(tmp_path):
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


def test_an_unreachable_hub_id_is_named():
    with pytest.raises(RedrafterError, match="someone/drafter is neither a folder nor"):
        hub.fetch("someone/drafter")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_weights_raise_an_error(folder, kept):
    weights = (folder / hub.WEIGHTS).read_bytes()
    (folder / hub.WEIGHTS).write_bytes(weights[:kept])
    with pytest.raises(RedrafterError, match=r"model\.safetensors is damaged or truncated"):
        hub.load_weights(nn.Linear(3, 2), folder)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight should be \(2, 3\) but is \(2, 4\)"),
        ({"weight": torch.zeros(2, 3)}, r"bias should be \(2,\) but is absent"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)},
            r"x should be absent but is \(1,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tensors, named):
    save_file(tensors, folder / hub.WEIGHTS)
    with pytest.raises(RedrafterError, match=named):
        hub.load_weights(nn.Linear(3, 2), folder)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_folder_unchanged(folder, monkeypatch, broken):
    before = contents(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(RedrafterError, match="drafter could not be written: No space left on device"):
        hub.save_folder(folder, '{"a": 2}\n', nn.Linear(30, 20).state_dict(), card="new card")
    assert contents(folder) == before


def test_an_upload_sends_only_the_drafter(drafter_folder, tmp_path, monkeypatch):
    folder = tmp_path / "drafter"
    shutil.copytree(drafter_folder, folder)
    (folder / "checkpoints").mkdir()
    sent = []

    class ConnectError(Exception):
        """An error of a network library."""

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            if name == "someone/forbidden":
                raise HFValidationError("you may not.\nMore words")
            sent.append((name, private))
            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            sent.append((repo_id, folder_path, sorted(allow_patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.push(folder, "someone/drafter") == "https://huggingface.co/someone/drafter"
    files = ["README.md", "config.json", "custom_generate/generate.py", "custom_generate/requirements.txt"]
    upload = ("someone/drafter", folder, [*files, "model.safetensors"])
    assert sent == [("someone/drafter", True), upload]
    hub.push(folder, "someone/drafter", public=True)
    assert sent[2:] == [("someone/drafter", False), upload]
    with pytest.raises(RedrafterError, match="could not be uploaded to someone/forbidden: you may not"):
        hub.push(folder, "someone/forbidden")


def login(monkeypatch, answer):
    """A Hub that only reports the login."""

    class Api:
        def whoami(self):
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr("huggingface_hub.HfApi", Api)


@pytest.mark.parametrize("name", ["me/drafter", "drafter", "we/drafter"])
def test_a_login_is_checked_and_nothing_created(monkeypatch, name):
    login(monkeypatch, {"name": "me", "orgs": [{"name": "we"}], "auth": {"accessToken": {"role": "write"}}})
    hub.check_login(name)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (LocalTokenNotFoundError("Token is required.\nMore words"), "Token is required"),
        (OSError("No such host"), "No such host"),
        ({"name": "me", "orgs": []}, "the login me is not a member of they"),
        ({"name": "they", "auth": {"accessToken": {"role": "read"}}}, "read-only"),
    ],
)
def test_a_login_that_cannot_upload_raises_an_error(monkeypatch, answer, reason):
    login(monkeypatch, answer)
    with pytest.raises(RedrafterError, match=f"they/drafter: .*{reason}"):
        hub.check_login("they/drafter")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_raise_an_error(folder, value):
    weight = torch.zeros(2, 3)
    weight[1, 2] = value
    save_file({"weight": weight, "bias": torch.zeros(2)}, folder / hub.WEIGHTS)
    with pytest.raises(RedrafterError, match=r"^Tensor weight of .*model\.safetensors holds NaN or infinity"):
        hub.load_weights(nn.Linear(3, 2), folder)


def test_an_unreachable_hub_is_checked_once(monkeypatch):
    requested = []

    class Session:
        def head(self, address, timeout):
            requested.append(timeout)
            raise OSError("No such host")

    hub.is_reachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        for name in ("someone/drafter", "drafter"):
            with pytest.raises(RedrafterError, match=f"{name} is neither a folder nor"):
                hub.fetch(name)
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
    finally:
        hub.is_reachable.cache_clear()
    assert len(requested) == 1
    assert requested[0] <= 10


@pytest.mark.parametrize("name", ["distilgpt2", "someone/gpt-2.5_x", "a"])
def test_hub_ids(name):
    assert may_be_on_the_hub(name)


@pytest.mark.parametrize("name", ["./distilgpt2", "/a", "a/b/c", "~/a", "a b", "a--b", "a/..", "-", "x.git", "a/", ""])
def test_invalid_hub_ids(name):
    assert not may_be_on_the_hub(name)


def test_a_local_folder_takes_precedence_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert may_be_on_the_hub("distilgpt2")
    (tmp_path / "distilgpt2").mkdir()
    assert not may_be_on_the_hub("distilgpt2")


def test_an_id_without_a_namespace_is_downloaded(folder, monkeypatch):
    requested = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: requested.append(name) or str(folder))
    assert hub.fetch("drafter") == folder
    assert hub.config_of("drafter") == {"a": 1}
    assert requested == ["drafter", "drafter"]
