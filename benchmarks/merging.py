"""Times a target's step with fused projections (q, k, v and gate, up as one product each) and without.

    python benchmarks/merging.py [--shapes llama-7b llama-8b llama-1b small] [--nodes 1 32] [--repeats 50] [--compile]

On a GPU, in bfloat16, with random weights; a step is a CUDA graph.  `small` has SmolLM2-135M's shape.  Both are
measured alternately, three times; the table has medians.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from unittest import mock

import torch

from redrafter.engine.request import request
from redrafter.evaluation.profiling import StepProfiler
from redrafter.heads import synthetic

SMALL = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-7b", "llama-8b", "llama-1b", "small"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    synthetic.SHAPES["small"] = SMALL
    found = []
    print(
        f"{'shape':10s} {'nodes':>5s} {'separate':>8s} {'fused':>8s} {'ratio':>6s}  ms, {torch.cuda.get_device_name()}"
    )
    for shape in options.shapes:
        model = synthetic.random_model(shape, dtype=torch.bfloat16, device=torch.device("cuda"))
        text = torch.randint(model.config.vocab_size, (1, 1000)).tolist()
        times: dict[tuple[int, bool], list[float]] = {}
        for fuse in (False, True) * 3:
            unfused = mock.patch("redrafter.engine.backend.fuse_linears", return_value=0)
            with nullcontext() if fuse else unfused:
                parsed = request(model, None, text, max_new_tokens=8)
                profiler = StepProfiler(parsed, nodes=64, repeats=options.repeats, compile=options.compile)
                for nodes in options.nodes:
                    times.setdefault((nodes, fuse), []).append(profiler.verify_ms(nodes))
            del profiler
        for nodes in options.nodes:
            plain, fused = (statistics.median(times[nodes, fuse]) for fuse in (False, True))
            found.append({"shape": shape, "nodes": nodes, "separate_ms": plain, "fused_ms": fused})
            print(f"{shape:10s} {nodes:5d} {plain:8.3f} {fused:8.3f} {fused / plain:6.3f}", flush=True)
        del model, parsed
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "compile": options.compile, "found": found}))


if __name__ == "__main__":
    main()
