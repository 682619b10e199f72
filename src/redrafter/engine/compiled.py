"""The target's layers through torch.compile, which makes one kernel of each run of small operations.

Sets the layers' forward while it lasts, so it is given copies (`redrafter.targets.isolation`), and falls back to the plain
layers where torch cannot compile them, with one warning.  The first step of a shape takes seconds: layers that are
alike share one code, so a model takes no longer than one layer.
What was compiled serves the process until it ends, and torch keeps it on disk for the next.  Does not know what else is
made fast.
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

VERSIONS = 4096
"""Of one class's code that torch keeps: every shape is one, and every layer where nothing else is known to serve."""

BACKEND = "inductor"
"""Of torch.compile."""

_log = logging.getLogger("redrafter")


@contextmanager
def compiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the layers run compiled; those whose forward somebody has replaced do not.

    Each compilation is logged with its seconds.
    """
    ours = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in ours:
        run = partial(_compiled(type(layer).forward), layer, _index(layer), len(layers))
        layer.forward = run  # type: ignore[method-assign]
    try:
        with torch._dynamo.config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS):
            yield
    finally:
        for layer in ours:
            del layer.forward


def of_any_length(cache: SlotCache) -> None:
    """Code compiled for one number of slots serves every other."""
    for layer in cache.layers:
        for buffer in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(buffer, 2)


class _Compiled:
    """A class's forward, compiled."""

    def __init__(self, forward: Callable[..., Any]):
        self._plain = forward
        self._quick = torch.compile(forward, dynamic=False, backend=BACKEND)
        self._refused = False

    def __call__(self, layer: nn.Module, index: int | None, count: int, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives.

        Of a cache with one layer for each of the `count` of the model it sees its own, where its `index` is known.
        """
        if self._refused:
            return self._plain(layer, *args, **kwargs)

        def told(one: Any) -> Any:
            own = index is not None and isinstance(one, SlotCache) and len(one.alone) == count
            return one.alone[index] if own else one

        begin, before = time.perf_counter(), _graphs()
        try:
            result = self._quick(layer, *map(told, args), **{name: told(one) for name, one in kwargs.items()})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, the plain layer stands in, or raises what is the layer's own
            result = self._plain(layer, *args, **kwargs)
            self._refused = True
            cause = getattr(error, "inner_exception", error)  # torch's own words around it say less
            warnings.warn(f"Decoding goes on without torch.compile: {first_line(cause)}", stacklevel=2)
            return result
        if _graphs() != before:
            _log.info("compiled %s in %.1f s", type(layer).__name__, time.perf_counter() - begin)
        return result


@cache
def _compiled(forward: Callable[..., Any]) -> _Compiled:
    """One for all layers of a class: torch knows what it compiled by it."""
    return _Compiled(forward)


def _index(layer: nn.Module) -> int | None:
    """Which of a cache's layers is this one's, if its modules agree on that."""
    found = {vars(part)["layer_idx"] for part in layer.modules() if "layer_idx" in vars(part)}
    return found.pop() if len(found) == 1 else None


def _graphs() -> int:
    """Compiled so far, by this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
