"""Measures how ranking drafts with the sampling noise changes tokens per step, greedy and sampled.

    python benchmarks/coupled.py [--model M --drafter D] [--prompts FILE] [--seeds N]

A beam's score is the sum of log-softmax of (alpha * logits + noise) / tau.  Prints one JSON line per setting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from redrafter import generate
from redrafter.cli.loading import demo_folder, load_drafter, load_model
from redrafter.core.rows import SamplingNoise
from redrafter.data.prompts import prompt_ids, read_prompts
from redrafter.proposers import Drafter

SCALES = [(1, 0.25), (1, 0.5), (1, 0.7), (1, 1), (1, 1.5), (0.6, 0.5), (1.3, 0.5)]
BATCH, NEW_TOKENS = 7, 96


def measure(model: PreTrainedModel, drafter: Drafter, prompts: list[list[int]], seeds: int | None) -> dict[str, Any]:
    """Tokens per step over all prompts, greedy or sampled `seeds` times at temperature 1."""
    sampling: dict[str, Any] = {} if seeds is None else {"do_sample": True, "seed": list(range(len(prompts) * seeds))}
    rows = prompts * (seeds or 1)
    stats = generate(model, drafter, rows, max_new_tokens=NEW_TOKENS, batch_size=BATCH, **sampling).stats
    return {
        "tokens_per_step": round(stats.tokens_per_step, 3),
        "accepted_by_position": [round(count / stats.steps, 3) for count in stats.accepted_by_position],
        "tokens": stats.tokens,
    }


def main() -> None:
    """Measures all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_folder() / "redrafter-demo-12m"))
    parser.add_argument("--drafter", default=str(demo_folder() / "drafter"))
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent.parent / "recipes/demo/prompts.jsonl")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, device="cpu")
    drafter = load_drafter(options.drafter, model)
    prompts = [prompt_ids(record, tokenizer, where) for where, record in read_prompts(options.prompts)]

    def show(setting: str, seeds: int | None) -> None:
        print(json.dumps({"setting": setting, **measure(model, drafter, prompts, seeds)}), flush=True)

    show("greedy", None)
    with_noise = SamplingNoise.with_noise

    def uncoupled(self: SamplingNoise, logits: Tensor, depth: int, names: Tensor | None = None) -> Tensor:
        return self.warp(logits)

    SamplingNoise.with_noise = uncoupled
    show("sampled, uncoupled", options.seeds)
    for alpha, tau in SCALES:

        def scaled(
            self: SamplingNoise, logits: Tensor, depth: int, names: Tensor | None = None, a=alpha, t=tau
        ) -> Tensor:
            return with_noise(self, logits * a, depth, names) / t

        SamplingNoise.with_noise = scaled
        show(f"sampled, alpha {alpha}, tau {tau}", options.seeds)


if __name__ == "__main__":
    main()
