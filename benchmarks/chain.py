"""Times 32 decoder layers with torch's products and with custom kernels, compared with reading every byte once.

    python benchmarks/chain.py [--shape 7b 8b] [--nodes 1 16 32 64] [--megabytes 0 1 2 4 8 16 32] [--replays N]

A step in bfloat16 without embedding, rotary embeddings, cache writes and output head: for each layer the norm, the
fused projection of queries, keys and values, this package's attention over 1,850 slots, the output projection and the
fused MLP, each with separate weights and cache, as one CUDA graph.  With torch: each of its BLAS libraries, the
compiled small kernels launched normally and with programmatic dependent launch, and a second branch of the graph that
prefetches the first megabytes of the next weight into the L2 cache.  With custom kernels, except for attention: the
fastest tiling of each product, dependent launches that prefetch the first tiles of their weights before they wait, and
SiLU fused into the product.  Milliseconds per step; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from redrafter.core.tree import DraftTree, ancestors_of
from redrafter.core.tree_attention import bit_mask
from redrafter.engine.clock import milliseconds
from redrafter.evaluation.profiling import bandwidth
from redrafter.kernels.triton import attention

DEVICE = "cuda"
SHAPES = {"7b": (32, 32, 11_008), "8b": (32, 8, 14_336)}  # heads of queries and of keys, width of the MLP
HIDDEN, SIZE, LAYERS = 4096, 128, 32
LENGTH, SLOTS = 1_850, 2_048
FEW = 16  # smallest number of rows of a tensor core instruction
LINE = tl.constexpr(64)  # numbers of 16 bits in a line of the second cache
FAR = 0.02  # of a result in bfloat16, that a product may be away from torch's

# Tilings to try, of one row and of more: at most 120 KiB of shared memory and mostly much less, so that a processor has
# room for programs of the next kernel too.
ONE = [(16, 256, 3, 4), (8, 512, 3, 4), (4, 1024, 3, 4), (8, 512, 1, 4), (16, 256, 4, 4), (32, 256, 3, 8)]
ONE += [(8, 1024, 3, 8), (8, 1024, 1, 8)]
SOME = [(16, 256, 4, 4), (32, 256, 3, 4), (32, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 4), (16, 512, 3, 4)]
SOME += [(64, 256, 3, 8)]
MANY = [(32, 128, 4, 4), (64, 128, 3, 4), (64, 64, 5, 4), (16, 256, 3, 4), (32, 64, 6, 4)]


class Tiling(NamedTuple):
    """Block sizes of a product: powers of two; pipeline stages and warps."""

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int


def median(calls: list[Callable[[], object]], replays: int) -> float:
    """Median microseconds per call, of replays of a CUDA graph that contains all calls."""
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


@triton.jit
def _prefetch(line):
    """Prefetches these addresses into the L2 cache without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fetch(weight, lines, BLOCK: tl.constexpr):
    """Prefetches the first lines of a weight."""
    line = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), lines - 1)
    _prefetch(weight + line.to(tl.int64) * LINE)


@triton.jit
def _ask(place, tiles, BLOCK_K: tl.constexpr):
    """Prefetches the first tiles of a program's rows of a weight, which begin at `place`."""
    line = place[:, None] + LINE * tl.arange(0, BLOCK_K // LINE)[None, :]
    for tile in range(tiles):
        _prefetch(line + tile * BLOCK_K)


@triton.jit
def _silu(gate, up):
    """SiLU(gate) * up in bfloat16 with the rounding of torch; the store does the last rounding."""
    gate = gate.to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _normed(x, more, out, y, WIDTH: tl.constexpr):
    gdc_launch_dependents()
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    gdc_wait()
    wide = (tl.load(x + at).to(tl.float32) + tl.load(more + at).to(tl.float32)).to(tl.bfloat16)
    tl.store(out + at, wide)
    wide = wide.to(tl.float32)
    tl.store(y + at, wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + 1e-6))


@triton.jit
def _gated(x, y, inner, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait()
    gate = tl.load(x + row * 2 * inner + at, mask=at < inner, other=0.0)
    up = tl.load(x + row * 2 * inner + inner + at, mask=at < inner, other=0.0)
    tl.store(y + row * inner + at, _silu(gate, up), mask=at < inner)


@triton.jit
def _added(total, x, w):
    """Accumulates the product of a tile of rows and a tile of columns.

    A single row avoids tensor cores and is summed at the end.
    """
    if x.shape[0] == 1:
        total += x.to(tl.float32) * w.to(tl.float32)
    else:
        total = tl.dot(x, tl.trans(w), total)
    return total


@triton.jit(do_not_specialize=["rows", "ahead"])
def _product(
    x, weight, out, rows, N, K, ahead,
    GATED: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[rows, K] by [N, K] to [rows, N], all rows by each program; GATED: by gate and up, [2 N, K], and SiLU.

    WHOLE: BLOCK_K divides K.  Weights do not depend on the kernel before: `ahead` tiles are asked for before the wait.
    """
    gdc_launch_dependents()
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (m < rows)[:, None]
    place = weight + tl.where(n < N, n, 0).to(tl.int64) * K  # what is read beyond the last column is not written
    up = N.to(tl.int64) * K
    _ask(place, ahead, BLOCK_K)
    if GATED:
        _ask(place + up, ahead, BLOCK_K)
    x_ptr = x + m[:, None] * K + k[None, :]
    w_ptr = place[:, None] + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K] if BLOCK_M == 1 else [BLOCK_M, BLOCK_N], tl.float32)
    more = total
    gdc_wait()
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = (k < K - start)[None, :]
        part = tl.load(x_ptr, mask=inside if WHOLE else inside & left, other=0.0)
        total = _added(total, part, tl.load(w_ptr) if WHOLE else tl.load(w_ptr, mask=left, other=0.0))
        if GATED:
            more = _added(more, part, tl.load(w_ptr + up) if WHOLE else tl.load(w_ptr + up, mask=left, other=0.0))
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    if BLOCK_M == 1:
        total = tl.sum(total, 1)[None, :]
        if GATED:
            more = tl.sum(more, 1)[None, :]
    if GATED:
        total = _silu(total.to(tl.bfloat16), more.to(tl.bfloat16))
    tl.store(out + m[:, None] * N + n[None, :], total, mask=inside & (n < N)[None, :])


def product(
    tile: Tiling, x: Tensor, weight: Tensor, out: Tensor, dependent: bool = False, ahead: int = 0, gate: bool = False
) -> None:
    """Writes the product into `out`.

    `ahead` counts prefetched tiles, and `gate` means that the weight is gate and up, followed by SiLU.
    """
    rows, (columns, inner) = len(x), weight.shape
    block = tile.columns
    if gate:  # two halves are as much work
        columns, block = columns // 2, max(block // 2, 2 if rows == 1 else 16)
    _product[(triton.cdiv(columns, block),)](
        x, weight, out, rows, columns, inner, min(ahead, inner // tile.inner),
        GATED=gate, WHOLE=inner % tile.inner == 0, STAGES=tile.stages,
        BLOCK_M=tile.rows, BLOCK_N=block, BLOCK_K=tile.inner,
        num_warps=tile.warps, launch_pdl=dependent,
    )  # fmt: skip


def normed(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after the addition, and its norm."""
    x = x + more
    wide = x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """SiLU(gate) * up of the fused product of gate and up."""
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Step:
    """Weights, cache and inputs of one shape, and the step over them with torch."""

    def __init__(self, shape: str, nodes: int):
        self.heads, kv_heads, inner = SHAPES[shape]
        told: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        rows = (self.heads + 2 * kv_heads) * SIZE
        sizes = ((rows, HIDDEN), (HIDDEN, self.heads * SIZE), (2 * inner, HIDDEN), (HIDDEN, inner))
        self.layers = [[torch.randn(size, **told) / size[1] ** 0.5 for size in sizes] for _ in range(LAYERS)]
        self.keys, self.values = (torch.randn(LAYERS, 1, kv_heads, SLOTS, SIZE, **told) for _ in range(2))
        self.x = torch.randn(nodes, HIDDEN, **told)
        self.zero = torch.zeros_like(self.x)
        parents = (torch.arange(nodes) - 1).clamp(min=0)[None] // 2
        ancestors = ancestors_of(parents, max_depth=nodes)
        depth = ancestors.sum(dim=-1) - 1
        tree = DraftTree(*(part.to(DEVICE) for part in (parents, parents, depth, depth >= 0, ancestors)))
        self.mask = bit_mask(tree, torch.tensor([LENGTH], device=DEVICE))
        self.side = torch.cuda.Stream()
        cached = 2 * LAYERS * kv_heads * (LENGTH + nodes) * SIZE * 2
        self.bytes = sum(weight.nbytes for layer in self.layers for weight in layer) + cached

    def attended(self, layer: int, made: Tensor) -> Tensor:
        """Attention of the queries in fused queries, keys and values."""
        query = made.view(1, len(made), -1, SIZE)[:, :, : self.heads].transpose(1, 2)
        told = (self.keys[layer], self.values[layer], self.mask, SIZE**-0.5, None, None, None)
        return attention.launch(query, *told).view(len(made), -1)

    def ask(self, weight: Tensor, megabytes: int) -> None:
        """Prefetches the beginning of a weight on the second branch."""
        if megabytes:
            lines = min(megabytes << 20, weight.nbytes) // (2 * LINE.value)
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                _fetch[(triton.cdiv(lines, 1024),)](weight, lines, BLOCK=1024)

    def run(self, norm: Any, gate: Any, megabytes: int = 0) -> Tensor:
        """One step; the small kernels are given."""
        x, more = self.x, self.zero
        for layer, (joined, output, up, down) in enumerate(self.layers):
            self.ask(joined, megabytes)
            x, y = norm(x, more)
            made = nn.functional.linear(y, joined)
            self.ask(output, megabytes)
            more = nn.functional.linear(self.attended(layer, made), output)
            self.ask(up, megabytes)
            x, y = norm(x, more)
            y = nn.functional.linear(y, up)
            self.ask(down, megabytes)
            more = nn.functional.linear(gate(y), down)
        if megabytes:  # what was not forked cannot be joined
            torch.cuda.current_stream().wait_stream(self.side)
        return x + more


class Chain:
    """The same step with custom kernels and preallocated tensors.

    A kernel with dependent launch waits for the end of the previous one before it reads what others write, or writes
    itself.  Attention does not support this and is launched normally.
    """

    def __init__(self, step: Step, tiles: list[Tiling]):
        self.step, self.tiles = step, tiles
        rows = len(step.x)
        joined, _, up, down = step.layers[0]
        self.made, self.wide, self.inner = (step.x.new_empty(rows, n) for n in (len(joined), len(up), down.shape[1]))
        self.x, self.y, self.more, self.out = (torch.empty_like(step.x) for _ in range(4))

    def norm(self, x: Tensor, more: Tensor, dependent: bool) -> None:
        """Writes `self.x` and `self.y`."""
        _normed[(len(x),)](x, more, self.x, self.y, WIDTH=x.shape[1], num_warps=8, launch_pdl=dependent)

    def run(self, dependent: bool = False, ahead: int = 0, fused: bool = False) -> Tensor:
        """One step, into `self.out`."""
        told: dict[str, Any] = {"dependent": dependent, "ahead": ahead}
        rows, inner = self.inner.shape
        x, more = self.step.x, self.step.zero
        for layer, (joined, output, up, down) in enumerate(self.step.layers):
            self.norm(x, more, dependent and layer > 0)  # the graph's first kernel depends on none
            x, more = self.x, self.more
            product(self.tiles[0], self.y, joined, self.made, **told)
            product(self.tiles[1], self.step.attended(layer, self.made), output, more, **told)
            self.norm(x, more, dependent)
            product(self.tiles[2], self.y, up, self.inner if fused else self.wide, gate=fused, **told)
            if not fused:
                grid = (rows, triton.cdiv(inner, 1024))
                _gated[grid](self.wide, self.inner, inner, BLOCK=1024, launch_pdl=dependent)
            product(self.tiles[3], self.inner, down, more, **told)
        return torch.add(x, more, out=self.out)


def apart(found: Tensor, right: Tensor) -> float:
    """Relative difference from the correct result."""
    return float((found.float() - right.float()).norm() / right.float().norm())


def quickest(step: Step, replays: int) -> tuple[list[Tiling], dict[str, Any]]:
    """The fastest tiling of each product; and microseconds by name, including torch's.

    ValueError if no tiling is correct.
    """
    rows = len(step.x)
    height = 1 if rows == 1 else max(FEW, triton.next_power_of_2(rows))
    tiles, told = [], {}
    for place, name in enumerate(("joined", "output", "up", "down")):
        weights = [layer[place] for layer in step.layers[:8]]  # many times the second cache
        x = step.x.new_empty(rows, weights[0].shape[1]).normal_()
        right = nn.functional.linear(x, weights[0])
        out = torch.empty_like(right)
        found: dict[Tiling, float] = {}
        for tile in itertools.starmap(partial(Tiling, height), ONE if rows == 1 else SOME if rows <= FEW else MANY):
            try:
                product(tile, x, weights[0], out)
                if (distance := apart(out, right)) > FAR:
                    raise ValueError(f"off by {distance:.4f}")
                found[tile] = median([partial(product, tile, x, weight, out) for weight in weights], replays)
            except Exception as error:
                print(f"  {name} {tuple(tile)}: {type(error).__name__} {str(error)[:150]}")
        if not found:
            raise ValueError(f"no tiling computes the product {name}")
        tiles.append(min(found, key=lambda tile: found[tile]))
        torch_us = median([partial(nn.functional.linear, x, weight) for weight in weights], replays)
        ours_us = found[tiles[-1]]
        print(f"  {name:6s} torch {torch_us:6.1f} us, ours {ours_us:6.1f} us by {tuple(tiles[-1])}", flush=True)
        told[name] = {"torch": round(torch_us, 1), "ours": round(ours_us, 1), "tiling": tiles[-1]}
    return tiles, told


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """Selects one of torch's BLAS libraries."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@contextlib.contextmanager
def small(dependent: bool) -> Iterator[tuple[Any, Any]]:
    """The small kernels, compiled again at their first call in this context."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"triton.enable_pdl": dependent}):
        yield torch.compile(normed, dynamic=False), torch.compile(gated, dynamic=False)


def by_torch(step: Step, megabytes: list[int], replays: int) -> Iterator[tuple[str, float]]:
    """Names and milliseconds of the variants with torch."""
    for dependent in (False, True):
        with small(dependent) as (norm, gate):
            for blas, ahead in itertools.product(("cublas", "cublaslt"), megabytes):
                name = f"torch, {blas}{', dependent small kernels' if dependent else ''}, {ahead} MB ahead"
                with library(blas):
                    yield name, milliseconds(partial(step.run, norm, gate, ahead), torch.device(DEVICE), replays)


def by_kernels(step: Step, tiles: list[Tiling], replays: int) -> Iterator[tuple[str, float]]:
    """Names and milliseconds of the variants with custom kernels whose results agree with torch.

    Rounding accumulates over the layers, and torch's own variants differ too; twice their difference is allowed.
    """
    with small(False) as (norm, gate), library("cublas"):
        right = step.run(norm, gate)
    with library("cublaslt"):
        itself = apart(step.run(normed, gated), right)
    print(f"  torch is off itself by {itself:.4f}")
    chain = Chain(step, tiles)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": chain.run,
        **{f"ours, dependent, tiles ahead: {n}": partial(chain.run, True, n) for n in (0, 1, 2, 4)},
        "ours, SiLU inside": partial(chain.run, fused=True),
        **{f"ours, SiLU inside, dependent, tiles ahead: {n}": partial(chain.run, True, n, True) for n in (0, 1)},
    }
    for name, way in ways.items():
        chain.out.zero_()
        found = milliseconds(way, torch.device(DEVICE), replays)
        distance = apart(chain.out, right)  # of the last replay
        if distance <= max(FAR, 2 * itself):
            yield name, found
        else:
            print(f"  {name}: WRONG by {distance:.4f}")


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--nodes", nargs="+", type=int, choices=(1, 16, 32, 64), default=[1, 16, 64])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16, 32])
    parser.add_argument("--replays", type=int, default=15)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rate = bandwidth(torch.device(DEVICE), given.replays)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes_per_s": rate}
    for shape, nodes in itertools.product(given.shape, given.nodes):
        step = Step(shape, nodes)
        once = 1e3 * step.bytes / rate
        print(f"{shape}, {nodes} nodes: reading all once {once:.3f} ms", flush=True)
        tiles, told = quickest(step, given.replays)
        out[f"{shape}, {nodes} nodes"] = told = {"once": round(once, 4), "us": told}
        ways = itertools.chain(by_torch(step, given.megabytes, given.replays), by_kernels(step, tiles, given.replays))
        for name, found in ways:
            told[name] = round(found, 4)
            print(f"  {name:50s} {found:.3f} ms  {found / once:.3f} of that", flush=True)
        del step, ways
        torch.cuda.empty_cache()
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
