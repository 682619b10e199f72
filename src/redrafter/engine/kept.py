"""Targets and runners that are kept for later calls, with their captured steps.

Capturing a step takes about 0.1 s, more than many answers.  Guarantees that what a call finds here is what it would
have made: anything that was moved, converted, replaced, or hooked since is made anew, and so is a drafter whose weights
have changed.  Keeps nothing alive: entries go with their model, and their memory is bounded.  Two calls never share a
runner at the same time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from redrafter.decoding.step import Decoder
from redrafter.engine.runner import Runner
from redrafter.proposers import Proposer
from redrafter.targets.isolation import original
from redrafter.targets.structure import unwrapped
from redrafter.targets.target import Target

MAX_RUNNERS = 4
"""Runners that are kept for a model."""

MAX_BYTES = 2**31
"""Keys and values that are kept for a model."""

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class _Purpose:
    """What a runner was made for."""

    target: int
    """The target's `id`: entries go with their target."""
    fast: bool
    compile: bool
    origins: Mapping[int, _Origin]
    """What the proposers were made of, by the number of rows that they are meant for."""

    @property
    def dead(self) -> bool:
        """Whether a drafter no longer exists."""
        return any(origin.dead for origin in self.origins.values())


@dataclass
class _Kept:
    """What is kept for one model in one state."""

    signature: Signature
    targets: dict[tuple[bool, tuple[int, ...]], Target] = field(default_factory=dict)
    runners: list[tuple[_Purpose, Runner]] = field(default_factory=list)
    """Runners that no call uses, the most recently used last."""


_lock = threading.Lock()
_models: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def target_for(model: nn.Module, layers: Sequence[int], *, fast: bool) -> Target:
    """A target, from an earlier call with the same arguments if it can be used again.

    Raises RedrafterError if the model cannot verify trees.
    """
    model, key = unwrapped(model), (fast, tuple(layers))
    signature = _signature(model)
    with _lock:
        kept = _models.get(model)
        if kept is None or kept.signature != signature:
            kept = _models[model] = _Kept(signature)
        target = kept.targets.get(key)
    if target is not None:
        return target
    target = Target(model, layers)
    if _keeps(target):
        target.forget_model()
        with _lock:
            target = kept.targets.setdefault(key, target)
    return target


@contextmanager
def borrowed(decoders: Mapping[int, Decoder], *, batch: int, slots: int, fast: bool, compile: bool) -> Iterator[Runner]:
    """A runner as `Runner(...)` makes it, perhaps with more rows and slots, or one that an earlier call has returned.

    It is kept afterwards if its steps were captured and no error occurred.
    """
    target = decoders[1].target
    origins = {rows: origin for rows, one in decoders.items() if (origin := _Origin.of(one)) is not None}
    purpose = _Purpose(id(target), fast, compile, origins) if len(origins) == len(decoders) else None
    runner = _taken(target, purpose, batch, slots)
    if runner is None:
        rounded = 1 << (slots - 1).bit_length() if _keeps(target) else slots
        limit = target.context_length
        room = slots if limit is None else max(slots, min(rounded, limit + 1))
        runner = Runner(decoders, batch=batch, slots=room, fast=fast, compile=compile)
    try:
        yield runner
    except GeneratorExit:  # the caller wants no more events
        _return(target, purpose, runner)
        raise
    _return(target, purpose, runner)


def _kept_with(target: Target) -> _Kept | None:
    """What is kept with a target, without runners whose drafter no longer exists.  Call it with the lock."""
    kept = _models.get(target.model)
    if kept is None or target not in kept.targets.values():
        return None
    kept.runners = [(purpose, runner) for purpose, runner in kept.runners if not purpose.dead]
    return kept


def _taken(target: Target, purpose: _Purpose | None, batch: int, slots: int) -> Runner | None:
    """The smallest kept runner of sufficient size, which is no longer kept."""
    with _lock:
        kept = _kept_with(target)
        fitting = [one for one in kept.runners if one[0] == purpose and one[1].fits(batch, slots)] if kept else []
        if kept is None or not fitting:
            return None
        found = min(fitting, key=lambda one: one[1].bytes)
        kept.runners.remove(found)
        return found[1]


def _return(target: Target, purpose: _Purpose | None, runner: Runner) -> None:
    """Keeps a runner whose steps are captured."""
    if purpose is None or not _keeps(target) or not runner.captures:
        return
    runner.clear()
    with _lock:
        kept = _kept_with(target)
        if kept is None:
            return
        smaller = [
            one for one in kept.runners if one[0] != purpose or not runner.fits(one[1].state.batch, one[1].slots)
        ]
        kept.runners = [*smaller, (purpose, runner)][-MAX_RUNNERS:]
        while kept.runners and sum(one.bytes for _, one in kept.runners) > MAX_BYTES:
            kept.runners.pop(0)


@dataclass(frozen=True)
class _Origin:
    """What a proposer was made of."""

    kind: type | None
    settings: tuple[Any, ...] = ()
    models: tuple[weakref.ref[nn.Module], ...] = ()
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def of(cls, decoder: Decoder) -> _Origin | None:
        """None for proposers of other packages, which may depend on anything."""
        proposer = decoder.proposer
        if proposer is None:
            return cls(None)
        if not type(proposer).__module__.startswith("redrafter.proposers."):
            return None
        models = [original(one) for one in proposer.modules]
        return cls(
            type(proposer),
            _settings(proposer),
            tuple(map(weakref.ref, models)),
            tuple(map(_signature, models)),
        )

    @property
    def dead(self) -> bool:
        """Whether a model no longer exists."""
        return any(model() is None for model in self.models)


def _settings(proposer: Proposer) -> tuple[Any, ...]:
    """The values that a proposer's drafts depend on, with those of the proposer that it contains."""
    plain = {name: one for name, one in vars(proposer).items() if isinstance(one, str | int | float | bool | None)}
    inner = getattr(proposer, "inner", None)
    own = (type(proposer), *sorted(plain.items()), getattr(proposer, "shape", None))
    return own if inner is None else (*own, _settings(inner))


def _keeps(target: Target) -> bool:
    """Whether there is something to keep: captured steps."""
    return target.device.type == "cuda"


def _signature(model: nn.Module) -> Signature:
    """Everything that captured steps depend on: the modules, their hooks, the weights' places and versions."""
    config = getattr(model, "config", None)
    parts: list[Any] = [None if config is None else str(vars(config))]
    left = [model]
    while left:  # nn.Module.modules() takes several times as long
        module = left.pop()
        own = vars(module)
        parts += (id(module), own.get("forward"), len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]))
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    parts += (tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version)
        left += [child for child in own["_modules"].values() if child is not None]
    return tuple(parts)
