"""The methods of a comparison: decoding without a drafter, transformers' generate, and drafters in a given shape.

Guarantees that a method that cannot draft as requested is refused before anything is measured.  Does not know how time
is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from redrafter.bench.variants import MethodVariant
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer, method_of
from redrafter.proposers.base import describe_drafts, measured_shape
from redrafter.proposers.loading import load_drafter
from redrafter.proposers.methods import HeadMethod
from redrafter.targets.target import Target

AUTOREGRESSIVE = "autoregressive"
"""Label of decoding without a drafter by this package."""

TRANSFORMERS = "transformers"
"""Label of transformers' own generate."""

_SHAPE = re.compile(r"(\d+)?(?:x(\d+))?(?::(\d+))?")
_SWITCHES = {
    "coupled": ("coupled", True),
    "uncoupled": ("coupled", False),
    "lookup": ("lookup", True),
    "nolookup": ("lookup", False),
}


@dataclass(frozen=True)
class MethodSpec:
    """A parsed `--method`: `LABEL=PATH@WIDTHxLENGTH:NODES,uncoupled,nolookup`, of which only the path is required."""

    label: str
    path: str
    width: int | None = None
    length: int | None = None
    budget: int | None = None
    coupled: bool | None = None
    lookup: bool | None = None

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Parses `ours=folder`, `folder@10x4:32` or `folder@:32,nolookup`.  Raises RedrafterError for other text."""
        label, equals, rest = text.partition("=")
        label, rest = (label.strip(), rest.strip()) if equals else ("", text.strip())
        path, at, suffix = rest.rpartition("@")
        options = _parse_options(suffix) if at and suffix else None
        invalid_suffix = bool(at and options is None and "/" not in suffix and not Path(rest).exists())
        if options is None:
            path, suffix = rest, ""
        shape_text, switches = options or ("", {})
        shape = _SHAPE.fullmatch(shape_text)
        numbers = [None if group is None else int(group) for group in shape.groups()] if shape else []
        if shape is None or 0 in numbers or not path or (equals and not label) or invalid_suffix:
            raise RedrafterError(
                "--method takes NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES, with numbers from 1, "
                f"such as ours=folder@10x4:32 or ours=folder@:32,uncoupled,nolookup, not {text!r}."
            )
        name = Path(path).name or path
        width, length, budget = numbers
        return cls(label or (f"{name} {suffix}" if suffix else name), path, width, length, budget, **switches)

    @property
    def location(self) -> str:
        """The path and the options after it, without the label."""
        shape = "" if self.width is None else str(self.width)
        shape += "" if self.length is None else f"x{self.length}"
        shape += "" if self.budget is None else f":{self.budget}"
        set_here = (("coupled", self.coupled), ("lookup", self.lookup))
        switches = [word for word, switch in _SWITCHES.items() if switch in set_here]
        options = ",".join(filter(None, (shape, *switches)))
        return f"{self.path}@{options}" if options else self.path

    def apply(self, method: Method) -> Method:
        """The method with this shape, coupling and lookup.

        Parts of the shape that are not given are the method's defaults, except that without a budget complete beams
        are drafted.
        """
        shape = None
        if (self.width, self.length, self.budget) != (None, None, None):
            default = method.shape(0)
            width, length = self.width or default.beam_width, self.length or default.beam_length
            shape = DraftShape(beam_width=width, beam_length=length, node_budget=self.budget, lookup=default.lookup)
        if shape is None and self.coupled is None and self.lookup is None:
            return method
        return MethodVariant(method, shape, self.coupled, lookup=self.lookup)


def _parse_options(text: str) -> tuple[str, dict[str, bool]] | None:
    """The shape and the switches in `10x4:32,uncoupled,nolookup`; None if it is something else."""
    first, *words = text.split(",")
    if not re.fullmatch(r"[\dx:]+", first):
        first, words = "", [first, *words]
    if not all(word in _SWITCHES for word in words):
        return None
    switches = dict(_SWITCHES[word] for word in words)
    return (first, switches) if len(switches) == len(words) else None


def parse_methods(texts: Sequence[str]) -> list[MethodSpec]:
    """All `--method` options.  Raises RedrafterError for a label that is reserved or used twice."""
    specs = [MethodSpec.parse(text) for text in texts]
    labels = [AUTOREGRESSIVE, TRANSFORMERS, *(spec.label for spec in specs)]
    for label in labels:
        if labels.count(label) > 1:
            raise RedrafterError(f"--method {label}: the name is taken; give each method a different name.")
    return specs


@dataclass(frozen=True)
class BenchMethod:
    """A method of a comparison and its label.  Without a drafting `method` it decodes autoregressively."""

    label: str
    path: str = ""
    method: Method | None = None

    @property
    def base(self) -> Method | None:
        """The drafting method without the changes of a `MethodVariant`."""
        return self.method.method if isinstance(self.method, MethodVariant) else self.method

    @property
    def coupled(self) -> bool | None:
        """Whether drafts are ranked with the sampling noise, if a user set it."""
        return self.method.coupled if isinstance(self.method, MethodVariant) else None

    def settings(self, batch: int) -> dict[str, Any]:
        """Arguments of `generate` beside the drafter, for `batch` rows."""
        return {} if self.method is None else {"shape": self.shape(batch)}

    def shape(self, batch: int) -> DraftShape | None:
        """The draft shape for `batch` rows; None without a drafter."""
        if self.method is None:
            return None
        return measured_shape(self.method, batch, ShapeOverrides()).model_copy(update={"batch": batch})

    def proposer(self, target: Target, batch: int) -> Proposer | None:
        """The proposer for `batch` rows.  Raises RedrafterError if the method cannot draft in this shape."""
        shape = self.shape(batch)
        if shape is None or self.method is None:
            return None
        return self.method.proposer(target, shape)

    def drafts_description(self, target: Target, batch: int) -> str:
        """The drafts for `batch` rows, such as "4 beams of 5 tokens"; empty without a drafter."""
        shape, proposer = self.shape(batch), self.proposer(target, batch)
        return "" if shape is None or proposer is None else describe_drafts(proposer, shape)

    def weights_description(self, target: Target) -> tuple[str, str]:
        """The kind of weights and the draft vocabulary, for a report; empty strings without weights."""
        if isinstance(self.base, HeadMethod):
            return self.base.head.config.weights_description, self.base.head.config.vocabulary_description
        proposer = self.proposer(target, 1)
        names = ", ".join(type(module).__name__ for module in (proposer.modules if proposer else ()))
        return names, "all tokens" if names else ""

    def num_parameters(self, target: Target) -> int:
        """Number of weights that drafting reads in addition to the target's."""
        return sum(weight.numel() for weight in self._weights(target))

    def num_bytes(self, target: Target) -> int:
        """Size of those weights in bytes."""
        return sum(weight.nbytes for weight in self._weights(target))

    def _weights(self, target: Target) -> list[nn.Parameter]:
        proposer = self.proposer(target, 1)
        shared = {id(weight) for weight in target.model.parameters()}
        weights = {id(one): one for module in (proposer.modules if proposer else ()) for one in module.parameters()}
        return [weight for key, weight in weights.items() if key not in shared]


def greedy_duplicates(methods: Sequence[BenchMethod], batches: Sequence[int]) -> dict[str, str]:
    """Labels of methods that differ from an earlier method only in coupling, each with that method's label.

    Greedy decoding has no sampling noise, so both draft the same there.
    """
    first: dict[tuple[str, tuple[DraftShape | None, ...]], BenchMethod] = {}
    duplicates = {}
    for method in methods:
        if method.method is not None:
            earlier = first.setdefault((method.path, tuple(method.shape(batch) for batch in batches)), method)
            if earlier.coupled != method.coupled:
                duplicates[method.label] = earlier.label
    return duplicates


def load_methods(
    specs: Sequence[MethodSpec], model: PreTrainedModel, batches: Sequence[int], *, any_target: bool = False
) -> list[BenchMethod]:
    """Loads the methods, each folder once.

    Raises RedrafterError if a method cannot be loaded or cannot draft as requested for one of the batch sizes.
    """
    loaded: dict[str, Method] = {}
    methods = []
    for spec in specs:
        if spec.path not in loaded:
            loaded[spec.path] = method_of(load_drafter(spec.path, model, any_target=any_target))
        target = Target(model, loaded[spec.path].layers)
        method = BenchMethod(spec.label, spec.path, spec.apply(loaded[spec.path]))
        for batch in batches:
            try:
                if method.proposer(target, batch) is None:
                    raise RedrafterError("a beam length of 0 drafts nothing.")
            except RedrafterError as error:
                raise RedrafterError(f"--method {spec.label}: {error}") from None
        methods.append(method)
    return methods
