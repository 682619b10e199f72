"""What makes a decode step fast on a GPU, each part beside its plain way and none of it needed to be right."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute with."""


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels can run: where triton is, on a CUDA device, or anywhere under its interpreter."""
    return dtype in FLOATS and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
