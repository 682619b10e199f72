"""What is measured side by side: decoding without a drafter, transformers' own, and methods in some shape.

Promises that what cannot be drafted is refused before anything is measured.  Does not know how time is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from redrafter.bench.variants import Variant
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer, method_of
from redrafter.proposers.base import describe_drafts, measured_shape
from redrafter.proposers.loading import load_drafter
from redrafter.proposers.methods import HeadMethod
from redrafter.targets.target import Target

ALONE = "autoregressive"
THEIRS = "transformers"

_SHAPE = re.compile(r"(\d+)?(?:x(\d+))?(?::(\d+))?")
_HOW = re.compile(r"([\dx:]+)?(?:(?(1),|)(coupled|uncoupled))?")


@dataclass(frozen=True)
class Told:
    """A method as a user names it: `LABEL=PATH@WIDTHxLENGTH:NODES,uncoupled`, of which the path alone must be there."""

    label: str
    path: str
    width: int | None = None
    length: int | None = None
    budget: int | None = None
    coupled: bool | None = None

    @classmethod
    def read(cls, text: str) -> Told:
        """`ours=folder`, `folder@10x4:32`, `folder@:32,uncoupled`.  Raises RedrafterError for what is not that."""
        label, equals, rest = text.partition("=")
        label, rest = (label.strip(), rest.strip()) if equals else ("", text.strip())
        path, at, how = rest.rpartition("@")
        told = _HOW.fullmatch(how) if at and how else None
        misspelt = bool(at and told is None and "/" not in how and not Path(rest).exists())
        if told is None:
            path, how = rest, ""
        shape, draws = told.groups() if told else (None, None)
        found = _SHAPE.fullmatch(shape or "")
        numbers = [None if one is None else int(one) for one in found.groups()] if found else []
        if found is None or 0 in numbers or not path or (equals and not label) or misspelt:
            raise RedrafterError(
                "--method takes NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES, each a number from 1, "
                f"as ours=folder@10x4:32 or ours=folder@:32,uncoupled, not {text!r}."
            )
        name = Path(path).name or path
        width, length, budget = numbers
        coupled = None if draws is None else draws == "coupled"
        return cls(label or (f"{name} {how}" if how else name), path, width, length, budget, coupled)

    @property
    def shown(self) -> str:
        """The path and how it drafts, as they were told."""
        beams = "" if self.width is None else str(self.width)
        beams += "" if self.length is None else f"x{self.length}"
        beams += "" if self.budget is None else f":{self.budget}"
        draws = {None: "", True: "coupled", False: "uncoupled"}[self.coupled]
        how = ",".join(filter(None, (beams, draws)))
        return f"{self.path}@{how}" if how else self.path

    def shaped(self, method: Method) -> Method:
        """The method as told: whole beams unless nodes are told; what is not told is as it was made for."""
        shape = None
        if (self.width, self.length, self.budget) != (None, None, None):
            made = method.shape(0)
            width, length = self.width or made.beam_width, self.length or made.beam_length
            shape = DraftShape(beam_width=width, beam_length=length, node_budget=self.budget)
        return method if shape is None and self.coupled is None else Variant(method, shape, self.coupled)


def read_methods(texts: Sequence[str]) -> list[Told]:
    """All methods of a command.  Raises RedrafterError where two have one name, or one that is taken."""
    found = [Told.read(text) for text in texts]
    labels = [ALONE, THEIRS, *(one.label for one in found)]
    for label in labels:
        if labels.count(label) > 1:
            raise RedrafterError(f"--method {label}: the name is taken; give every method one of its own.")
    return found


@dataclass(frozen=True)
class Contender:
    """One of what is measured, under its label.  Without a method it decodes autoregressively."""

    label: str
    path: str = ""
    method: Method | None = None

    @property
    def coupled(self) -> bool | None:
        """Whether it was told to rank by the draws' noise."""
        return self.method.coupled if isinstance(self.method, Variant) else None

    def settings(self, batch: int) -> dict[str, Any]:
        """Settings of `generate` for `batch` rows decoded together."""
        return {} if self.method is None else {"shape": self.shape(batch)}

    def shape(self, batch: int) -> DraftShape | None:
        """What that comes to; None without a method."""
        if self.method is None:
            return None
        shape = measured_shape(self.method, batch, ShapeOverrides())
        return shape.model_copy(update={"batch": batch})

    def proposer(self, target: Target, batch: int) -> Proposer | None:
        """What drafts, for rows together.  Raises RedrafterError where the method cannot draft in this shape."""
        shape = self.shape(batch)
        if shape is None or self.method is None:
            return None
        return self.method.proposer(target, shape)

    def drafts(self, target: Target, batch: int) -> str:
        """How it drafts for rows together, in words; nothing where it does not."""
        shape, proposer = self.shape(batch), self.proposer(target, batch)
        return "" if shape is None or proposer is None else describe_drafts(proposer, shape)

    def form(self, target: Target) -> tuple[str, str]:
        """What its weights are and which tokens they score, in words; nothing where it has none."""
        method = self.method.method if isinstance(self.method, Variant) else self.method
        if isinstance(method, HeadMethod):
            return method.head.config.weights_description, method.head.config.vocabulary_description
        proposer = self.proposer(target, 1)
        names = ", ".join(type(one).__name__ for one in (proposer.modules if proposer else ()))
        return names, "all tokens" if names else ""

    def parameters(self, target: Target) -> int:
        """Weights that drafting reads beside the target's own."""
        return sum(one.numel() for one in self._weights(target))

    def bytes(self, target: Target) -> int:
        """Memory of those weights."""
        return sum(one.nbytes for one in self._weights(target))

    def _weights(self, target: Target) -> list[nn.Parameter]:
        proposer = self.proposer(target, 1)
        own = {id(one) for one in target.model.parameters()}
        found = {id(one): one for module in (proposer.modules if proposer else ()) for one in module.parameters()}
        return [one for key, one in found.items() if key not in own]


def greedy_twins(contenders: Sequence[Contender], batches: Sequence[int]) -> dict[str, str]:
    """Of each that differs from an earlier one in nothing but whether the draws' noise ranks its drafts: that one.

    By their labels.  Greedy decoding has no such noise, so there they are the same.
    """
    first: dict[tuple[str, tuple[DraftShape | None, ...]], Contender] = {}
    found = {}
    for one in contenders:
        if one.method is not None:
            twin = first.setdefault((one.path, tuple(one.shape(batch) for batch in batches)), one)
            if twin.coupled != one.coupled:
                found[one.label] = twin.label
    return found


def load(
    told: Sequence[Told], model: PreTrainedModel, batches: Sequence[int], *, any_target: bool = False
) -> list[Contender]:
    """The methods, each folder loaded once.

    Raises RedrafterError where one cannot be loaded, or cannot draft as told for that many rows together.
    """
    methods: dict[str, Method] = {}
    found = []
    for one in told:
        if one.path not in methods:
            methods[one.path] = method_of(load_drafter(one.path, model, any_target=any_target))
        target = Target(model, methods[one.path].layers)
        made = Contender(one.label, one.path, one.shaped(methods[one.path]))
        for batch in batches:
            try:
                if made.proposer(target, batch) is None:
                    raise RedrafterError("a length of 0 drafts nothing.")
            except RedrafterError as error:
                raise RedrafterError(f"--method {one.label}: {error}") from None
        found.append(made)
    return found
