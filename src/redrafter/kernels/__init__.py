"""Triton kernels, each beside its PyTorch reference, and the decision whether they run.

Guarantees that every kernel has a PyTorch equivalent, which runs if the kernel cannot or must not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch

from redrafter.errors import first_line

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels support."""

_enabled: ContextVar[bool] = ContextVar("kernels_enabled", default=True)


@contextmanager
def kernels_enabled(enabled: bool) -> Iterator[None]:
    """Within the context, in this thread, kernels run only if `enabled`."""
    token = _enabled.set(enabled and _enabled.get())
    try:
        yield
    finally:
        _enabled.reset(token)


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether kernels run for tensors of this device and dtype."""
    return why_no_kernels(device, dtype) is None


def why_no_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why kernels do not run; None if they do.

    They need Triton and a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1) on any device.
    """
    if not _enabled.get():
        return "disabled"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is {device.type}, not cuda"
    if dtype not in FLOATS:
        return f"unsupported dtype {str(dtype).removeprefix('torch.')}"
    return _failure(device)


@cache
def _failure(device: torch.device) -> str | None:
    """Runs one small kernel, which needs a C compiler and a supported GPU.  Returns the error, and warns once."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        from redrafter.kernels.triton import drafting

        x = torch.zeros(1, device=device)
        with torch.cuda.device_of(x):
            drafting.silu_add(x, None, None)
    except torch.OutOfMemoryError:  # not a property of the kernels
        raise
    except Exception as error:  # of any kind: PyTorch replaces the kernels
        message = first_line(error)
        warnings.warn(f"Triton kernels do not run here; decoding uses PyTorch instead: {message}", stacklevel=4)
        return message
    return None
