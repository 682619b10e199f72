"""A trial: products of a few rows in Triton, weights of 16 or 8 bits, next to torch's, replayed as CUDA graphs.

    python benchmarks/products.py [--sizes 4096x8192 …] [--rows 1 64] [--bits 16 8] [--replays N]

`onto + SiLU(x W' + b)` in one launch, by default of 10 and 50 rows and the sizes of a drafter's head; each product
reads its own weights out of a ring that no cache holds.  Microseconds a product, and the distance to the exact result.
The last line is JSON.
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
import triton.language as tl

SIZES = [(4096, 4096), (8192, 4096), (8192, 8192), (32_000, 8192)]  # out, in
Told = tuple[int, int, int, int, int]
RING = 512 << 20  # bytes of weights, many times the second cache


@triton.jit
def product(
    x, weight, scale, bias, onto, out, rows, N, K,
    ACTIVATED: tl.constexpr, EIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of one block of columns."""
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr = x + m[:, None] * K + k[None, :]
    w_ptr = weight + n[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w = tl.load(w_ptr)
        if EIGHT:
            w = w.to(x.dtype.element_ty)
        total = tl.dot(tl.load(x_ptr, mask=(m < rows)[:, None], other=0.0), tl.trans(w), total)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    if EIGHT:
        total *= tl.load(scale + n)[None, :]
    at = m[:, None] * N + n[None, :]
    there = (m < rows)[:, None] & (n < N)[None, :]
    if ACTIVATED:
        total += tl.load(bias + n).to(tl.float32)[None, :]
        total = total / (1.0 + tl.exp(-total)) + tl.load(onto + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=there)


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


def launch(told: Told, x: Any, weight: Any, scale: Any, bias: Any, onto: Any, result: Any) -> None:
    """One product."""
    bits, block_n, block_k, stages, warps = told
    columns, inner = weight.shape
    product[(columns // block_n,)](
        x, weight, scale, bias, onto, result, len(x), columns, inner,
        ACTIVATED=True, EIGHT=bits == 8, BLOCK_M=max(16, triton.next_power_of_2(len(x))),
        BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
    )  # fmt: skip


def settings(rows: int, columns: int, inner: int, widths: list[int]) -> list[Told]:
    """Bits, blocks, stages and warps worth a trial: two programs fit a processor, and enough bytes are on their way."""
    found = []
    for told in itertools.product(widths, (16, 32, 64), (128, 256, 512), (3, 4), (4, 8)):
        bits, block_n, block_k, stages, warps = told
        memory = stages * (block_n * bits // 8 + max(16, triton.next_power_of_2(rows)) * 2) * block_k
        if (
            columns % block_n == 0
            and inner % block_k == 0
            and 30_000 < memory < 110_000
            and (warps == 8) == (block_n * block_k > 8192)
        ):
            found.append(told)
    return found


def measure(columns: int, inner: int, rows: int, widths: list[int], replays: int) -> dict[str, float]:
    """Microseconds of a product by way."""
    device = torch.device("cuda")
    count = max(2, RING // (columns * inner * 2))
    weights = torch.randn(count, columns, inner, device=device, dtype=torch.bfloat16) / inner**0.5
    scales = (weights.abs().amax(-1) / 127).float()
    eight = torch.stack([(w / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)])
    bias = torch.randn(columns, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    onto = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    result = torch.empty_like(onto)
    exact = onto.float() + torch.nn.functional.silu(x.float() @ weights[0].float().T + bias.float())
    by_torch = [partial(torch.nn.functional.linear, x, weight, bias) for weight in weights]
    found = {"torch, product alone": median(by_torch, replays)}
    for told in settings(rows, columns, inner, widths):
        label = "{} bits, {} x {}, {} stages, {} warps".format(*told)
        ring = eight if told[0] == 8 else weights
        calls = [partial(launch, told, x, ring[i], scales[i], bias, onto, result) for i in range(count)]
        try:
            calls[0]()
            distance = float((result.float() - exact).norm() / exact.norm())
            if distance > (0.02 if told[0] == 8 else 0.01):
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
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 8), default=[16, 8], help="of a weight")
    parser.add_argument("--replays", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for (columns, inner), rows in itertools.product(given.sizes, given.rows):
        name = f"{rows} x {inner} -> {columns}"
        found = measure(columns, inner, rows, given.bits, given.replays)
        torch.cuda.empty_cache()
        for way in ("torch", "16", "8"):
            for us, label in sorted((us, label) for label, us in found.items() if label.startswith(way))[:3]:
                read = columns * inner * (1 if way == "8" else 2)
                print(f"{name:24s} {us:7.1f} us {read / us / 1e6:5.2f} TB/s  {label}", flush=True)
                out.setdefault(name, {})[label] = round(us, 1)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
