"""Times the seeded noise and its earlier form, and the walk by its kernel and in PyTorch.

    python benchmarks/noise.py [--device cuda] [--repeats 100]

The earlier noise had 23 random bits.  On CUDA each function is replayed as a graph.  Both are measured alternately;
medians are in microseconds.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from redrafter.core import noise
from redrafter.core.tree import prefix_tree
from redrafter.decoding import verify
from redrafter.engine.cuda_graph import Captured


def earlier(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise of 23 bits, `-log(-log(u))`."""
    first, second = noise._keys(seed, position)
    token = torch.arange(vocabulary, dtype=torch.int32, device=position.device)
    bits = token * noise._GOLDEN + first[..., None]
    noise._mix(bits, 16).mul_(-0x7A143595).add_(second[..., None])
    noise._mix(bits, 13).mul_(-0x3D4D51CB)
    noise._mix(bits, 16).bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
    return bits.float().add_(0.5).mul_(2**-23).log_().neg_().log_().neg_()


def medians(functions: list[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median microseconds of each function; they are measured alternately."""
    calls = [Captured(function, device) for function in functions]
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 5):
        for own, call in zip(times, calls, strict=True):
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(20):
                    call()
                end.record()
                end.synchronize()
                duration = begin.elapsed_time(end) * 1e3 / 20
            else:
                start = time.perf_counter()
                call()
                duration = (time.perf_counter() - start) * 1e6
            if repeat >= 5:
                own.append(duration)
    return [statistics.median(own) for own in times]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    device = torch.device(options.device)
    found = []
    with torch.inference_mode():
        for rows, depths, vocabulary in ((1, 6, 32_000), (1, 6, 49_152), (1, 6, 131_072), (16, 6, 49_152)):
            seed = torch.arange(rows, device=device)
            position = torch.arange(depths, device=device).expand(rows, -1)
            functions = [lambda s=seed, p=position, v=vocabulary, f=f: f(s, p, v) for f in (earlier, noise.gumbel)]
            before, now = medians(functions, device, options.repeats)
            found.append({"noise": [rows, depths, vocabulary], "before_us": before, "now_us": now})
            print(
                f"noise [{rows}, {depths}, {vocabulary}]: 23 bits {before:.1f}, 32 bits {now:.1f} ({now / before:.3f})"
            )
        for rows, width, length in ((1, 4, 4), (1, 10, 4), (16, 10, 4)):
            beams = torch.randint(0, 3, (rows, width, length), device=device)
            tree = prefix_tree(torch.zeros(rows, dtype=torch.long, device=device), beams)
            choice = torch.randint(0, 3, tree.tokens.shape, device=device)
            walks = [
                lambda f=f, t=tree, c=choice, n=length: f(t, c, length=n) for f in (verify.plain_walk, verify.walk)
            ]
            plain, kernel = medians(walks, device, options.repeats)
            found.append({"walk": [rows, tree.size], "plain_us": plain, "walk_us": kernel})
            print(f"walk of {rows} x {tree.size} nodes: PyTorch {plain:.1f}, as used {kernel:.1f}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "found": found}))


if __name__ == "__main__":
    main()
