"""A function replayed as one CUDA graph, which removes the launch overhead of its kernels.

Guarantees the function's own results.  The function is called directly until it has shown that it does not synchronize
with the device; if it cannot be captured, it is called directly from then on, with one warning.  Does not know what the
function does.
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
    """The stream of all captures.  torch keeps a 33 MiB workspace (Hopper) for every stream that runs products."""
    return torch.cuda.Stream(device)


class Synchronizes(Exception):
    """An operator makes the host wait for the device.  The message is its name."""


class RefuseSynchronization(TorchDispatchMode):
    """Raises Synchronizes if an operator of this thread makes the host wait for a device of the given type.

    torch's `set_sync_debug_mode` would affect other threads too.
    """

    READERS = frozenset(
        "_local_scalar_dense equal is_nonzero nonzero masked_select _unique2 unique_dim unique_consecutive bincount "
        "histc repeat_interleave linalg_inv_ex linalg_solve_ex linalg_cholesky_ex linalg_eigh _linalg_eigh".split()
    )
    """Operators that always read a result or its size."""

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
        if name == "lift_fresh" and result.device.type == self._type:  # torch.tensor, whose copy is invisible to modes
            raise Synchronizes("tensor")
        if name in ("copy_", "_to_copy") and not kwargs.get("non_blocking", False):
            kinds = {one.device.type for one in [*tensors, result] if isinstance(one, torch.Tensor)}
            if len(kinds) > 1 and self._type in kinds:
                raise Synchronizes(name)
        return result

    @staticmethod
    def _selects(name: str, args: Any) -> bool:
        """Whether it indexes by a mask, whose true entries must be counted."""
        masks = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
        return any(isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8) for one in masks)


class Captured(Generic[T]):
    """Calls a function without arguments that works on fixed tensors; on CUDA, its third call is captured and replayed.

    Earlier calls initialise what is created on first use; one is enough if the function is `known` not to
    synchronize.  Every replay writes into the tensors that the captured call returned.  `refused` is a reason not to
    capture.  `valid` returns whether the captured memory is still in use: the graph would otherwise read memory that
    belongs to others, so RedrafterError is raised instead.
    """

    def __init__(
        self,
        function: Callable[[], T],
        device: torch.device,
        *,
        refused: str | None = None,
        valid: Callable[[], bool] = lambda: True,
        known: bool = False,
    ):
        self._function = function
        self._device = device
        self._valid = valid
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T
        self._known, self._calls = known, int(known)
        self.refused = refused
        """Why nothing is captured; None if it is or may still be."""
        if device.type != "cuda" and refused is None:
            self.refused = f"the device is {device.type}, not cuda"

    @property
    def replaying(self) -> bool:
        """Whether the function has been captured."""
        return self._graph is not None

    def __call__(self) -> T:
        """The function's result."""
        if not self._valid():
            raise RedrafterError("The model or its drafter was moved or converted during generation; start again.")
        if self._device.type != "cuda":
            return self._function()
        with torch.cuda.device(self._device):  # the capture must not record launches on another GPU
            return self._call()

    def _call(self) -> T:
        if self._graph is not None:
            self._graph.replay()
            return self._result
        self._calls += 1
        if self.refused is not None or (self._calls == 1 and not self._known):
            return self._function()
        if self._calls == 2:
            return self._function() if self._known else self._watched()
        return self._capture()

    def _watched(self) -> T:
        """A direct call that detects synchronization, which a capture does not support."""
        try:
            with RefuseSynchronization(self._device.type):
                return self._function()
        except Synchronizes as operator:
            self._refuse(f"the model or a processor reads the device while it runs ({operator})")
            return self._function()

    def _capture(self) -> T:
        try:
            with suppress(torch.OutOfMemoryError):
                self._graph = self._recorded()
            if self._graph is None:
                torch.cuda.empty_cache()  # a graph cannot use torch's cached memory
                self._graph = self._recorded()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refuse(first_line(error))
            return self._function()
        return self._call()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """Records the function without running it."""
        graph = torch.cuda.CUDAGraph()
        stream, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        with _capturing:  # all threads capture on the same stream
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = self._function()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
        return graph

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        warnings.warn(f"Decoding continues without a CUDA graph: {reason}.", stacklevel=4)
