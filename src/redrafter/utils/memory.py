"""Free memory of a device, and errors with advice if it runs out.  Does not know what the memory is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from redrafter.errors import RedrafterError


def memory_left(device: torch.device) -> int | None:
    """Bytes that torch can still allocate; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type in ("cpu", "mps"):  # on a Mac the GPU shares the memory of the CPU
        return int(psutil.virtual_memory().available)
    return None


def check_left(device: torch.device, needed: int, what: str, remedy: str, *, arithmetic: str = "") -> None:
    """Raises RedrafterError with the `remedy` if `what` takes more bytes than the device has left.

    `arithmetic`: explains the number in the message; begins with a comma.
    """
    left = memory_left(device)
    if left is not None and needed > left:
        room = f"{left / 2**30:.2f} GiB are left on {device}"
        raise RedrafterError(f"{what} take {needed / 2**30:.2f} GiB{arithmetic}, and {room}: {remedy}.")


@contextmanager
def within_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raises RedrafterError with the `remedy` if the device runs out of memory inside the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RedrafterError(f"The memory of {device} is full: {remedy}.") from error
