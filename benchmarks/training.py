"""Times training steps: tokens per second, compared with the frozen target's forward pass, and memory.

    python benchmarks/training.py --shape 1.1b [--objective cross-entropy] [--share 1 0.25]

Targets have random weights, so nothing is loaded; every token of a batch is trained on; the head is the released one
(exit width 2 H, two blocks).  Prints a table and a final JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redrafter import RecurrentDrafter
from redrafter.targets.target import Target
from redrafter.training.objective import Objective
from redrafter.training.unrolled import Unrolled

SHAPES = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "tiny": (64, 172, 2, 4, 4, 512),
    "1.1b": (2048, 5632, 22, 32, 4, 32_000),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}
OBJECTIVES = {"cross-entropy": Objective(), "kl": Objective(0.0, kl=1.0)}
GIB = 2**30


def config(shape: str) -> LlamaConfig:
    """A Llama of that shape."""
    hidden, intermediate, layers, heads, groups, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
    )


def median_seconds(act: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median over `rounds` calls, after two warm-up calls."""
    times = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def measure(
    model: torch.nn.Module, name: str, share: float, given: argparse.Namespace
) -> dict[str, float | str | None]:
    """Times one objective and one share of the windows."""
    target = Target(model)
    device = target.device
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model, beam_length=given.length)
    module = Unrolled(drafter, target, OBJECTIVES[name], share)
    optimizer = torch.optim.AdamW(drafter.parameters(), fused=on_gpu)
    ids = torch.randint(target.vocab_size, (given.rows, given.tokens), device=device)
    whole = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = module(ids, whole, whole.bool())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        target.hidden_states(ids, whole)

    plain = median_seconds(forward, device, given.rounds)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trained = median_seconds(step, device, given.rounds)
    peak = None
    if on_gpu:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        own = 4 * sum(p.numel() * p.element_size() for p in drafter.parameters())  # with gradients and two moments
        peak = round((torch.cuda.max_memory_allocated() - weights - own) / GIB, 2)
    tokens = ids.numel()
    return {
        "objective": name,
        "share": share,
        "tokens_per_second": round(tokens / trained),
        "forward_tokens_per_second": round(tokens / plain),
        "ratio": round(plain / trained, 3),
        "peak_gib": peak,
    }


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--share", type=float, nargs="+", default=[1.0], help="of the windows that a step scores")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="in each row")
    parser.add_argument("--length", type=int, default=5, help="draft positions")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    with device:
        model = AutoModelForCausalLM.from_config(config(given.shape), dtype=torch.bfloat16).eval()
    results = [measure(model, name, share, given) for name in given.objective for share in given.share]
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(
        f"{given.shape}, {given.rows} x {given.tokens:,} tokens, T = {given.length}, {card}, torch {torch.__version__}"
    )
    print("objective       share   tokens/s   forward alone   ratio   GiB above weights and optimiser")
    for one in results:
        print(
            f"{one['objective']:<14} {one['share']:>6} {one['tokens_per_second']:>10,} "
            f"{one['forward_tokens_per_second']:>15,} {one['ratio']:>7} {one['peak_gib']!s:>10}"
        )
    print(json.dumps({"shape": given.shape, "device": card, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
