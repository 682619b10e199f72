"""What makes a decode step fast on a GPU, each part beside its plain way and none of it needed to be right."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether triton's kernels can run: on a CUDA device where triton is, or anywhere under its interpreter."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
