"""A function over fixed tensors, captured once as a CUDA graph and replayed.

Promises the function's own results without its launches; refuses, before anything is captured, a function that asks the
device a question.  Does not know what it replays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from redrafter.errors import RedrafterError

T = TypeVar("T")


class Captured(Generic[T]):
    """A function of no arguments over fixed tensors, replayed as one CUDA graph; elsewhere called as it is."""

    def __init__(self, function: Callable[[], T], device: torch.device):
        """Warms up and captures where `device` is CUDA.  Raises RedrafterError for what cannot be captured."""
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function()  # what is built on first use may ask
            torch.cuda.synchronize(device)
            _ask_nothing(function)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                self._output = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = graph

    def __call__(self) -> T:
        """The function's results, in the same tensors each time where it is replayed."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._output


def _ask_nothing(function: Callable[[], object]) -> None:
    """Calls it where questions are errors: a capture that fails leaves torch's generator unfit for use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise RedrafterError("What asks the device a question within a step cannot be replayed as a graph.") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
