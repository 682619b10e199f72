"""Drafter folders on disk and on the Hub: `config.json`, `model.safetensors`, `README.md`, `custom_generate/`.

Files are replaced atomically.  Does not know what the tensors mean.
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
"""Seconds to wait for the Hub's answer."""


def fetch(path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a drafter, downloaded first for a Hub id.  Raises RedrafterError if there is none."""
    folder = _folder(path, [CONFIG, WEIGHTS, CARD], revision)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise RedrafterError(f"{folder} is not a drafter folder: {name} is missing.")
    return folder


def config_of(path: str | Path) -> dict[str, Any]:
    """The content of `config.json` in a folder or on the Hub; empty if the file is missing or is not a JSON object.

    Raises RedrafterError if there is neither a folder nor a repository.
    """
    try:
        config = json.loads((_folder(path, [CONFIG]) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _folder(path: str | Path, files: list[str], revision: str | None = None) -> Path:
    """The local folder; for a Hub repository, after downloading the named files."""
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
        kind = type(error).__name__
        raise RedrafterError(f"{path} is neither a folder nor a reachable Hub repository ({kind}).") from error


@cache
def is_reachable() -> bool:
    """Whether the Hub answers; checked once per process, without retries.

    If it does not, only the cache is read: the Hub's libraries would retry each file for half a minute.
    """
    from huggingface_hub import constants, get_session

    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else TIMEOUT
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, or an error of any network library
        return False
    return True


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Sets the Hub's libraries to offline mode inside the block if `path` is a Hub id and the Hub is unreachable."""
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
    """Loads the folder's weights into `module` and converts it to their dtype.

    Raises RedrafterError if the file is damaged, if its tensors are not those of `module`, or if one holds NaN or
    infinity.
    """
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise RedrafterError(f"{file} is damaged or truncated: {error}.") from None
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise RedrafterError(
                f"{file} does not fit {CONFIG} beside it: tensor {name} should be "
                f"{expected.get(name, 'absent')} but is {actual.get(name, 'absent')}."
            )
    check_finite(tensors, file)
    module.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    module.load_state_dict(tensors)


def check_finite(tensors: Mapping[str, Tensor], file: Path, detail: str = "") -> None:
    """Raises RedrafterError with the name of the tensor if one holds NaN or infinity."""
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
    """Checks, as far as possible, that the login may upload to the Hub repository `name`.  Creates nothing.

    Raises RedrafterError if there is no login, if its token is read-only, if it belongs neither to the repository's
    owner nor to a member of that organisation, or if the Hub is unreachable.
    """
    from huggingface_hub import HfApi

    with _explained(f"Nothing could be uploaded to {name}"):
        login = HfApi().whoami()
    user, organisations = login.get("name"), {one.get("name") for one in login.get("orgs") or ()}
    owner = name.partition("/")[0] if "/" in name else user
    if owner not in {user, *organisations}:
        raise RedrafterError(f"Nothing could be uploaded to {name}: the login {user} is not a member of {owner}.")
    if ((login.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise RedrafterError(f"Nothing could be uploaded to {name}: the login's token is read-only.")


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Uploads a drafter folder to the Hub repository `OWNER/NAME` and returns its URL.

    Creates a missing repository, private unless `public`; does not change the visibility of an existing one.  Raises
    RedrafterError if the Hub rejects the upload or is unreachable.
    """
    from huggingface_hub import HfApi

    files = [WEIGHTS, CONFIG, CARD, *CUSTOM_GENERATE]
    with _explained(f"{folder} could not be uploaded to {name}"):
        repository = HfApi().create_repo(name, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repository.repo_id, folder_path=folder, allow_patterns=files)
    return str(repository)


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Raises RedrafterError with the failure and the Hub's reason for it."""
    try:
        yield
    except Exception as error:  # an error of the Hub or of any network library
        raise RedrafterError(f"{failure}: {reason(error)}.") from error


def size_on_disk(folder: Path) -> int:
    """Size of config, weights and card in bytes."""
    return sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists())


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
