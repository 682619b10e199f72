"""Drafters of the benchmark target, trained in several ways on the same prompts for the same number of steps.

Promises figures on prompts that no training saw, by category, greedy and sampled, and beside them how hard the target's
texts are to foresee.  Does not know how the target was trained.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from recipes.common.answers import answers, contexts, prompt_of
from recipes.common.corpus import Corpus
from recipes.target.shape import CATEGORIES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redrafter import RecurrentDrafter, generate
from redrafter.target import Target
from redrafter.training.continuations import continuations
from redrafter.training.data import Row, collate, most_frequent
from redrafter.training.loss import Objective
from redrafter.training.trainer import Recipe, run

LENGTH = 4
WIDTHS = (10, 50)
NEW_TOKENS = 128
SAMPLED = {"do_sample": True, "temperature": 1.0, "seed": 1}


@dataclass(frozen=True)
class Variant:
    """One way to train a drafter."""

    name: str
    data: str
    """text (as people wrote it), continuations (of it, by the target), greedy or mixed (answers of the target)."""
    objective: Objective = Objective()  # noqa: RUF009
    vocabulary: int = 1
    """The head scores one token in so many of the target's vocabulary."""


TOKENS, KL = Objective(), Objective(0.0, kl=1.0)
VARIANTS = [
    Variant("released: the text's own tokens", "text"),
    Variant("paper: the target's continuations", "continuations"),
    Variant("answers, greedy", "greedy"),
    Variant("answers, half sampled", "mixed"),
    Variant("answers, KL", "mixed", KL),
    Variant("answers, KL and coupled", "mixed", Objective(0.0, kl=0.5, coupled=1.0)),
    Variant("answers, 0.1 CE and 0.9 TV", "mixed", Objective(0.1, total_variation=0.9)),
    Variant("answers, KL, decay 0.8", "mixed", replace(KL, decay=0.8)),
    Variant("answers, KL, V/4", "mixed", KL, vocabulary=4),
    Variant("answers, KL, V/16", "mixed", KL, vocabulary=16),
]


def compare(corpus: Corpus, target: Path, output: Path, *, steps: int, batch: int, prompts: int, held_out: int) -> None:
    """Trains every variant that `output/results.json` lacks, and writes it anew after each."""
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(target).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    file = output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"variants": {}}
    asked = {
        category: [prompt_of(row) for row in contexts(corpus, name, tokenizer, held_out=_part(corpus, name))[:held_out]]
        for category, name in CATEGORIES.items()
    }
    if "target" not in results:
        results["target"] = {category: _quality(model, tokenizer, rows) for category, rows in asked.items()}
        _write(file, results)
    data = _data(corpus, model, tokenizer, prompts, results)
    for variant in VARIANTS:
        if variant.name not in results["variants"]:
            results["variants"][variant.name] = _variant(
                variant, model, data[variant.data], asked, output, steps, batch
            )
            _write(file, results)


def _part(corpus: Corpus, name: str) -> bool | None:
    return True if name in corpus.chat else None


def _write(file: Path, results: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(list(results["variants"].items())[-1:]), flush=True)


def _data(corpus: Corpus, model: PreTrainedModel, tokenizer, prompts: int, results: dict) -> dict[str, list[Row]]:
    """Rows of every kind, to the same prompts of the training files."""
    asked = [
        row for name in corpus.chat for row in contexts(corpus, name, tokenizer, held_out=False)[:prompts] if row.learnt
    ]
    together = 1024 if model.device.type == "cuda" else 16
    ways = {
        "text": lambda: asked,
        "continuations": lambda: _continued(model, asked, tokenizer.eos_token_id),
        "greedy": lambda: answers(model, asked, together),
        "mixed": lambda: answers(model, asked[0::2], together) + answers(model, asked[1::2], together, **SAMPLED),
    }
    rows, results["data"] = {}, {}
    for name, make in ways.items():
        begin = time.perf_counter()
        rows[name] = make()
        tokens = sum(row.learnt for row in rows[name])
        seconds = round(time.perf_counter() - begin)
        results["data"][name] = {"rows": len(rows[name]), "tokens": tokens, "seconds": seconds}
    print(json.dumps(results["data"]), flush=True)
    return rows


def _continued(model: PreTrainedModel, rows: list[Row], end: int, tokens: int = 16_384) -> list[Row]:
    """The rows with what the target writes after each of their positions; about `tokens` at a time."""
    target = Target(model)
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    out: list[Row] = []
    while len(out) < len(rows):
        part = rows[len(out) : len(out) + 8]
        part = rows[len(out) : len(out) + max(1, tokens // len(part[-1].input_ids))]
        ids = collate(part)["input_ids"].to(target.device)
        found = continuations(target, ids, depth=LENGTH + 1, ends=frozenset([end])).tolist()
        out += [replace(row, continuations=more[: len(row.input_ids)]) for row, more in zip(part, found, strict=True)]
    return out


def _variant(
    variant: Variant, model: PreTrainedModel, rows: list[Row], asked: dict, output: Path, steps: int, batch: int
) -> dict:
    torch.manual_seed(0)
    size = model.config.vocab_size // variant.vocabulary
    drafter = RecurrentDrafter.for_target(
        model, beam_length=LENGTH, draft_vocabulary=None if variant.vocabulary == 1 else most_frequent(rows, size)
    )
    begin = time.perf_counter()
    recipe = Recipe(max_steps=steps, batch_size=batch, packing=1024, save_steps=10**6, objective=variant.objective)
    loss = run(model, drafter, rows, output / variant.name.replace("/", "-"), recipe, resume=False)
    seconds = time.perf_counter() - begin
    record = {**asdict(variant), "loss": round(loss, 3), "seconds": round(seconds), "figures": {}}
    for way, law in (("greedy", {}), ("sampled", SAMPLED)):
        for width in WIDTHS:
            found = {name: _counts(model, drafter, prompts, width, law) for name, prompts in asked.items()}
            found["all"] = [sum(pair) for pair in zip(*found.values(), strict=True)]
            record["figures"][f"{way} {width}"] = {name: round(t / s, 3) for name, (t, s) in found.items()}
    return record


def _counts(model: PreTrainedModel, drafter, prompts: list[list[int]], width: int, law: dict) -> list[int]:
    stats = generate(model, drafter, prompts, max_new_tokens=NEW_TOKENS, beam_width=width, **law).stats
    return [stats.tokens, stats.steps]


@torch.no_grad()
def _quality(model: PreTrainedModel, tokenizer, prompts: list[list[int]]) -> dict:
    """Distinct 4-grams in a text, entropy in nats of each next token, and how two texts begin."""
    record: dict = {"prompts": len(prompts)}
    for way, law in (("greedy", {}), ("sampled", SAMPLED)):
        new = generate(model, None, prompts, max_new_tokens=NEW_TOKENS, **law).new_tokens
        grams = [[tuple(text[i : i + 4]) for i in range(len(text) - 3)] for text in new]
        shares = [len(set(own)) / len(own) for own in grams if own]
        rows = [Row(p + n, [False] * len(p) + [True] * len(n)) for p, n in zip(prompts, new, strict=True)]
        record[way] = {
            "tokens": sum(map(len, new)),
            "distinct_4_grams": round(sum(shares) / max(1, len(shares)), 3),
            "entropy": round(torch.cat([_entropy(model, row) for row in rows]).mean().item(), 3),
            "samples": [tokenizer.decode(p + n) for p, n in list(zip(prompts, new, strict=True))[:2]],
        }
    return record


def _entropy(model: PreTrainedModel, row: Row) -> Tensor:
    logits = model(input_ids=torch.tensor([row.input_ids], device=model.device)).logits[0, :-1].float()
    log = logits[torch.tensor(row.trained[1:], device=model.device)].log_softmax(-1)
    return -(log.exp() * log).sum(-1)
