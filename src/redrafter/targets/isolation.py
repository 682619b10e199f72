"""A copy of a model's modules for our own forward passes, so that the caller's model is never changed.

Guarantees that the copy shares every weight with the original and computes its results in evaluation mode.  Changes to
the copy (classes, forward methods, hooks, buffers, training flags, configs) do not affect the original, so other
threads may run or train the original at the same time.  Weights that are changed in place, or assigned to a module of
the original, change in the copy too.  Does not see modules that are added or replaced later, nor state that a module
keeps outside of its attributes.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PretrainedConfig

from redrafter.errors import RedrafterError

M = TypeVar("M", bound=nn.Module)
_ORIGINAL = "_isolated_from"
"""Attribute of a copy: a weak reference to the original."""


def isolated(model: M) -> M:
    """A copy in evaluation mode.  It needs no memory for weights, and some microseconds per module.

    Raises RedrafterError if a module in training mode runs a function that cannot be bound to its copy.
    """
    copied = _Copies(model.modules()).of(model)
    vars(copied)[_ORIGINAL] = weakref.ref(original(model))
    return cast("M", copied)


def original(model: nn.Module) -> nn.Module:
    """The original of a copy; any other module unchanged."""
    reference = vars(model).get(_ORIGINAL)
    return model if reference is None else reference() or model


class _Copies:
    """Copies of modules that refer to each other as the originals do."""

    def __init__(self, modules: Iterable[nn.Module]):
        originals = list(modules)
        # not __new__ of the class: FSDP's returns a module without FSDP
        self._copies = {id(module): object.__new__(type(module)) for module in originals}
        self._configs: dict[int, Any] = {}
        for module in originals:
            values = {name: self._value(name, value) for name, value in vars(module).items()}
            vars(self.of(module)).update(values, training=False)
            self._check_forward(module)

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module, or the module itself if it was not copied."""
        return self._copies.get(id(module), module)

    def _value(self, name: str, value: Any) -> Any:
        """The copy's value of an attribute."""
        if name == "_parameters":
            return value  # shared, because offloading hooks assign weights later
        if name == "_compiled_call_impl":
            return None  # it would run the original
        return self._mapped(value)

    def _mapped(self, value: Any) -> Any:
        """A value with the modules and configs that it refers to replaced by their copies; containers are copied."""
        if value is None or type(value) in (bool, int, float, str):  # the common case, for speed
            return value
        if isinstance(value, dict):
            found = value.copy()
            for key, one in value.items():
                if isinstance(one, nn.Module | PretrainedConfig):
                    found[key] = self._mapped(one)
            return found
        if isinstance(value, nn.Module):
            return self.of(value)
        if isinstance(value, PretrainedConfig):
            return copy.deepcopy(value, self._configs)
        if type(value) in (list, tuple):
            return type(value)(map(self._mapped, value))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._mapped(value.__self__))
        if isinstance(value, functools.partial):
            return self._partial(value)
        return value

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        words = {name: self._mapped(one) for name, one in value.keywords.items()}
        found = functools.partial(self._mapped(value.func), *map(self._mapped, value.args), **words)
        vars(found).update({name: self._mapped(one) for name, one in vars(value).items()})
        return found

    def _check_forward(self, module: nn.Module) -> None:
        """Raises RedrafterError for a function in place of forward that may run modules in training mode."""
        forward = vars(module).get("forward")
        bound = forward is None or isinstance(forward, types.MethodType | functools.partial)
        if not bound and any(part.training for part in module.modules()):
            raise RedrafterError(
                f"The forward of a {type(module).__name__} was replaced by a function that refers to the "
                "original model, which is in training mode: call model.eval() first."
            )
