"""Drafter folders on disk and on the hub: `config.json`, `model.safetensors`, `README.md`, `custom_generate/`.

Promises that a file is replaced whole or not at all: everything is written beside its place first, then renamed.
Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from redrafter.errors import RedrafterError, reason

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

CUSTOM_GENERATE = {
    "custom_generate/generate.py": (
        '"""For model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)."""\n\n'
        "from redrafter.huggingface import from_folder as generate  # noqa: F401\n"
    ),
    "custom_generate/requirements.txt": "redrafter>=0.1\n",
}
"""What transformers looks for in a folder that it is to decode with."""


def may_be_on_the_hub(path: str | Path) -> bool:
    """Whether it is no local path but has the form OWNER/NAME."""
    return "/" in str(path) and not is_local(path)


def is_local(path: str | Path) -> bool:
    """Whether it can be no hub id, but a path alone, there or not."""
    return Path(path).exists() or str(path).count("/") > 1 or str(path).startswith((".", "/", "~"))


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
    if not may_be_on_the_hub(path):
        raise RedrafterError(f"There is no drafter folder at {path}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise RedrafterError(f"{path} is neither a folder nor a hub repository within reach ({reason}).") from error


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fills `module` from the folder's weights, and takes their dtype.

    Raises RedrafterError where the file is damaged or does not hold just the tensors that the config calls for.
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
    module.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
    module.load_state_dict(tensors)


def save_folder(folder: Path, config: str, tensors: Mapping[str, Tensor], card: str | None = None) -> None:
    """Writes a drafter folder by `write_files`."""
    contents = {WEIGHTS: weights(tensors), CONFIG: config.encode()}
    contents |= {name: text.encode() for name, text in CUSTOM_GENERATE.items()}
    if card is not None:
        contents[CARD] = card.encode()
    write_files(folder, contents)


def weights(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of `model.safetensors`."""
    whole = {k: v.detach().to("cpu", copy=False).contiguous() for k, v in tensors.items()}
    return save(whole, metadata={"format": "pt"})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files of a folder, each beside its place first and renamed when all are complete.

    Raises RedrafterError where that fails; what the folder held before is then still there.
    """
    written: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            beside = place.with_name(f".{place.name}.{os.getpid()}.part")
            written.append((beside, place))
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for beside, place in written:
            os.replace(beside, place)
    except OSError as error:
        raise RedrafterError(f"{folder} could not be written: {error.strerror}.") from error
    finally:
        for beside, _ in written:
            beside.unlink(missing_ok=True)


def reserve(name: str) -> None:
    """Makes the hub repository OWNER/NAME where there is none, so that what is to be uploaded has a place.

    Raises RedrafterError where the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    with _asked(f"Nothing could be uploaded to {name}"):
        HfApi().create_repo(name, exist_ok=True)


def push(folder: Path, name: str) -> str:
    """Uploads a drafter folder to the hub repository OWNER/NAME, which is made where there is none; its address.

    Raises RedrafterError where the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    files = [WEIGHTS, CONFIG, CARD, *CUSTOM_GENERATE]
    with _asked(f"{folder} could not be uploaded to {name}"):
        made = HfApi().create_repo(name, exist_ok=True)
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
