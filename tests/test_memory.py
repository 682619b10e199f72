"""Free memory of a device, and the error if it runs out."""

from __future__ import annotations

import psutil
import pytest
import torch

from redrafter import RedrafterError
from redrafter.utils.memory import memory_left, within_memory


def test_memory_left_on_the_cpu():
    everything = psutil.virtual_memory().total
    for device in ("cpu", "mps"):
        assert 2**20 < memory_left(torch.device(device)) < everything
    assert memory_left(torch.device("meta")) is None


@pytest.mark.gpu
def test_memory_reserved_by_torch_counts_as_left():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    kept = torch.empty(2**30, dtype=torch.int8, device=device)
    before = memory_left(device)
    del kept
    assert 0.9 * 2**30 < memory_left(device) - before < 1.1 * 2**30


def test_the_error_contains_the_remedy():
    with (
        pytest.raises(RedrafterError, match=r"^The memory of cpu is full: write less\.$"),
        within_memory(torch.device("cpu"), "write less"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(IndexError), within_memory(torch.device("cpu"), "write less"):
        raise IndexError
