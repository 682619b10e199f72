"""Compares thousands of texts with and without a drafter in double precision: all must be equal.

    python benchmarks/exactness.py [--sequences 10000] [--first 0]

Each round takes a small random model (one of four families, with or without sliding windows and soft caps), random
settings, random prompts of unequal length, a random drafter and random limits, and generates all texts twice: without a
drafter and with it, each in batches of a random size.  Double precision excludes rounding as an explanation.  Exit
status 1 if a text differs; `--first` repeats the round.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from redrafter import RecurrentDrafter, generate

PER_ROUND = 100


def random_model(dice: random.Random) -> PreTrainedModel:
    """A model of one to three layers in float64, with weights large enough for varied texts."""
    heads = dice.choice([2, 4])
    shape = {
        "vocab_size": dice.choice([13, 61, 300]),
        "hidden_size": 8 * heads,
        "intermediate_size": 40,
        "num_hidden_layers": dice.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": dice.choice([1, heads]),
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": dice.choice([0.1, 0.3, 0.6]),
        "tie_word_embeddings": dice.random() < 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = dice.choice(
        [
            LlamaConfig(**shape),
            MistralConfig(**shape, sliding_window=9),
            Qwen3Config(**shape),
            Gemma2Config(**shape, sliding_window=9, query_pre_attn_scalar=8),
        ]
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def random_settings(dice: random.Random, vocabulary: int, rows: int) -> dict[str, Any]:
    """Random sampling settings and other arguments of a call."""
    settings: dict[str, Any] = {"max_new_tokens": dice.randint(1, 32)}
    if dice.random() < 0.7:
        settings |= {"do_sample": True, "temperature": dice.choice([0.3, 0.7, 1.0, 1.4])}
        settings["seed"] = dice.choice([dice.randrange(2**63), [dice.randrange(2**63) for _ in range(rows)]])
        for name, values in {"top_k": [1, 3, 10], "top_p": [0.3, 0.9, 0.99], "min_p": [0.02, 0.2]}.items():
            if dice.random() < 0.3:
                settings[name] = dice.choice(values)
    for name, value in {
        "repetition_penalty": dice.choice([0.8, 1.3]),
        "presence_penalty": dice.uniform(-1, 1),
        "frequency_penalty": dice.uniform(-1, 1),
        "no_repeat_ngram_size": dice.randint(2, 4),
        "min_new_tokens": dice.randint(1, 20),
        "suppress_tokens": [dice.randrange(3, vocabulary) for _ in range(3)],
        "bad_words_ids": [[dice.randrange(3, vocabulary)], [dice.randrange(3, vocabulary) for _ in range(2)]],
        "eos_token_id": [2, 3, 4],
    }.items():
        if dice.random() < 0.12:
            settings[name] = value
    return settings


def texts_that_differ(number: int, sequences: int, seen: Counter[str]) -> int:
    """Runs one round; describes the differences."""
    dice = random.Random(number)
    torch.manual_seed(number)
    model = random_model(dice)
    vocabulary = model.config.vocab_size
    length, width = dice.randint(1, 6), dice.randint(1, min(12, vocabulary))
    drafter = RecurrentDrafter.for_target(
        model, exit_dim=16, num_draft_layers=dice.randint(1, 2), beam_length=length, beam_width=width
    )
    shape = {"node_budget": dice.randint(length + 1, 1 + width * length)} if dice.random() < 0.5 else {}
    settings = random_settings(dice, vocabulary, sequences)
    prompts = [[dice.randrange(3, vocabulary) for _ in range(dice.randint(1, 30))] for _ in range(sequences)]
    plain = generate(model, None, prompts, batch_size=dice.choice([7, 50, 100]), **settings)
    drafted = generate(model, drafter, prompts, batch_size=dice.choice([7, 50, 100]), **shape, **settings)
    seen.update([model.config.model_type, *settings, *shape])
    seen["tokens"] += drafted.stats.tokens
    seen["drafted tokens accepted"] += drafted.stats.accepted
    parted = [i for i, (a, b) in enumerate(zip(plain.new_tokens, drafted.new_tokens, strict=True)) if a != b]
    for i in parted[:3]:
        print(f"round {number}, {settings}: {plain.new_tokens[i]} became {drafted.new_tokens[i]}", flush=True)
    return len(parted)


def main() -> None:
    """Parses the command line, runs the rounds and prints how many texts differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    different, begin, left, number = 0, time.perf_counter(), options.sequences, options.first
    while left > 0:
        different += texts_that_differ(number, min(PER_ROUND, left), seen)
        left, number = left - PER_ROUND, number + 1
    print(", ".join(f"{name} {count:,}" for name, count in seen.most_common()))
    seconds = time.perf_counter() - begin
    print(f"{different} of {options.sequences:,} texts differ ({number - options.first} rounds, {seconds:.0f} s)")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
