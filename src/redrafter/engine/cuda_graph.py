"""A function replayed as one CUDA graph, so that the host no longer launches its kernels one by one.

Promises the function's own results, call by call: it is called plainly until it has shown that it asks the device
nothing, and plainly ever after where it cannot be captured, which is said once.  Does not know what the function does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redrafter.errors import RedrafterError, first_line

T = TypeVar("T")

_capturing = threading.Lock()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Of all captures, one at a time: torch keeps a workspace for products, 33 MiB on Hopper, for each stream used."""
    return torch.cuda.Stream(device)


class Synchronizes(Exception):
    """An operator makes the host wait for the device; the message names it."""


class RefuseSynchronization(TorchDispatchMode):
    """Raises Synchronizes at an operator of this thread that makes the host wait for a device of the given type.

    Torch's own `set_sync_debug_mode` would raise errors in other threads too.
    """

    READERS = frozenset(
        "_local_scalar_dense equal is_nonzero nonzero masked_select _unique2 unique_dim unique_consecutive bincount "
        "histc repeat_interleave linalg_inv_ex linalg_solve_ex linalg_cholesky_ex linalg_eigh _linalg_eigh".split()
    )
    """Operators that read a result, or its size, whatever their arguments are."""

    def __init__(self, device: str):
        super().__init__()
        self._type = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator's result."""
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        here = any(one.device.type == self._type for one in tensors)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if here and (name in self.READERS or self._selects(name, args)):
            raise Synchronizes(name)
        result = func(*args, **kwargs)
        if name == "lift_fresh" and result.device.type == self._type:  # torch.tensor, whose copy no mode sees
            raise Synchronizes("tensor")
        if name in ("copy_", "_to_copy") and not kwargs.get("non_blocking", False):
            kinds = {one.device.type for one in [*tensors, result] if isinstance(one, torch.Tensor)}
            if len(kinds) > 1 and self._type in kinds:
                raise Synchronizes(name)
        return result

    @staticmethod
    def _selects(name: str, args: Any) -> bool:
        """Whether it indexes by a mask, whose true entries are counted first."""
        masks = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
        return any(isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8) for one in masks)


class Captured(Generic[T]):
    """Calls a function of no arguments, which works on fixed tensors; on CUDA its third call is captured and replayed.

    The calls before that build what is built on first use.  Every replay writes into the tensors that the captured
    call returned.  `wanted=False`, and any other device, calls it as it is.  `valid` says whether what was captured is
    still where it was: a graph would read memory that others have by now, so RedrafterError is raised instead.
    """

    def __init__(
        self,
        function: Callable[[], T],
        device: torch.device,
        *,
        wanted: bool = True,
        valid: Callable[[], bool] = lambda: True,
    ):
        self._function = function
        self._device = device
        self._valid = valid
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T
        self._calls = 0
        self.refused: str | None = None if wanted else "it was not asked for"
        """Why nothing is captured."""
        if device.type != "cuda":
            self.refused = f"graphs are CUDA's, and this is {device.type}"

    @property
    def replaying(self) -> bool:
        """Whether it is captured."""
        return self._graph is not None

    def __call__(self) -> T:
        """The function's result."""
        if not self._valid():
            raise RedrafterError("The model or its drafter was moved or converted while it was writing; start again.")
        if self._device.type != "cuda":
            return self._function()
        with torch.cuda.device(self._device):  # else what it launches would be captured on another GPU
            return self._answer()

    def _answer(self) -> T:
        if self._graph is not None:
            self._graph.replay()
            return self._result
        self._calls += 1
        if self.refused is not None or self._calls == 1:
            return self._function()
        if self._calls == 2:
            return self._watched()
        return self._capture()

    def _watched(self) -> T:
        """A plain call that finds out whether the function waits for the device, which no capture survives."""
        try:
            with RefuseSynchronization(self._device.type):
                return self._function()
        except Synchronizes as operator:
            self.refuse(f"the model, or a processor, reads the device while it runs ({operator})")
            return self._function()

    def _capture(self) -> T:
        try:
            with suppress(torch.OutOfMemoryError):
                self._graph = self._recorded()
            if self._graph is None:
                torch.cuda.empty_cache()  # what torch keeps for later calls cannot serve a graph
                self._graph = self._recorded()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refuse(first_line(error))
            return self._function()
        return self._answer()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """The function as a graph, which was not run yet."""
        graph = torch.cuda.CUDAGraph()
        stream, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        with _capturing:  # another thread's capture on that stream cannot be waited for
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = self._function()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
        return graph

    def refuse(self, reason: str) -> None:
        """Goes on by plain calls, which is said."""
        self.refused = reason
        warnings.warn(f"Decoding goes on without a CUDA graph: {reason}.", stacklevel=4)
