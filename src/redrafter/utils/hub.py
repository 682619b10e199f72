"""Drafter folders on disk and on the hub: `config.json`, `model.safetensors`, `README.md`, `custom_generate/`.

Promises that files are replaced atomically (`utils.atomic`).
Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from redrafter.errors import RedrafterError, reason
from redrafter.utils.atomic import write_all_atomically
from redrafter.utils.outputs import CARD as CARD
from redrafter.utils.outputs import CONFIG as CONFIG
from redrafter.utils.outputs import CUSTOM_GENERATE as CUSTOM_GENERATE
from redrafter.utils.outputs import WEIGHTS as WEIGHTS
from redrafter.utils.outputs import check_places
from redrafter.utils.paths import check_drafter_path, may_be_on_the_hub

TIMEOUT = 5.0
"""Seconds in which the hub must answer."""


def fetch(path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a drafter; a hub id is downloaded first.  Raises RedrafterError where there is none."""
    folder = _folder(path, [CONFIG, WEIGHTS, CARD], revision)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise RedrafterError(f"{folder} is not a drafter folder: {name} is missing.")
    return folder


def config_of(path: str | Path) -> dict[str, Any]:
    """What `config.json` says, in a folder or on the hub; nothing where it is missing or no JSON object.

    Raises RedrafterError where there is neither folder nor repository.
    """
    try:
        told = json.loads((_folder(path, [CONFIG]) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _folder(path: str | Path, files: list[str], revision: str | None = None) -> Path:
    """The local folder; of a hub repository the named files are downloaded first."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    check_drafter_path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with reading(path):
            return Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise RedrafterError(f"{path} is neither a folder nor a hub repository within reach ({reason}).") from error


@cache
def is_reachable() -> bool:
    """Whether the hub answers, asked once in a process and without retries.

    If not, only its cache is read: the hub's own libraries would try each file again for half a minute.
    """
    from huggingface_hub import constants, get_session

    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else TIMEOUT
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, or an error of whichever library asks the network
        return False
    return True


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Keeps the hub's libraries off the network, as by HF_HUB_OFFLINE, while they read `path`, if it is a hub id and
    the hub is out of reach.
    """
    if not may_be_on_the_hub(path) or is_reachable():
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fills `module` from the folder's weights, and takes their dtype.

    Raises RedrafterError where the file is damaged, does not hold just the tensors that the config calls for, or holds
    NaN or infinity.
    """
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise RedrafterError(f"{file} is damaged or truncated: {error}.") from None
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RedrafterError(
                f"{file} does not fit {CONFIG} beside it: tensor {name} should be "
                f"{expected.get(name, 'absent')} and is {found.get(name, 'absent')}."
            )
    check_finite(tensors, file)
    module.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    module.load_state_dict(tensors)


def check_finite(tensors: Mapping[str, Tensor], file: Path, detail: str = "") -> None:
    """Raises RedrafterError, naming the tensor, if one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RedrafterError(f"Tensor {name} of {file} holds NaN or infinity{detail}, so it cannot be used.")


def save_folder(folder: Path, config: str, tensors: Mapping[str, Tensor], card: str | None = None) -> None:
    """Writes a drafter folder by `write_files`."""
    contents = {CONFIG: config.encode(), WEIGHTS: weights(tensors)}  # a folder with a config is known as ours
    contents |= {name: text.encode() for name, text in CUSTOM_GENERATE.items()}
    if card is not None:
        contents[CARD] = card.encode()
    write_files(folder, contents)


def weights(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of `model.safetensors`."""
    whole = {k: v.detach().to("cpu", copy=False).contiguous() for k, v in tensors.items()}
    return save(whole, metadata={"format": "pt"})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files of a folder atomically.

    Raises RedrafterError if that fails; the folder's previous files are then unchanged.
    """
    check_places(folder, contents)
    try:
        for name in contents:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_all_atomically({folder / name: content for name, content in contents.items()})
    except OSError as error:
        raise RedrafterError(f"{folder} could not be written: {error.strerror}.") from error


def check_login(name: str) -> None:
    """Checks that uploads to the hub repository `name` are allowed, as far as that can be known.  Creates nothing.

    Raises RedrafterError if there is no login, if it may not write, if it belongs to neither the repository's owner nor
    a member of that organisation, or if the hub is out of reach.
    """
    from huggingface_hub import HfApi

    with _asked(f"Nothing could be uploaded to {name}"):
        found = HfApi().whoami()
    user, organisations = found.get("name"), {one.get("name") for one in found.get("orgs") or ()}
    owner = name.partition("/")[0] if "/" in name else user
    if owner not in {user, *organisations}:
        raise RedrafterError(f"Nothing could be uploaded to {name}: the login is {user}'s, who is not in {owner}.")
    if ((found.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise RedrafterError(f"Nothing could be uploaded to {name}: the login's token may only read.")


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Uploads a drafter folder to the hub repository `OWNER/NAME` and returns its address.

    A repository that does not exist is created, private unless `public`; one that exists stays as visible as it is.
    Raises RedrafterError if the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    files = [WEIGHTS, CONFIG, CARD, *CUSTOM_GENERATE]
    with _asked(f"{folder} could not be uploaded to {name}"):
        made = HfApi().create_repo(name, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=made.repo_id, folder_path=folder, allow_patterns=files)
    return str(made)


@contextmanager
def _asked(refused: str) -> Iterator[None]:
    """Raises RedrafterError, with what the hub says, where it refuses or is out of reach."""
    try:
        yield
    except Exception as error:  # the hub's own, or of whichever library asks the network
        raise RedrafterError(f"{refused}: {reason(error)}.") from error


def size_on_disk(folder: Path) -> int:
    """Bytes of the folder's own files."""
    return sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists())


def count_parameters(module: nn.Module) -> int:
    """Number of trained weights."""
    return sum(p.numel() for p in module.parameters())
