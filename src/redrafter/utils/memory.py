"""The memory of a device: what is left of it, and one sentence where it runs out.

Does not know what it is needed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from redrafter.errors import RedrafterError


def memory_left(device: torch.device) -> int | None:
    """Bytes that torch could still give out; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type in ("cpu", "mps"):  # a Mac's GPU has the memory of its CPU
        return int(psutil.virtual_memory().available)
    return None


def check_left(device: torch.device, needed: int, what: str, remedy: str, *, arithmetic: str = "") -> None:
    """Raises RedrafterError, with the remedy, where the device has not so many bytes left for what takes them.

    `arithmetic`: how the number comes about, after a comma.
    """
    left = memory_left(device)
    if left is not None and needed > left:
        room = f"{left / 2**30:.2f} GiB are left on {device}"
        raise RedrafterError(f"{what} take {needed / 2**30:.2f} GiB{arithmetic}, and {room}: {remedy}.")


@contextmanager
def within_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raises RedrafterError, with the remedy, where the device's memory runs out meanwhile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RedrafterError(f"The memory of {device} is full: {remedy}.") from error
