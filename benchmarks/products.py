"""Products of a few rows by the kernel, with weights of 16 or 8 bits, next to torch's in 16, replayed as CUDA graphs.

    python benchmarks/products.py [--bits 8] [--sizes 4096x8192 …] [--rows 1 64] [--block] [--trial] [--replays N]

In bfloat16; each product reads its own weights out of a ring that no cache holds.  By default of 16 bits those of a
target of 110 million parameters, its drafter and a 7B shape, of 8 bits the sizes of a drafter's head.  With --block
what a residual block adds too: one launch of the kernel next to two or three.  Microseconds a product; with --trial of
many ways to cut the work into blocks, the fastest first.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton

from redrafter.heads.eight import EightBit
from redrafter.kernels.product import plain
from redrafter.kernels.triton.product import FEW, Tiling, product, tiling_for

SIZES = {
    16: [(2304, 768), (4096, 768), (768, 2048), (16_000, 768), (1536, 1536), (16_000, 1536),
         (12_288, 4096), (4096, 4096), (22_016, 4096), (4096, 11_008), (32_000, 4096)],
    8: [(4096, 4096), (8192, 4096), (8192, 8192), (32_000, 8192), (128_256, 8192)],
}  # by bits; out, in  # fmt: skip
ROWS = {16: [1, 10, 16, 32, 64], 8: [10, 50]}
RING = 512 << 20  # bytes of weights, many times the second cache
FAR = 0.01  # of the exact result, that the kernel may be away from it in bfloat16


def median(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Microseconds of one of the calls."""
    for _ in range(2):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events) / len(calls)


def tilings(rows: int, bits: int) -> list[Tiling]:
    """Those worth a trial: two programs fit a processor, and enough bytes are on their way."""
    height = max(FEW, min(64, triton.next_power_of_2(rows)))
    tiles = itertools.product((height,), (16, 32, 64), (128, 256, 512), (3, 4), (4, 8))
    found = []
    for tile in itertools.starmap(Tiling, tiles):
        memory = tile.stages * (tile.columns * bits // 8 + height * 2) * tile.inner
        if 30_000 < memory < 110_000 and (tile.warps == 8) == (tile.columns * tile.inner > 8192):
            found.append(tile)
    if rows == 1:
        tiles = itertools.product((1,), (4, 8, 16, 32), (256, 512, 1024), (1, 3, 4), (4, 8))
        for tile in itertools.starmap(Tiling, tiles):
            if 512 * tile.warps <= tile.columns * tile.inner <= 1024 * tile.warps:  # 16 or 32 weights a thread
                found.append(tile)
    return found


def measure(columns: int, inner: int, rows: int, bits: int, block: bool, trial: bool, replays: int) -> dict[str, float]:
    """Microseconds of a product by way."""
    device = torch.device("cuda")
    count = max(2, RING // (columns * inner * 2))
    weights = torch.randn(count, columns, inner, device=device, dtype=torch.bfloat16) / inner**0.5
    x, more = (torch.randn(rows, one, device=device, dtype=torch.bfloat16) for one in (inner, columns))
    told: dict[str, Any] = {"bias": more[0].clone(), "onto": more, "silu": True} if block else {}
    found = {"torch, 16 bits": median([partial(plain, x, weight, **told) for weight in weights], replays)}
    ring = [(weight, None) if bits == 16 else _rounded(weight) for weight in weights]
    wide = {name: one.float() if isinstance(one, torch.Tensor) else one for name, one in told.items()}
    exact = plain(x.float(), ring[0][0].float() * (1 if bits == 16 else ring[0][1][:, None]), **wide)
    chosen = tiling_for(rows, ring[0][0])
    for tile in dict.fromkeys([chosen, *tilings(rows, bits)]) if trial else [chosen]:
        label = "{} bits, {} x {} x {}, {} stages, {} warps".format(bits, *tile) + " (chosen)" * (tile == chosen)
        calls = [partial(product, x, weight, scale=scale, tiling=tile, **told) for weight, scale in ring]
        try:
            distance = float((calls[0]().float() - exact).norm() / exact.norm())
            if distance > FAR:
                print(f"  {label}: WRONG by {distance:.4f}")
                continue
            found[label] = median(calls, replays)
        except Exception as error:
            print(f"  {label}: {type(error).__name__} {str(error)[:100]}")
    return found


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in 8 bits and its scale."""
    layer = EightBit(weight)
    return layer.weight, layer.scale


def size(told: str) -> tuple[int, int]:
    """Of a weight, from OUTxIN."""
    columns, inner = told.split("x")
    return int(columns), int(inner)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 8), default=[16, 8], help="of the kernel's weights")
    parser.add_argument("--sizes", nargs="+", type=size, help="OUTxIN of weights")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--block", action="store_true", help="with bias, SiLU and what that is added to")
    parser.add_argument("--trial", action="store_true", help="of other blocks than the chosen ones")
    parser.add_argument("--replays", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    cases = [
        (bits, *case)
        for bits in given.bits
        for case in itertools.product(given.sizes or SIZES[bits], given.rows or ROWS[bits])
    ]
    for bits, (columns, inner), rows in cases:
        name = f"{rows} x {inner} -> {columns}"
        found = measure(columns, inner, rows, bits, given.block, given.trial, given.replays)
        torch.cuda.empty_cache()
        for label, us in sorted(found.items(), key=lambda one: one[1]):
            read = columns * inner * (1 if label.startswith("8") else 2)
            print(f"{name:24s} {us:7.1f} us {read / us / 1e6:5.2f} TB/s  {label}", flush=True)
            out.setdefault(name, {})[label] = round(us, 1)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
