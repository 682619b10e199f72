"""Drafter folders as Apple's released code reads them (https://github.com/apple/ml-recurrent-drafter).

Promises the same tensors under the same names, and of the config just the keys that its `DrafterConfig` knows.  The way
back needs nothing: `RecurrentDrafter.from_pretrained` reads such folders.  Does not know how they are decoded with
there; its `beam_length` counts the guaranteed token, so that N drafted ones are N + 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from redrafter.errors import RedrafterError
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

SHAPE = ("model_type", "vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
"""What both configs say."""

OF_TARGET = ("target", "target_revision", "target_fingerprint")
LEFT_OUT = (*OF_TARGET, "beam_width", "beam_length", "node_budget", "shapes", "tuned_on")
"""What ours says and the weights do not depend on."""


def export(drafter: RecurrentDrafter, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors`, each whole or not, in the drafter's dtype.

    Raises RedrafterError for a drafter in 8 bits, and for one that the released code has no form for, as one with a
    draft vocabulary: the rows of its head that it lacks could not be kept from being chosen.
    """
    check_drafter_folder(Path(folder))
    told = drafter.config.model_dump()
    if drafter.draft_vocabulary is not None:
        raise RedrafterError(
            "Apple's format scores the whole vocabulary: a drafter with a part of it has no place there."
        )
    for name, field in type(drafter.config).model_fields.items():
        if name not in SHAPE + LEFT_OUT and told[name] != field.default:
            raise RedrafterError(f"Apple's format does not know {name}, which is {told[name]} here.")
    config = {"architectures": ["Drafter"], **{name: told[name] for name in SHAPE}}
    config["torch_dtype"] = str(drafter.dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2) + "\n"
    hub.write_files(Path(folder), {hub.CONFIG: text.encode(), hub.WEIGHTS: hub.weights(drafter.state_dict())})
