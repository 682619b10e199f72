"""Tokens per second of vLLM with a drafter and without, and how often the greedy texts are equal.

    python benchmarks/vllm_speed.py [--model MODEL --drafter FOLDER] [--requests 1 8 32] [--tokens 4]
                                    [--methods none redrafter ngram] [--dtype bfloat16] [--prompts FILE] [--out FILE]

Needs vLLM with the plug-in (docs/vllm.md).  Without --model, the bundled pair.  Each method has an engine in a process
of its own, which answers all prompts greedily with a constant number of requests in flight, once as a warm-up and then
`--rounds` times.  A row of the table holds the median of the rounds:

- `tokens/s`: new tokens of all requests per second, prompts included;
- `speed-up`: over method `none` with as many requests;
- `per step`: tokens per drafted step of a request;
- `equal`: share of texts that are equal to those of method `none` with as many requests; in low precision, also texts
  without drafts change with the number of requests: `equal to one` compares with `none` with one request.

Prints a table; `--out` writes the figures and versions as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from redrafter.cli.demo import PROMPTS
from redrafter.cli.loading import demo_folder


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder() / "redrafter-demo-12m"))
    parser.add_argument("--drafter", default=str(demo_folder() / "drafter"))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--methods", nargs="+", default=["none", "redrafter"], choices=["none", "redrafter", "ngram"])
    parser.add_argument("--tokens", type=int, default=4, help="drafted tokens per request and step")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=Path, help="JSON lines with messages or prompt")
    parser.add_argument("--limit", type=int, default=64, help="number of prompts; they are repeated up to it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    parser.add_argument("--settings", type=json.loads, default={}, help="further fields of the speculative config")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompt_ids(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """`--limit` prompts as token ids."""
    from redrafter.data.prompts import prompt_ids as ids_of
    from redrafter.data.prompts import read_prompts

    if options.prompts is None:
        records = [("a built-in prompt", {"messages": [{"role": "user", "content": text}]}) for text in PROMPTS]
    else:
        records = read_prompts(str(options.prompts), limit=options.limit)
    ids = [ids_of(record, tokenizer, where) for where, record in records]
    return [ids[i % len(ids)] for i in range(options.limit)]


def answer_all(engine: Any, prompts: list[list[int]], new_tokens: int, requests: int, name: str) -> list[list[int]]:
    """The new tokens after each prompt, with `requests` of them in flight."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    answers: dict[str, list[int]] = {}
    waiting = list(enumerate(prompts))[::-1]
    flying = 0
    while waiting or flying:
        while waiting and flying < requests:
            number, ids = waiting.pop()
            engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, params)
            flying += 1
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
                flying -= 1
    return [answers[f"{name}-{number}"] for number in range(len(prompts))]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one method, in this process."""
    import torch
    import vllm

    speculative = {
        "none": None,
        "redrafter": {"model": options.drafter, **options.settings},
        "ngram": {"prompt_lookup_max": 4, "prompt_lookup_min": 2},
    }[options.worker]
    if speculative is not None:
        speculative |= {"method": options.worker, "num_speculative_tokens": options.tokens}
    engine_options = {"max_num_seqs": max(options.requests), "disable_log_stats": False, **options.engine}
    llm = vllm.LLM(options.model, dtype=options.dtype, speculative_config=speculative, **engine_options)
    prompts = prompt_ids(options, llm.get_tokenizer())
    rows = []
    for requests in options.requests:
        answer_all(llm.llm_engine, prompts, options.new_tokens, requests, f"warm-{requests}")
        before, rates = counters(llm), []
        for number in range(options.rounds):
            began = time.perf_counter()
            texts = answer_all(llm.llm_engine, prompts, options.new_tokens, requests, f"{requests}-{number}")
            rates.append(sum(map(len, texts)) / (time.perf_counter() - began))
        after = counters(llm)
        drafts = after["num_drafts"] - before["num_drafts"]
        accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
        row = {"requests": requests, "tokens_per_second": rates, "texts": texts}
        rows.append(row | {"tokens_per_step": 1 + accepted / drafts if drafts else None})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"rows": rows, "device": device, "vllm": vllm.__version__, "torch": torch.__version__}


def counters(llm: Any) -> dict[str, float]:
    """Drafts and accepted tokens so far."""
    found = {"num_drafts": 0, "num_accepted_tokens": 0}
    for one in llm.get_metrics():
        name = one.name.removeprefix("vllm:spec_decode_")
        if name in found:
            found[name] = one.value
    return found


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method and number of requests."""
    plain = {row["requests"]: row for row in results["none"]["rows"]} if "none" in results else {}
    first = next(iter(plain.values()), None)
    rows = []
    for method, result in results.items():
        for row in result["rows"]:
            rate, base = statistics.median(row["tokens_per_second"]), plain.get(row["requests"])
            line = {"method": method, "requests": row["requests"], "tokens/s": round(rate, 1)}
            if base is not None and first is not None:
                line["speed-up"] = round(rate / statistics.median(base["tokens_per_second"]), 2)
                line["equal"] = share(row["texts"], base["texts"])
                line["equal to one"] = share(row["texts"], first["texts"])
            rows.append(line | {"per step": row["tokens_per_step"] and round(row["tokens_per_step"], 2)})
    return rows


def share(texts: list[Any], others: list[Any]) -> str:
    """How many texts are equal."""
    return f"{sum(one == other for one, other in zip(texts, others, strict=True))} of {len(texts)}"


def main() -> None:
    """Measures every method in a process of its own and prints the table."""
    options = parsed()
    if options.worker:
        Path(options.out).write_text(json.dumps(measure(options)))
        return
    results = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            given = [*sys.argv[1:], "--worker", method, "--out", str(file)]
            subprocess.run([sys.executable, __file__, *given], check=True)
            results[method] = json.loads(file.read_text())
    rows = table(results)
    some = next(iter(results.values()))
    print(f"{options.model} on {some['device']}, vLLM {some['vllm']}, torch {some['torch']}, {options.dtype}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str("" if row.get(name) is None else row[name]) for name in names) + " |")
    if options.out is not None:
        for result in results.values():
            for row in result["rows"]:
                del row["texts"]
        options.out.write_text(json.dumps({"table": rows, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
