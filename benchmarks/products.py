"""Products of a few rows with weights of 8 bits by the kernel, next to torch's in 16, replayed as CUDA graphs.

    python benchmarks/products.py [--sizes 4096x8192 …] [--rows 1 64] [--trial] [--replays N]

In bfloat16, by default of 10 and 50 rows and the sizes of a drafter's head; each product reads its own weights out of a
ring that no cache holds.  Microseconds a product; with --trial of many ways to cut the work into blocks, the fastest
first.  The last line is JSON.
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

from redrafter.fast.eight import EightBit
from redrafter.fast.kernels.eight import FEW, Tiling, product, tiling_for

SIZES = [(4096, 4096), (8192, 4096), (8192, 8192), (32_000, 8192), (128_256, 8192)]  # out, in
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


def tilings(rows: int) -> list[Tiling]:
    """Those worth a trial: two programs fit a processor, and enough bytes are on their way."""
    found = []
    for tile in itertools.starmap(Tiling, itertools.product((16, 32, 64), (128, 256, 512), (3, 4), (4, 8))):
        memory = tile.stages * (tile.columns + max(FEW, triton.next_power_of_2(rows)) * 2) * tile.inner
        if 30_000 < memory < 110_000 and (tile.warps == 8) == (tile.columns * tile.inner > 8192):
            found.append(tile)
    return found


def measure(columns: int, inner: int, rows: int, trial: bool, replays: int) -> dict[str, float]:
    """Microseconds of a product by way."""
    device = torch.device("cuda")
    count = max(2, RING // (columns * inner * 2))
    weights = torch.randn(count, columns, inner, device=device, dtype=torch.bfloat16) / inner**0.5
    ring = [EightBit(weight) for weight in weights]
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    found = {"torch, 16 bits": median([partial(torch.nn.functional.linear, x, weight) for weight in weights], replays)}
    exact = x.float() @ (ring[0].weight * ring[0].scale[:, None]).T
    for tile in tilings(rows) if trial else [tiling_for(rows, columns, x.element_size())]:
        label = "8 bits, {} x {}, {} stages, {} warps".format(*tile)
        calls = [partial(product, x, one.weight, one.scale, None, tile) for one in ring]
        try:
            distance = float((calls[0]().float() - exact).norm() / exact.norm())
            if distance > FAR:
                print(f"  {label}: WRONG by {distance:.4f}")
                continue
            found[label] = median(calls, replays)
        except Exception as error:
            print(f"  {label}: {type(error).__name__} {str(error)[:100]}")
    return found


def size(told: str) -> tuple[int, int]:
    """Of a weight, from OUTxIN."""
    columns, inner = told.split("x")
    return int(columns), int(inner)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=size, default=SIZES, help="OUTxIN of weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--trial", action="store_true", help="of other blocks than the chosen ones")
    parser.add_argument("--replays", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for (columns, inner), rows in itertools.product(given.sizes, given.rows):
        name = f"{rows} x {inner} -> {columns}"
        found = measure(columns, inner, rows, given.trial, given.replays)
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
