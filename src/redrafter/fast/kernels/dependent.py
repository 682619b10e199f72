"""Dependent launches: a kernel begins while the one before it ends, on GPUs of compute capability 9 and more.

The small kernels of a draft follow one another, and each costs its launch.  Promises the results of launches one after
another: every program of a kernel launched so lets the next kernel begin, waits until the one before has ended, which
has itself waited, and only then touches memory, to read results or to write where others may still read.  Before the
wait it may ask the second cache for weights, which are there for all to see.  A kernel launched as usual waits as
always, so both kinds mix.  Imports triton, so it is imported on first use.  Does not know what is computed.

https://docs.nvidia.com/cuda/cuda-programming-guide, "Programmatic Dependent Launch and Synchronization".
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WANTED = True
"""With False every kernel is launched as usual, for comparisons."""

CAPABILITY = 9
"""Of the GPUs, at least, that launch dependently."""


def dependently(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """What a kernel that waits where DEPENDENT is said is launched with, dependently where it is `wanted` and can be.

    Other devices do not know the option.
    """
    if wanted and WANTED and can_depend(device):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@cache
def can_depend(device: torch.device) -> bool:
    """Whether the device can launch dependently; triton's interpreter cannot."""
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device)[0] >= CAPABILITY


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Lets the next kernel begin and waits for the one before; the first thing that a kernel does."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(line):
    """Asks the second cache for what these addresses point to, and waits for none."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def ask(place, tiles, BLOCK_K: tl.constexpr):
    """Asks the second cache for the first tiles of rows of a weight, which begin at `place`."""
    LINE: tl.constexpr = 1024 // place.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    line = place[:, None] + LINE * tl.arange(0, (BLOCK_K + LINE - 1) // LINE)[None, :]
    for tile in range(tiles):
        prefetch(line + tile * BLOCK_K)
