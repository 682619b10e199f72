"""Measures a target and its drafters on texts that the target generated for held-out prompts.

Guarantees the acceptance counts of decoding without decoding (up to rounding, see `redrafter.evaluation.acceptance`),
and the time of a draft.  Does not know how the drafters were trained.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from recipes.common.answers import answered, prompt_of
from torch import Tensor
from transformers import PreTrainedModel

from redrafter import RecurrentDrafter, generate
from redrafter.data.examples import Row, collate
from redrafter.engine.request import request
from redrafter.evaluation import acceptance
from redrafter.evaluation.profiling import StepProfiler
from redrafter.proposers import method_of
from redrafter.targets.target import Target

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "seed": 1},
}
REPEATS = 100
"""Timed drafts."""

BATCH_SIZE = 32
"""Rows that the target processes together."""

Texts = dict[str, list[Row]]
"""Rows by category.  The order determines each row's number and therefore its sampling noise."""


def written(model: PreTrainedModel, asked: Texts, way: str, new_tokens: int) -> Texts:
    """The prompts, each followed by the text that the target generates."""
    prompts = [prompt_of(row) for rows in asked.values() for row in rows]
    new = iter(generate(model, None, prompts, max_new_tokens=new_tokens, **WAYS[way]).new_tokens)
    return {name: [answered(prompt_of(row), next(new)) for row in rows] for name, rows in asked.items()}


def counts(
    model: PreTrainedModel, drafter: RecurrentDrafter, texts: Texts, way: str, width: int
) -> dict[str, list[int]]:
    """Tokens and steps of each category that decoding would need for these texts."""
    rows = [row for own in texts.values() for row in own]
    prompts = [prompt_of(row) for row in rows]
    new = [row.input_ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    parsed = request(model, drafter, prompts, beam_width=width, **WAYS[way])
    proposer = parsed.decoder.proposer
    assert proposer is not None
    verdicts = iter(
        acceptance.drafted_everywhere(
            parsed.target,
            proposer,
            acceptance.answered(parsed, new),
            sampled_as=parsed.rows[0],
            seeds=[row.seed for row in parsed.rows],
            batch_size=BATCH_SIZE,
            from_start=True,
        )
    )
    return {
        name: [
            sum(sum(row.trained) for row in own),
            sum(len(acceptance.walked(next(verdicts))) for _ in own),
        ]
        for name, own in texts.items()
    }


def decoded(
    model: PreTrainedModel, drafter: RecurrentDrafter, texts: Texts, way: str, width: int, new_tokens: int
) -> list[int]:
    """Actual tokens and steps of decoding over all categories; `counts` must give the same sum."""
    prompts = [prompt_of(row) for own in texts.values() for row in own]
    stats = generate(model, drafter, prompts, beam_width=width, max_new_tokens=new_tokens, **WAYS[way]).stats
    return [stats.tokens, stats.steps]


@torch.no_grad()
def quality(model: PreTrainedModel, tokenizer, rows: list[Row]) -> dict[str, Any]:
    """Share of distinct 4-grams, mean entropy of the next token in nats, and two samples of prompt and answer."""
    target = Target(model)
    entropies: list[Tensor] = []
    for begin in range(0, len(rows), BATCH_SIZE):
        batch = {name: part.to(target.device) for name, part in collate(rows[begin : begin + BATCH_SIZE]).items()}
        hidden = target.hidden_states(batch["input_ids"], batch["segments"])
        for states in hidden[:, :-1][batch["trained"][:, 1:]].split(1024):
            log = target.logits(states).float().log_softmax(-1)
            entropies.append(-(log.exp() * log).sum(-1))
    new = [row.input_ids[len(prompt_of(row)) :] for row in rows]
    grams = [[tuple(text[i : i + 4]) for i in range(len(text) - 3)] for text in new]
    shares = [len(set(own)) / len(own) for own in grams if own]
    return {
        "prompts": len(rows),
        "tokens": sum(map(len, new)),
        "distinct_4_grams": round(statistics.mean(shares), 3) if shares else None,
        "entropy": round(torch.cat(entropies).mean().item(), 3),
        "samples": [
            [tokenizer.decode(prompt_of(row)), tokenizer.decode(text)]
            for row, text in zip(rows[:2], new[:2], strict=True)
        ],
    }


def draft_ms(model: PreTrainedModel, drafter: RecurrentDrafter, width: int) -> float:
    """Median milliseconds of one greedy draft of one row, from the target's state to the tree.

    On CUDA it is replayed as a graph, so device time alone is measured.
    """
    method = method_of(drafter)
    shape = method.shape(0).model_copy(update={"beam_width": width})
    parsed = request(model, method, [[2, 3]], shape=shape, do_sample=False)
    return StepProfiler(parsed, method, repeats=REPEATS).draft_ms(shape)
