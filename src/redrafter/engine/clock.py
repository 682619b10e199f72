"""Durations of functions on a device: replays of a CUDA graph between events, otherwise wall time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from redrafter.engine.cuda_graph import Captured
from redrafter.errors import RedrafterError

WARM_UP = 5
"""Calls before the first one that is timed."""


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median duration of a function: CUDA graph replays between events, otherwise wall time.

    Raises RedrafterError if a function on a GPU cannot be captured.
    """
    timed = _replays if device.type == "cuda" else _calls
    with torch.inference_mode():
        return statistics.median(timed(function, device, repeats))


def _replays(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    with torch.cuda.device(device):
        captured = Captured(function, device)
        for _ in range(WARM_UP):
            captured()
        if captured.refused is not None:
            raise RedrafterError(f"The function cannot be timed as a CUDA graph: {captured.refused}.")
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            before.record()
            captured()
            after.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def _calls(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(WARM_UP + repeats):
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[WARM_UP:]
