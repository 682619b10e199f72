"""What a step of training costs next to the frozen target's own forward, and the memory that it takes.

    python benchmarks/training.py --shape 1.1b|7b|8b-128k|tiny

Random weights of a Llama, in bfloat16 on a GPU, and a drafter of the released form (width 2 x hidden size, two blocks,
five drafted tokens), trained as `redrafter train` does it: the target's states, the loss over every place of 8 x 2,048
tokens or over a share of them, its gradients, clipping, AdamW; the drafter in float32 under autocast.  The target's own
forward makes logits at every place.  The memory is the most that was allocated, less the target's weights and the
drafter's own, their gradients and AdamW's two moments.  The last line is JSON.
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
from redrafter.target import Target
from redrafter.training.loss import Objective
from redrafter.training.trainer import Unrolled

SHAPES = {  # vocabulary, hidden size, intermediate size, layers, heads, key-value heads
    "tiny": (1_000, 64, 128, 2, 4, 2),
    "1.1b": (32_000, 2_048, 5_632, 22, 32, 4),
    "7b": (32_000, 4_096, 11_008, 32, 32, 32),
    "8b-128k": (128_256, 4_096, 14_336, 32, 32, 8),
}
OBJECTIVES = {"cross-entropy": Objective(), "kl": Objective(0.0, kl=1.0)}


def target_of(shape: str, device: torch.device) -> Target:
    """A random model, made where it is to run."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    config = LlamaConfig(**dict(zip(names, SHAPES[shape], strict=True)), max_position_embeddings=4_096)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return Target(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


def seconds(act: Callable[[], object], device: torch.device, times: int) -> float:
    """The median time of `act`, after once to warm up."""
    found = []
    for _ in range(1 + times):
        started = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def training(target: Target, drafter: RecurrentDrafter, objective: Objective, share: float, batch: dict) -> Callable:
    """A step, as the Trainer makes it."""
    device = target.device
    module = Unrolled(drafter, target, objective, share)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        assert loss.isfinite()

    return step


def main() -> None:
    """Measures and prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2_048)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 1 / 3, 1 / 4], help="of the places to draft at"
    )
    parser.add_argument("--objectives", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    given = parser.parse_args()
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    torch.manual_seed(0)
    target = target_of(given.shape, device)
    drafter = RecurrentDrafter.for_target(target.model, beam_length=5)
    ids = torch.randint(0, target.vocab_size, (given.rows, given.length), device=device)
    batch = {"input_ids": ids, "segments": torch.ones_like(ids), "trained": torch.ones_like(ids, dtype=torch.bool)}
    own = sum(p.numel() for p in drafter.parameters())
    kept = 16 * own + sum(p.numel() * p.element_size() for p in target.model.parameters())
    print(
        f"{given.shape} on {name}, torch {torch.__version__}: drafter of {own:,} weights, {ids.numel():,} tokens a step"
    )

    with torch.no_grad():
        alone = seconds(lambda: target.model(input_ids=ids, use_cache=False), device, given.steps)
        states = seconds(lambda: target.hidden_states(ids, batch["segments"]), device, given.steps)
    rate = ids.numel() / alone
    print(f"  the target's own forward    {rate:12,.0f} tokens/s; its states alone {ids.numel() / states:,.0f}")
    runs = []
    for objective in given.objectives:
        for share in given.shares:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            step = training(target, drafter, OBJECTIVES[objective], share, batch)
            found = ids.numel() / seconds(step, device, given.steps)
            peak = (torch.cuda.max_memory_allocated(device) - kept) / 1e9 if on_gpu else None
            runs.append({"objective": objective, "share": share, "tokens_per_second": found})
            runs[-1] |= {"of_forward": found / rate, "peak_gb": peak}
            memory = "" if peak is None else f", {peak:.1f} GB above weights and optimiser"
            print(f"  {objective:14s} share {share:4.2f}   {found:12,.0f} tokens/s, {found / rate:.2f} of it{memory}")
    told = {"shape": given.shape, "device": name, "torch": str(torch.__version__), "tokens": ids.numel()}
    told |= {"forward_tokens_per_second": rate, "states_tokens_per_second": ids.numel() / states, "runs": runs}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
