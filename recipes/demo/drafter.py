"""Trains the demo's drafter on answers of the target.

Guarantees a drafter folder in bfloat16 beside the target, and `training.json` with tokens per step on held-out prompts.
Uses only the package's public interface; does not know how the target was trained.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from recipes.common.answers import ANSWER, answers, contexts, draft_vocabulary, prompt_of, put, restored, stored
from recipes.common.corpus import Corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter import RecurrentDrafter, generate
from redrafter.data.examples import Row
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.trainer import run

LENGTH, WIDTH, VOCABULARY = 5, 4, 2048  # of the widths tried, 4 decodes fastest on two CPU cores
BUDGET, BLOCKS, RATE = 21, 3, 2e-3
OBJECTIVE = Objective(cross_entropy=0.0, kl=0.5, coupled=1.0)  # serves sampling better, greedy decoding as well
HELD_OUT_PROMPTS = 64  # of each file


def figures(corpus: Corpus, model, drafter: RecurrentDrafter, tokenizer) -> dict[str, dict]:
    """Tokens per step and acceptance rate by position, on held-out prompts of each file."""
    found = {}
    for name in corpus.chat:
        held_out = contexts(corpus, name, tokenizer, held_out=True, count=HELD_OUT_PROMPTS)
        prompts = [prompt_of(row) for row in held_out]
        found[name] = {}
        for way, law in (("greedy", {}), ("sampled", {"do_sample": True, "seed": 1})):
            stats = generate(model, drafter, prompts, max_new_tokens=ANSWER, **law).stats
            found[name][way] = {
                "tokens_per_step": round(stats.tokens_per_step, 3),
                "accepted_by_position": [round(count / stats.steps, 3) for count in stats.accepted_by_position],
            }
        print(name, json.dumps(found[name]), flush=True)
    return found


def learnt(corpus: Corpus, model, tokenizer, output: Path, limit: int | None) -> list[Row]:
    """The target's answers to at most `limit` prompts per file, half of them greedy; kept in `output/answers.json`."""
    file = output / "answers.json"
    if file.exists():
        return restored(json.loads(file.read_text()))
    asked = [row for name in corpus.chat for row in contexts(corpus, name, tokenizer, held_out=False, count=limit)]
    begin = time.perf_counter()
    found = answers(model, asked[0::2]) + answers(model, asked[1::2], sampled=True)
    tokens, seconds = sum(sum(row.trained) for row in found), time.perf_counter() - begin
    print(f"the target wrote {len(found):,} answers, {tokens:,} tokens, in {seconds:.0f} s", flush=True)
    put(file, stored(found))
    return found


def train(
    corpus: Corpus, target: Path, output: Path, *, epochs: float, device: torch.device, limit: int | None
) -> None:
    """Generates answers, trains, and measures on held-out prompts; at most `limit` prompts per file."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(target).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    on_gpu = device.type == "cuda"
    rows = learnt(corpus, model, tokenizer, output.parent, limit)
    wrote = time.perf_counter() - begin
    drafter = RecurrentDrafter.for_target(
        model,
        beam_length=LENGTH,
        beam_width=WIDTH,
        node_budget=BUDGET,
        num_draft_layers=BLOCKS,
        draft_vocabulary=draft_vocabulary(rows, VOCABULARY),
    )
    recipe = Recipe(
        epochs=epochs,
        batch_size=64 if on_gpu else 16,
        learning_rate=RATE,
        save_steps=10_000,
        objective=OBJECTIVE,
    )
    ended = run(model, drafter, rows, output, recipe, resume=False)
    drafter.to(torch.bfloat16).save_pretrained(output)

    drafter.to(torch.float32)  # what is measured are the rounded weights
    record = {
        "answers": len(rows),
        "answer_tokens": sum(sum(row.trained) for row in rows),
        "epochs": epochs,
        "training_loss": round(ended.loss, 4),
        "seconds": round(time.perf_counter() - begin),
        "seconds_writing_answers": round(wrote),
        "seconds_of_training": round(ended.seconds),
        "held_out": figures(corpus, model, drafter, tokenizer),
        "beam_width": WIDTH,
        "beam_length": LENGTH,
        "node_budget": BUDGET,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
