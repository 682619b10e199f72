"""What merging projections is worth: a target's step with q, k, v and gate, up as one product each, and apart.

    python benchmarks/merging.py [--shapes llama-7b llama-8b llama-1b small] [--nodes 1 32] [--repeats 50] [--compile]

On a GPU, in bfloat16, random weights; a step is a CUDA graph.  `small` has SmolLM2-135M's shape.  Both are measured in
turn, three times; the table has medians.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from redrafter.engine.request import request
from redrafter.evaluation import profiling
from redrafter.heads import synthetic as stand_ins

SMALL = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


@contextmanager
def apart() -> Iterator[None]:
    """Products stay apart while it lasts."""
    before = profiling.optimize_linears
    profiling.optimize_linears = lambda *models, captured: 0
    try:
        yield
    finally:
        profiling.optimize_linears = before


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-7b", "llama-8b", "llama-1b", "small"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--compile", action="store_true")
    words = parser.parse_args()
    stand_ins.SHAPES["small"] = SMALL
    found = []
    print(
        f"{'shape':10s} {'nodes':>5s} {'apart':>8s} {'merged':>8s} {'ratio':>6s}  ms on {torch.cuda.get_device_name()}"
    )
    for shape in words.shapes:
        model = stand_ins.random_model(shape, dtype=torch.bfloat16, device=torch.device("cuda"))
        text = torch.randint(model.config.vocab_size, (1, 1000)).tolist()
        times: dict[tuple[int, bool], list[float]] = {}
        for merged in (False, True) * 3:
            asked = request(model, None, text, max_new_tokens=8)
            if merged:
                bench = profiling.Bench.of(asked, None, nodes=64, repeats=words.repeats, compile=words.compile)
            else:
                with apart():
                    bench = profiling.Bench.of(asked, None, nodes=64, repeats=words.repeats, compile=words.compile)
            for nodes in words.nodes:
                times.setdefault((nodes, merged), []).append(bench.verify_ms(nodes))
            del bench
        for nodes in words.nodes:
            plain, joined = (statistics.median(times[nodes, merged]) for merged in (False, True))
            found.append({"shape": shape, "nodes": nodes, "apart_ms": plain, "merged_ms": joined})
            print(f"{shape:10s} {nodes:5d} {plain:8.3f} {joined:8.3f} {joined / plain:6.3f}", flush=True)
        del model, asked
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "compile": words.compile, "found": found}))


if __name__ == "__main__":
    main()
