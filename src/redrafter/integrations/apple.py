"""Writes drafter folders in the format of Apple's released code (https://github.com/apple/ml-recurrent-drafter).

The tensors keep their names; the config holds exactly the keys of Apple's `DrafterConfig`.
`RecurrentDrafter.from_pretrained` reads such folders.  Apple's `beam_length` includes the guaranteed token: N drafted
tokens are N + 1 there.
"""

from __future__ import annotations

import json
from pathlib import Path

from redrafter.errors import RedrafterError
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

SHARED_FIELDS = ("model_type", "vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
"""Fields of both configs."""

DROPPED_FIELDS = (
    *("target", "target_revision", "target_fingerprint"),
    *("beam_width", "beam_length", "node_budget", "shapes", "tuned_on"),
)
"""Fields of this package's config that do not affect the weights."""


def export(drafter: RecurrentDrafter, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors`, atomically and in the drafter's dtype.

    Raises RedrafterError for a drafter that Apple's code does not support, such as one with a draft vocabulary: Apple's
    code would also choose the tokens that it lacks.
    """
    check_drafter_folder(Path(folder))
    fields = drafter.config.model_dump()
    if drafter.draft_vocabulary is not None:
        raise RedrafterError(
            "Apple's format does not support a draft vocabulary: train a drafter with --draft-vocabulary 0."
        )
    for name, field in type(drafter.config).model_fields.items():
        if name not in SHARED_FIELDS + DROPPED_FIELDS and fields[name] != field.default:
            raise RedrafterError(f"Apple's format does not support {name}={fields[name]!r} of this drafter.")
    config = {"architectures": ["Drafter"], **{name: fields[name] for name in SHARED_FIELDS}}
    config["torch_dtype"] = str(drafter.dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2) + "\n"
    hub.write_files(Path(folder), {hub.CONFIG: text.encode(), hub.WEIGHTS: hub.weights(drafter.state_dict())})
