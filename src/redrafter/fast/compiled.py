"""The target's layers through torch.compile, which makes one kernel of each run of small operations.

Promises the model as it was once it is left.  The first step of a shape takes seconds for its first layer and a
fraction of one for each other, whose code torch finds in its cache; what was compiled serves the process until it ends,
and torch keeps it on disk for the next.  Does not know what else is made fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from redrafter.cache import SlotCache

VERSIONS = 4096
"""Of one layer's code that torch keeps: every layer and every shape is one."""


@contextmanager
def compiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the layers run compiled; those whose forward somebody has replaced do not."""
    ours = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in ours:
        layer.forward = partial(_compiled(type(layer).forward), layer)  # type: ignore[method-assign]
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


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One for all layers of a class: torch knows what it compiled by it."""
    return torch.compile(forward, dynamic=False)
