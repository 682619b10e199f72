"""How often the next token is the one after the best earlier match, by the number of matching tokens.

    python benchmarks/lookup_acceptance.py MODEL PROMPTS... [--temperatures 0 0.6 1] [--limit 48] [--new-tokens 96]
        [--dtype auto]

Texts are written without a drafter; matches are counted at each new token.  These are the tables ACCEPTANCE and
ACCEPTANCE_SAMPLED of `core/continuations.py`.  One line of JSON per temperature: the share and the number of places.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from redrafter.cli.loading import load_model
from redrafter.core.continuations import NGRAM
from redrafter.data.prompts import prompt_ids, read_prompts
from redrafter.engine.generate import generate


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0, 0.6, 1])
    parser.add_argument("--limit", type=int, default=48, help="prompts, taken evenly from each file")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, options.dtype)
    share, rows = -(-options.limit // len(options.prompts)), []
    for file in options.prompts:
        records = read_prompts(file)
        rows += records[:: max(1, len(records) // share)][:share]
    ids = [prompt_ids(record, tokenizer, where) for where, record in rows]
    for temperature in options.temperatures:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 1} if temperature else {}
        texts = generate(model, None, ids, max_new_tokens=options.new_tokens, batch_size=16, **sampling).new_tokens
        seen: Counter[int] = Counter()
        equal: Counter[int] = Counter()
        for prompt, new in zip(ids, texts, strict=True):
            count_matches(prompt + new, len(prompt) - 1, seen, equal)
        found = {size: (round(equal[size] / seen[size], 3), seen[size]) for size in sorted(seen)}
        print(json.dumps({"temperature": temperature, "prompts": len(ids), "matches": found}), flush=True)


def count_matches(text: list[int], start: int, seen: Counter[int], equal: Counter[int]) -> None:
    """Counts the best match at each position from `start`, and whether the token after it is the next one."""
    for end in range(start, len(text) - 1):
        best = (0, -1)
        for place in range(end):
            size = 0
            while size < min(NGRAM, place + 1) and text[place - size] == text[end - size]:
                size += 1
            best = max(best, (size, place))
        if best[0]:
            seen[best[0]] += 1
            equal[best[0]] += text[best[1] + 1] == text[end + 1]


if __name__ == "__main__":
    main()
