"""Times a layer's attention over a draft tree on a GPU: our kernels, and torch's with an equivalent dense mask.

    python benchmarks/attention.py [--sweep] [--shape 7b 8b] [--nodes 1 16 64]

Heads of a 7B model (32 query heads, 32 key heads of size 128) and of an 8B model (32, 8), one row that fills most of
its slots, bfloat16.  A CUDA graph runs the attention of 32 layers with separate keys and values, so that no cache level
holds them; the time is the median over replays, per layer.  GB/s count each key and value once.  `sdpa` is what
transformers calls, including its copies of shared heads.  `--sweep` tries block sizes and numbers of splits instead,
and prints the best of each shape.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from redrafter.core.tree import DraftTree, ancestors_of, tree_mask
from redrafter.core.tree_attention import bit_mask, reference

HEADS = {"7b": (32, 32), "8b": (32, 8)}
SIZE = 128
CONTEXTS = [(1_850, 2_048), (8_000, 8_192)]
DEVICE = "cuda"


class Case:
    """A shape with its inputs on the device."""

    def __init__(self, shape: str, nodes: int, length: int, slots: int, layers: int):
        torch.manual_seed(0)
        self.shape, self.nodes, self.length, self.slots = shape, nodes, length, slots
        self.heads, self.kv_heads = HEADS[shape]
        told: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        self.query = torch.randn(1, nodes, self.heads, SIZE, **told).transpose(1, 2)
        self.keys, self.values = (torch.randn(layers, 1, self.kv_heads, slots, SIZE, **told) for _ in range(2))
        parents = (torch.arange(nodes) - 1).clamp(min=0)[None] // 2  # a tree that branches in two
        ancestors = ancestors_of(parents, max_depth=nodes)
        depth = ancestors.sum(dim=-1) - 1
        tree = DraftTree(*(x.to(DEVICE) for x in (parents, parents, depth, depth >= 0, ancestors)))
        lengths = torch.tensor([length], device=DEVICE)
        self.mask = bit_mask(tree, lengths)
        visible = tree_mask(tree, lengths, slots=slots)[:, None]
        self.dense = torch.zeros(visible.shape, **told).masked_fill_(~visible, torch.finfo(torch.bfloat16).min)

    def __str__(self) -> str:
        return f"{self.shape} N={self.nodes:<3d} {self.length:,} of {self.slots:,}"

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that must be read."""
        return 2 * self.kv_heads * (self.length + self.nodes) * SIZE * 2

    def ours(self, layer: int, **trial: Any) -> Tensor:
        """The kernels, as `tree_attention` launches them."""
        from redrafter.kernels.triton import attention as kernels

        return kernels.launch(
            self.query, self.keys[layer], self.values[layer], self.mask, SIZE**-0.5, None, None, None, **trial
        )

    def sdpa(self, layer: int) -> Tensor:
        """torch's attention, as transformers calls it."""
        module: Any = SimpleNamespace(num_key_value_groups=self.heads // self.kv_heads, is_causal=True)
        key, value = self.keys[layer], self.values[layer]
        return sdpa_attention_forward(module, self.query, key, value, self.dense, scaling=SIZE**-0.5)[0]

    def error(self, found: Tensor) -> float:
        """Largest difference from PyTorch in float32, in the first layer."""
        told = (self.query.float(), self.keys[0].float(), self.values[0].float())
        return float((found.float() - reference(*told, self.mask, scaling=SIZE**-0.5)).abs().max())


def microseconds(run: Any, layers: int, replays: int) -> float:
    """Microseconds of one layer, in a graph that runs all layers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) * 1e3 / layers


def cases(given: argparse.Namespace, layers: int) -> Any:
    """All cases, one at a time to limit memory, small ones first."""
    for (length, slots), shape, nodes in itertools.product(CONTEXTS[: given.contexts], given.shape, given.nodes):
        yield Case(shape, nodes, length, slots, layers)


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Times both implementations on each shape."""
    found = []
    for case in cases(given, given.layers):
        row: dict[str, Any] = {"shape": case.shape, "nodes": case.nodes, "length": case.length, "slots": case.slots}
        for name in ("ours", "sdpa"):
            way = getattr(case, name)
            took = microseconds(way, given.layers, given.replays)
            error = case.error(way(0))
            row[name] = {"us": round(took, 2), "gb_per_s": round(case.bytes / took / 1e3), "error": error}
        found.append(row)
        print(
            f"{case}: ours {row['ours']['us']:7.2f} us {row['ours']['gb_per_s']:5d} GB/s, off by "
            f"{row['ours']['error']:.1e}; sdpa {row['sdpa']['us']:7.2f} us {row['sdpa']['gb_per_s']:5d} GB/s, off by "
            f"{row['sdpa']['error']:.1e}; {row['sdpa']['us'] / row['ours']['us']:.2f} times",
            flush=True,
        )
    return found


def tilings(rows: int) -> list[tuple[int, int, int, int]]:
    """Block sizes to try for that many queries per key head."""
    most = max(16, min(128, 1 << (rows - 1).bit_length()))
    heights = {most, 64} if most == 128 else {most}
    return [
        (height, keys, warps, stages)
        for height, keys, warps, stages in itertools.product(sorted(heights), (16, 32, 64, 128), (4, 8), (2, 3, 4))
        if not (height == 128 and warps == 4)
    ]


def compiled(shape: str, nodes: int, tiling: tuple[int, int, int, int]) -> None:
    """Compiles the kernels of these block sizes into Triton's cache; runs in a separate process."""
    from redrafter.kernels.triton import attention as kernels

    length, slots = CONTEXTS[0]
    case = Case(shape, nodes, length, slots, layers=1)
    for splits in (1, 8):
        with suppress(Exception):  # what does not fit the device is left out when it is timed, too
            case.ours(0, tiling=kernels.Tiling(*tiling), splits=splits)
    torch.cuda.synchronize()


def sweep(given: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """The best block sizes and numbers of splits of each shape, within the time limit."""
    from redrafter.kernels.triton import attention as kernels

    trials = {
        (shape, nodes): tilings(nodes * HEADS[shape][0] // HEADS[shape][1])
        for shape in given.shape
        for nodes in given.nodes
    }
    pool = ProcessPoolExecutor(given.processes, mp_context=get_context("spawn"))
    jobs = [pool.submit(compiled, *key, tiling) for key, some in trials.items() for tiling in some]
    with suppress(TimeoutError):  # the rest is compiled when it is timed
        for job in as_completed(jobs, timeout=max(1.0, (until - time.monotonic()) / 2)):
            if job.exception() is not None:
                print(f"a process that compiles failed: {job.exception()!r}", flush=True)
                break
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled; {until - time.monotonic():.0f} s are left", flush=True)

    found = []
    for case in cases(given, given.layers):
        times: list[tuple[float, tuple[int, ...]]] = []
        for tiling, splits in itertools.product(trials[case.shape, case.nodes], given.splits):
            if time.monotonic() > until:
                break
            if splits > 1 and splits * tiling[1] > case.slots:
                continue
            try:
                way = partial(case.ours, tiling=kernels.Tiling(*tiling), splits=splits)
                took = microseconds(way, given.layers, given.replays)
            except Exception as error:  # too large for the device; anything else is worth seeing and no reason to stop
                torch.cuda.synchronize()
                if "out of resource" not in str(error):
                    print(f"{case} {tiling} splits {splits}: {error!r:.300}", flush=True)
                continue
            times.append((took, (*tiling, splits)))
        if not times:
            continue
        default = microseconds(case.ours, given.layers, given.replays)
        times.sort()
        print(f"{case}: as it is {default:.2f} us; best (rows, keys, warps, stages, parts):", flush=True)
        for took, tried in times[: given.best]:
            print(f"    {took:7.2f} us {case.bytes / took / 1e3:5.0f} GB/s  {tried}", flush=True)
        best = [{"us": round(took, 2), "tried": tried} for took, tried in times[: given.best]]
        found.append({"case": str(case), "default_us": round(default, 2), "tried": len(times), "best": best})
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="try block sizes")
    parser.add_argument("--shape", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--nodes", nargs="+", type=int, help="1 8 16 32 64; of a sweep 1 16 64")
    parser.add_argument("--contexts", type=int, default=len(CONTEXTS), help="1: the short one alone")
    parser.add_argument("--splits", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="parts, of a sweep")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--replays", type=int, help="20; of a sweep 5")
    parser.add_argument("--best", type=int, default=4, help="how many are printed of a sweep")
    parser.add_argument("--processes", type=int, default=12, help="that compile before a sweep")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a sweep tries no more")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention.py: needs a CUDA device.")
    given.nodes = given.nodes or ([1, 16, 64] if given.sweep else [1, 8, 16, 32, 64])
    given.replays = given.replays or (5 if given.sweep else 20)
    begun = time.monotonic()
    with torch.inference_mode():
        found = sweep(given, begun + given.seconds) if given.sweep else compare(given)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {time.monotonic() - begun:.0f} s")
    print(json.dumps({"device": name, "torch": torch.__version__, "sweep" if given.sweep else "compare": found}))


if __name__ == "__main__":
    main()
