"""What is measured of a target and of its drafters, on texts that the target wrote to held-out prompts.

Promises decoding's own counts of drafts without decoding (up to rounding, as `redrafter.evaluation.acceptance` says), and
the time of a draft alone.  Does not know how the drafters were trained.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from recipes.common.answers import answered, prompt_of
from torch import Tensor
from transformers import PreTrainedModel

from redrafter import RecurrentDrafter, generate
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.data.examples import Row, collate
from redrafter.engine.request import request
from redrafter.evaluation.acceptance import drafted_everywhere, walked
from redrafter.evaluation.profiling import milliseconds
from redrafter.proposers import Proposer
from redrafter.targets.target import Target

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "seed": 1},
}
REPEATS = 100  # of a draft that is timed
TOGETHER = 32  # rows that the target reads at once

Texts = dict[str, list[Row]]
"""By category, in one order everywhere: a row's number, and so its noise, is its place in all of them together."""


def written(model: PreTrainedModel, asked: Texts, way: str, new_tokens: int) -> Texts:
    """The prompts with the target's own text."""
    prompts = [prompt_of(row) for rows in asked.values() for row in rows]
    new = iter(generate(model, None, prompts, max_new_tokens=new_tokens, **WAYS[way]).new_tokens)
    return {name: [answered(prompt_of(row), next(new)) for row in rows] for name, rows in asked.items()}


def counts(
    model: PreTrainedModel, drafter: RecurrentDrafter, texts: Texts, way: str, width: int
) -> dict[str, list[int]]:
    """Tokens and steps of each category, as decoding that writes these texts would count them."""
    rows = [row for own in texts.values() for row in own]
    asked = request(model, drafter, [prompt_of(row) for row in rows], beam_width=width, **WAYS[way])
    assert asked.proposer is not None
    verdicts = iter(
        drafted_everywhere(
            asked.target,
            asked.proposer,
            rows,
            sampler=asked.sampler,
            seeds=[row.seed for row in asked.rows],
            batch_size=TOGETHER,
        )
    )
    return {
        name: [
            sum(sum(row.trained) for row in own),
            sum(1 + len(walked(next(verdicts))) for _ in own),  # the prompt's own run is a step
        ]
        for name, own in texts.items()
    }


def decoded(
    model: PreTrainedModel, drafter: RecurrentDrafter, texts: Texts, way: str, width: int, new_tokens: int
) -> list[int]:
    """Tokens and steps of decoding in truth, over all categories: what `counts` must come to."""
    prompts = [prompt_of(row) for own in texts.values() for row in own]
    stats = generate(model, drafter, prompts, beam_width=width, max_new_tokens=new_tokens, **WAYS[way]).stats
    return [stats.tokens, stats.steps]


@torch.no_grad()
def quality(model: PreTrainedModel, tokenizer, rows: list[Row]) -> dict[str, Any]:
    """Distinct 4-grams in a text, entropy in nats of each next token, and two texts as prompt and answer."""
    target = Target(model)
    entropies: list[Tensor] = []
    for begin in range(0, len(rows), TOGETHER):
        batch = {name: part.to(target.device) for name, part in collate(rows[begin : begin + TOGETHER]).items()}
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


class _Recorded:
    """A proposer that remembers what it was asked last."""

    asked: tuple[RowState, Tensor, SamplingNoise]

    def __init__(self, proposer: Proposer):
        self.proposer = proposer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def propose(self, memory: None, place: RowState, context: Tensor, draw: SamplingNoise) -> Any:
        """As the proposer's."""
        self.asked = place, context, draw
        return self.proposer.propose(memory, place, context, draw)


def draft_ms(model: PreTrainedModel, drafter: RecurrentDrafter, width: int) -> float:
    """Milliseconds of one greedy draft for one row, from the target's state to the tree; the median of many.

    On CUDA replayed as a graph, so of the device alone; elsewhere as it is called.
    """
    asked = request(model, drafter, [[2, 3]], beam_width=width, do_sample=False)
    assert asked.proposer is not None
    recorded = _Recorded(asked.proposer)
    drafted_everywhere(asked.target, recorded, [answered([2, 3], [4, 5])])  # one draft, whose context is kept

    def draft() -> None:
        recorded.proposer.propose(None, *recorded.asked)

    return milliseconds(draft, model.device, REPEATS)
