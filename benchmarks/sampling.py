"""Times a decoding step with sampling and with greedy decoding, at a vocabulary of 32,768.

    python benchmarks/sampling.py [--sharpness X]

A Llama with 8 layers of width 512 and random weights, one row of 64 prompt tokens; without a drafter, and with an
untrained one whose drafts are almost never accepted, so that all steps do the same work.  The settings alternate, so
that drift of the machine favours none; medians over rounds, and their ratios to greedy decoding.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redrafter import RecurrentDrafter, generate

WAYS = {
    "greedy": {},
    "temperature 0.8": {"do_sample": True, "seed": 1, "temperature": 0.8},
    "top_k 50": {"do_sample": True, "seed": 1, "top_k": 50},
    "top_p 0.9": {"do_sample": True, "seed": 1, "top_p": 0.9},
    "min_p 0.05": {"do_sample": True, "seed": 1, "min_p": 0.05},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a measurement")
    parser.add_argument("--sharpness", type=float, default=14.0, help="scale of the logits; trained models are sharp")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {"vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, eos_token_id=None)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(options.sharpness)
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=5)
    with torch.no_grad():
        drafter.lm_head[-1].weight.mul_(options.sharpness)
    prompt = torch.randint(0, 32_768, (1, 64))

    for title, head in (("without a drafter", None), ("4 beams of 5 tokens", drafter)):
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(1 + options.rounds):  # the first round only warms up
            for name, settings in WAYS.items():
                stats = generate(model, head, prompt, max_new_tokens=options.tokens, **settings).stats
                seconds[name].append(stats.seconds / stats.steps)
        middle = {name: statistics.median(found[1:]) for name, found in seconds.items()}
        print(title)
        for name, found in seconds.items():
            low, high = min(found[1:]), max(found[1:])
            print(
                f"  {name:24s} {middle[name] * 1e3:6.2f} ms a step ({low * 1e3:.2f} to {high * 1e3:.2f})"
                f"  {middle[name] / middle['greedy']:.3f} of greedy"
            )


if __name__ == "__main__":
    main()
