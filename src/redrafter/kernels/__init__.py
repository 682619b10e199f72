"""What makes a decode step fast, mostly on a GPU, each part beside its plain way and none of it needed to be right."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch

from redrafter.errors import first_line

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute with."""


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels can run: where triton works, on a CUDA device, or anywhere under its interpreter."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and dtype in FLOATS and _works(device)


@cache
def _works(device: torch.device) -> bool:
    """Whether triton is there and one small kernel runs, which takes a C compiler and a GPU that triton knows."""
    if find_spec("triton") is None:
        return False
    try:
        from redrafter.kernels.triton import drafting

        x = torch.zeros(1, device=device)
        with torch.cuda.device_of(x):
            drafting.activated(x, None, None)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # whatever it is, the plain ways stand in
        told = f"Triton's kernels do not run here, so decoding goes on without them: {first_line(error)}"
        warnings.warn(told, stacklevel=3)
        return False
    return True
