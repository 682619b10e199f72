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
from typing import Generic, TypeVar

import torch

from redrafter.errors import RedrafterError, first_line

T = TypeVar("T")

_capturing = threading.Lock()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Of all captures, one at a time: torch keeps a workspace for products, 33 MiB on Hopper, for each stream used."""
    return torch.cuda.Stream(device)


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
        """A plain call that learns whether the function asks the device a question, which no capture survives."""
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():  # torch calls this mode a prototype
                warnings.filterwarnings("ignore", "Synchronization debug mode")
                torch.cuda.set_sync_debug_mode("error")
            return self._function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self.refuse("the model, or a processor, reads the device while it runs")
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
