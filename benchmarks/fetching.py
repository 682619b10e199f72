"""Whether weights can be brought to the GPU's second cache while attention and small kernels leave its memory idle.

    python benchmarks/fetching.py [--shape 7b 8b] [--nodes 1 16 64] [--megabytes 0 4 8 16 32]

A step of a decoder in bfloat16, without embedding and output head: for each of 32 layers the norm, joined products of
queries, keys and values, this package's attention over 1,850 slots, its output product, and the joined MLP, each with
weights and cache of its own, in one CUDA graph.  Beside it a second branch of the graph asks, from the moment that a
small kernel or attention begins, for the first megabytes of the product that comes next.  Milliseconds of a step, by
megabytes, by torch's library of products and with programmatic dependent launches of the small kernels; next to what
reading every byte once would take.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from redrafter.fast.attention import packed
from redrafter.fast.kernels import attention
from redrafter.profiling import bandwidth, milliseconds
from redrafter.tree import DraftTree, ancestors_of

SHAPES = {"7b": (32, 32, 11_008), "8b": (32, 8, 14_336)}  # heads of queries and of keys, width of the MLP
HIDDEN, SIZE, LAYERS = 4096, 128, 32
LENGTH, SLOTS = 1_850, 2_048
LINE = 64  # numbers of 16 bits in a line of the second cache


@triton.jit
def _fetch(weight, lines, LINE: tl.constexpr, BLOCK: tl.constexpr):
    """Asks for lines of a weight, and waits for none."""
    line = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), lines - 1).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [weight + line * LINE], dtype=tl.int32, is_pure=False, pack=1
    )


def normed(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with what was added, and its norm."""
    x = x + more
    wide = x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """Of a joined product of gate and up."""
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Step:
    """Weights, cache and inputs of one shape, and the step over them."""

    def __init__(self, shape: str, nodes: int):
        self.heads, kv_heads, inner = SHAPES[shape]
        told: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        rows = (self.heads + 2 * kv_heads) * SIZE
        sizes = ((rows, HIDDEN), (HIDDEN, self.heads * SIZE), (2 * inner, HIDDEN), (HIDDEN, inner))
        self.layers = [[torch.randn(size, **told) / size[1] ** 0.5 for size in sizes] for _ in range(LAYERS)]
        self.keys, self.values = (torch.randn(LAYERS, 1, kv_heads, SLOTS, SIZE, **told) for _ in range(2))
        self.x = torch.randn(nodes, HIDDEN, **told)
        parents = (torch.arange(nodes) - 1).clamp(min=0)[None] // 2
        ancestors = ancestors_of(parents, max_depth=nodes)
        depth = ancestors.sum(dim=-1) - 1
        tree = DraftTree(*(part.cuda() for part in (parents, parents, depth, depth >= 0, ancestors)))
        self.mask = packed(tree, torch.tensor([LENGTH], device="cuda"))
        self.side = torch.cuda.Stream()
        cached = 2 * LAYERS * kv_heads * (LENGTH + nodes) * SIZE * 2
        self.bytes = sum(weight.nbytes for layer in self.layers for weight in layer) + cached

    def ask(self, weight: Tensor, megabytes: int) -> None:
        """For the beginning of a weight, on the second branch, from here on."""
        lines = min(megabytes << 20, weight.nbytes) // (2 * LINE)
        if lines:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                _fetch[(triton.cdiv(lines, 1024),)](weight, lines, LINE=LINE, BLOCK=1024)

    def run(self, norm: Any, gate: Any, megabytes: int) -> Tensor:
        """One step."""
        x, more = self.x, torch.zeros_like(self.x)
        for number, (joined, output, up, down) in enumerate(self.layers):
            self.ask(joined, megabytes)
            x, y = norm(x, more)
            made = nn.functional.linear(y, joined).view(1, len(y), -1, SIZE)
            self.ask(output, megabytes)
            seen = attention.launch(
                made[:, :, : self.heads].transpose(1, 2), self.keys[number : number + 1][0],
                self.values[number : number + 1][0], self.mask, SIZE**-0.5, None, None, None,
            )  # fmt: skip
            more = nn.functional.linear(seen.view(len(y), -1), output)
            self.ask(up, megabytes)
            x, y = norm(x, more)
            y = nn.functional.linear(y, up)
            self.ask(down, megabytes)
            more = nn.functional.linear(gate(y), down)
        torch.cuda.current_stream().wait_stream(self.side)
        return x + more


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """Of torch's products."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def small(dependent: bool) -> tuple[Any, Any]:
    """The small kernels, compiled anew."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"triton.enable_pdl": dependent}):
        made = [torch.compile(part, dynamic=False) for part in (normed, gated)]
        for nodes, inner in itertools.product((1, 16, 32, 64), (11_008, 14_336)):
            x = torch.zeros(nodes, HIDDEN, device="cuda", dtype=torch.bfloat16)
            made[0](x, x)
            made[1](x.new_zeros(nodes, 2 * inner))
    return made[0], made[1]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--nodes", nargs="+", type=int, choices=(1, 16, 32, 64), default=[1, 16, 64])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[0, 4, 8, 16, 32])
    parser.add_argument("--replays", type=int, default=30)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    rate = bandwidth(device, given.replays)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes_per_s": rate}
    for dependent in (False, True):
        norm, gate = small(dependent)
        for shape, nodes in itertools.product(given.shape, given.nodes):
            step = Step(shape, nodes)
            floor = 1e3 * step.bytes / rate
            print(f"{shape}, {nodes} nodes: reading all once {floor:.3f} ms", flush=True)
            for blas, megabytes in itertools.product(("cublas", "cublaslt"), given.megabytes):
                name = f"{shape} {nodes} {blas}{' dependent' if dependent else ''} {megabytes} MB"
                try:
                    with library(blas):
                        found = milliseconds(partial(step.run, norm, gate, megabytes), device, given.replays)
                except Exception as error:
                    print(f"  {name}: {type(error).__name__} {str(error)[:200]}")
                    continue
                out[name] = round(found, 4)
                print(f"  {name:36s} {found:.3f} ms  {found / floor:.3f} of that", flush=True)
            del step
            torch.cuda.empty_cache()
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
