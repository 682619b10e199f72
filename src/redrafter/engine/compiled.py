"""The target's layers compiled by torch.compile, which fuses runs of small operations into one kernel.

Sets the layers' `forward` within a context, so it receives copies (`redrafter.targets.isolation`).  Falls back to the
original layers, with one warning, if torch cannot compile them.  The first step of a shape takes seconds; equal layers
share their code, so a model takes no longer than one layer.  Compiled code lasts until the process ends, and torch
caches it on disk.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from redrafter.core.cache import SlotCache
from redrafter.errors import first_line

MAX_VERSIONS = 4096
"""Limit on the compiled versions of one class: one per shape, and one per layer if layers cannot share code."""

BACKEND = "inductor"
"""The backend of torch.compile."""

_log = logging.getLogger("redrafter")


@contextmanager
def compiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the layers run compiled, except those whose forward was replaced.

    Each compilation is logged with its duration.
    """
    ours = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in ours:
        run = partial(_compiled(type(layer).forward), layer, _index(layer), len(layers))
        layer.forward = run  # type: ignore[method-assign]
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_VERSIONS, accumulated_recompile_limit=MAX_VERSIONS):
            yield
    finally:
        for layer in ours:
            del layer.forward


def mark_length_dynamic(cache: SlotCache) -> None:
    """Makes code compiled for one number of slots serve every other number."""
    for layer in cache.layers:
        for buffer in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(buffer, 2)


class _Compiled:
    """The compiled forward of a class."""

    def __init__(self, forward: Callable[..., Any]):
        self._original = forward
        self._fast = torch.compile(forward, dynamic=False, backend=BACKEND)
        self._refused = False

    def __call__(self, layer: nn.Module, index: int | None, count: int, *args: Any, **kwargs: Any) -> Any:
        """The layer's output.

        If the layer's `index` is known, it receives the per-layer view of a cache with `count` layers.
        """
        if self._refused:
            return self._original(layer, *args, **kwargs)

        def per_layer(one: Any) -> Any:
            own = index is not None and isinstance(one, SlotCache) and len(one.per_layer) == count
            return one.per_layer[index] if own else one

        begin, before = time.perf_counter(), _graphs()
        try:
            result = self._fast(layer, *map(per_layer, args), **{name: per_layer(one) for name, one in kwargs.items()})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the original layer runs instead, or raises its own error
            result = self._original(layer, *args, **kwargs)
            self._refused = True
            cause = getattr(error, "inner_exception", error)  # torch's wrapper says less
            warnings.warn(f"Decoding continues without torch.compile: {first_line(cause)}", stacklevel=2)
            return result
        if _graphs() != before:
            _log.info("compiled %s in %.1f s", type(layer).__name__, time.perf_counter() - begin)
        return result


@cache
def _compiled(forward: Callable[..., Any]) -> _Compiled:
    """One per class, because torch caches compiled code by function."""
    return _Compiled(forward)


def _index(layer: nn.Module) -> int | None:
    """The layer's index in the cache, if its modules agree on it."""
    indices = {vars(part)["layer_idx"] for part in layer.modules() if "layer_idx" in vars(part)}
    return indices.pop() if len(indices) == 1 else None


def _graphs() -> int:
    """Number of graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
