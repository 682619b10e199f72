"""The base class of draft heads: folders on disk, the draft vocabulary, and the check of the target.

Guarantees that a head is not used with another model than the one it was trained for, unless the caller allows it.
Does not know how a head computes its logits, nor how drafts are made from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.errors import RedrafterError
from redrafter.heads.config import HeadConfig
from redrafter.targets.fingerprint import Identified
from redrafter.targets.structure import base_name
from redrafter.targets.target import Target
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

H = TypeVar("H", bound="Head")  # not Self, which run-time type checkers do not support

_checked: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
"""The models whose weights each loaded head has been compared with."""


class Head(nn.Module):
    """A module that drafts for one target model."""

    config: HeadConfig
    config_type: ClassVar[type[HeadConfig]]
    draft_vocabulary: Tensor | None
    """Sorted target ids of the tokens that are scored; None for all."""
    reads_text: ClassVar[bool] = False
    """Whether a draft depends on the target's states at all positions of the text, not only at the last `positions`."""
    by_beams: ClassVar[bool] = True
    """Whether drafts come from a beam search."""
    any_target: bool
    """Whether other models of the same shape are accepted as targets."""
    was_loaded: bool
    """Whether the head was read from a folder.  Only then are the target's weights compared with the config."""

    def __init__(self, config: HeadConfig):
        """Creates no weights; `draft_vocabulary` starts as the first ids."""
        super().__init__()
        self.config = config
        self.any_target = False
        self.was_loaded = False
        ids = torch.arange(config.head_size) if config.draft_vocab_size else None
        self.register_buffer("draft_vocabulary", ids)

    @staticmethod
    def fields_of(target: Target) -> dict[str, Any]:
        """The fields of `HeadConfig` that describe the target."""
        return {
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "target": target.name,
            "target_revision": target.revision,
            "target_fingerprint": target.fingerprint() or None,
        }

    @classmethod
    def from_pretrained(
        cls: type[H],
        path: str | Path,
        *,
        target: nn.Module | None = None,
        revision: str | None = None,
        any_target: bool = False,
    ) -> H:
        """Loads a folder or hub repository written by this package; for a recurrent drafter, also by Apple's code.

        With `target`, the head takes that model's device and dtype, and a head that was trained for another model is
        refused unless `any_target` allows every model of the same shape.  Raises RedrafterError if the folder is
        incomplete, damaged or inconsistent.
        """
        folder = hub.fetch(path, revision=revision)
        head = cls(cls.config_type.from_file(folder / hub.CONFIG))
        hub.load_weights(head, folder)
        head.eval()
        head.any_target, head.was_loaded = any_target, True
        if target is not None:
            model = Target(target)
            head.check_target(model)
            head.to(device=model.device, dtype=model.dtype)
            detail = f" in {str(model.dtype).removeprefix('torch.')}"
            hub.check_finite(head.state_dict(), folder / hub.WEIGHTS, detail)
        return head

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and, if given, the model card as `README.md`, each atomically.

        Replaces a drafter in the folder, but nothing else.  Raises RedrafterError if the folder contains something else
        or is a model's folder, and if writing fails.
        """
        check_drafter_folder(Path(path))
        hub.save_folder(Path(path), self.config.to_json(), self.state_dict(), card)

    def draft_only(self, ids: Int[Tensor, " draft"], target: Target) -> None:
        """Restricts drafts to these ids of the target's vocabulary.  Raises RedrafterError for invalid ids."""
        ids = torch.as_tensor(ids, dtype=torch.long).sort().values
        if ids.unique().numel() != ids.numel() or ids[0] < 0 or ids[-1] >= target.vocab_size:
            raise RedrafterError("The draft vocabulary must hold distinct ids of the target's vocabulary.")
        self.draft_vocabulary = ids.to(target.device)

    def to_target_ids(self, drafted: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Converts ids of the draft vocabulary to ids of the target's vocabulary."""
        return drafted if self.draft_vocabulary is None else self.draft_vocabulary[drafted]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the target's layers that it reads in addition to the last hidden state."""
        return ()

    @property
    def positions(self) -> int:
        """Number of last positions whose states it reads."""
        return 1

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """Teacher-forced scores of the `length` tokens that follow each guaranteed token.

        `features` are the target's states at the last `positions` positions; `embeddings` are those of the guaranteed
        token and of all but the last of the true tokens that follow it.
        """
        raise NotImplementedError

    def over_rows(
        self,
        embed: Callable[[Tensor], Tensor],
        hidden: Float[Tensor, "B P state"],
        input_ids: Int[Tensor, "B P"],
        segments: Int[Tensor, "B P"] | None,
        length: int,
    ) -> Float[Tensor, "length B P hidden"] | None:
        """Teacher-forced features, for a head that predicts the target's features; otherwise None.

        Entry [i, b, s] is the feature at position s + 1 that step i (from 0) of a draft predicts whose guaranteed token
        was chosen at position s - i.  The target's output head scores the tokens.  Arguments: see
        `training.loss.unrolled_loss`.
        """
        return None

    def check_target(self, target: Target) -> None:
        """Raises RedrafterError if the head was trained for another model.

        Weights are compared once per model, if the head knows a fingerprint and the model's weights can be read;
        otherwise names are compared.  With `any_target`, only the shape must match.
        """
        compared = _checked.setdefault(self, weakref.WeakSet())
        weights = self.was_loaded and target.model not in compared
        self.refuse_other(target, weights=weights, any_target=self.any_target or target.model in compared)
        if weights:
            compared.add(target.model)

    def refuse_other(self, target: Identified, *, weights: bool, any_target: bool) -> None:
        """Raises RedrafterError if the head was trained for another model than `target`.

        Fingerprints are compared only with `weights`.  With `any_target`, only the shape must match.
        """
        config = self.config
        trained_for = config.target or "a model that it does not name"
        this = target.name or "this model"
        if (config.vocab_size, config.hidden_size) != (target.vocab_size, target.hidden_size):
            raise RedrafterError(
                f"This drafter was made for {trained_for} (vocabulary {config.vocab_size}, hidden size "
                f"{config.hidden_size}), not for {this} (vocabulary {target.vocab_size}, hidden size "
                f"{target.hidden_size})."
            )
        if any_target:
            return
        known = config.target_fingerprint
        same = known.matches(target.fingerprint()) if known is not None and weights else None
        differs = "" if same is None else ", whose weights differ"
        if same is None and config.target and target.name:
            same = base_name(config.target) == base_name(target.name)
        if same is False:
            raise RedrafterError(
                f"This drafter was made for {trained_for}, not for {this}{differs}; to use it all the same, with fewer "
                "drafts accepted, pass any_target=True (--any-target on the command line)."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device
