"""What all heads share that draft for a target from weights of their own: a folder, a draft vocabulary, defaults.

Promises that a head which was made for another model is refused.  Does not know how its logits come about.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.errors import RedrafterError
from redrafter.heads.config import HeadConfig
from redrafter.utils import hub
from redrafter.utils.outputs import check_drafter_folder

if TYPE_CHECKING:
    from redrafter.proposers import Proposer
    from redrafter.targets.target import Target


H = TypeVar("H", bound="Head")  # not Self, which checkers of types at run time do not take


_checked: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
"""Targets that each loaded head was found to fit."""


class Head(nn.Module):
    """Weights that draft for a target, and a `Method` of drafting."""

    config: HeadConfig
    config_type: ClassVar[type[HeadConfig]]
    draft_vocabulary: Tensor | None
    """The target's ids of the tokens that are scored, rising; None for all."""
    reads_text: ClassVar[bool] = False
    """Whether a draft depends on the target's states all along the text, not on those of `positions` alone."""
    by_beams: ClassVar[bool] = True
    """Whether it drafts beams, or else a tree of its own form."""
    any_target: bool
    """Whether it may draft for another model of the same shape than it was made for."""
    was_loaded: bool
    """Whether it was read from a folder; only then a target's weights are compared with what the config says."""

    def __init__(self, config: HeadConfig):
        """No weights yet; `draft_vocabulary` starts as the first ids."""
        super().__init__()
        self.config = config
        self.any_target = False
        self.was_loaded = False
        ids = torch.arange(config.head_size) if config.draft_vocab_size else None
        self.register_buffer("draft_vocabulary", ids)

    @classmethod
    def from_pretrained(
        cls: type[H],
        path: str | Path,
        *,
        target: nn.Module | None = None,
        revision: str | None = None,
        any_target: bool = False,
    ) -> H:
        """Loads a folder or hub repository that this package wrote; a recurrent drafter's may be of Apple's code.

        With `target` the head takes that model's device and dtype.  A head that was made for another model is refused,
        unless `any_target` allows every model of the same shape.  Raises RedrafterError if the folder is incomplete,
        damaged or contradicts its own config.
        """
        folder = hub.fetch(path, revision=revision)
        config = cls.config_type.from_file(folder / hub.CONFIG)
        head = cls(config)
        hub.load_weights(head, folder)
        head.eval()
        head.any_target, head.was_loaded = any_target, True
        if target is not None:
            from redrafter.targets.target import Target

            told = Target(target)
            head.check_target(told)
            head.to(device=told.device, dtype=told.dtype)
            detail = f" in {str(told.dtype).removeprefix('torch.')}"
            hub.check_finite(head.state_dict(), folder / hub.WEIGHTS, detail)
        return head

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and, where given, the card as `README.md`, each whole or not.

        Replaces a drafter in the folder, but nothing else.  Raises RedrafterError if the folder holds something else or
        lies in a model's folder, if the head's weights were rounded, and if writing fails.
        """
        self.check_whole("saved")
        check_drafter_folder(Path(path))
        hub.save_folder(Path(path), self.config.to_json(), self.state_dict(), card)

    def check_whole(self, purpose: str) -> None:
        """Raises RedrafterError, which names the purpose ("saved"), for a head whose weights were rounded."""

    def draft_only(self, ids: Int[Tensor, " draft"], target: Target) -> None:
        """Scores these ids of the target's vocabulary and no others.  Raises RedrafterError for what are not such."""
        ids = torch.as_tensor(ids, dtype=torch.long).sort().values
        if ids.unique().numel() != ids.numel() or ids[0] < 0 or ids[-1] >= target.vocab_size:
            raise RedrafterError("The draft vocabulary must hold distinct ids of the target's vocabulary.")
        self.draft_vocabulary = ids.to(target.device)

    def to_target_ids(self, drafted: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Draft-vocabulary ids as ids of the target's vocabulary."""
        return drafted if self.draft_vocabulary is None else self.draft_vocabulary[drafted]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the target's layers that it sees beside the last hidden state."""
        return ()

    @property
    def positions(self) -> int:
        """Last positions of which it sees the states."""
        return 1

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """Scores of the `length` tokens that follow each guaranteed one, teacher-forced.

        `features` are the target's states of the last `positions` positions, `embeddings` those of the guaranteed token
        and of all but the last of the true ones that follow it.
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
        """Of a head that predicts the target's features, teacher-forced: those after each position; else None.

        Entry [i, b, s] is the feature at s + 1, as step i (from 0) of a draft predicts it whose guaranteed token was
        chosen at position s - i; the target's output head scores its tokens.  Arguments as for
        `training.loss.unrolled_loss`.
        """
        return None

    def drafting(
        self, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
    ) -> tuple[int, int, int | None]:
        """Beam width, beam length and node budget, as the config has it."""
        return self.config.drafting(batch, width, length, budget)

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> Proposer | None:
        """What drafts so for a target; None for a length of 0.

        Raises RedrafterError where the head was made for another model, is elsewhere or cannot draft so.
        """
        raise NotImplementedError

    def check(self, target: Target, width: int, length: int, budget: int | None) -> None:
        """Raises RedrafterError where it was made for another model, is elsewhere or cannot draft so."""
        from redrafter.proposers.trees import check_shape

        self.check_target(target)
        check_shape(width, length, budget, tokens=self.config.head_size)
        if self.device != target.device:
            raise RedrafterError(f"The drafter is on {self.device}, the model on {target.device}; move one of them.")

    def check_target(self, target: Target) -> None:
        """Raises RedrafterError if the head was made for another model.  Weights are compared once for each model."""
        known = _checked.setdefault(self, weakref.WeakSet())
        weights = self.was_loaded and target.model not in known
        target.check_drafter(self.config, weights=weights, any_target=self.any_target or target.model in known)
        if weights:
            known.add(target.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device
