"""The paper's local distillation: what the target writes greedily after every position of given text.

Paper: arXiv 2403.09919, section 4.  Guarantees one run of the target for each depth and chunk of positions, however
many positions there are.  Does not know files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redrafter.core.tree import chain
from redrafter.data.examples import Row, collate, tokenized_rows
from redrafter.decoding.settings import ONE_TEXT, resolve
from redrafter.engine.inputs import end_tokens
from redrafter.targets.target import Target
from redrafter.training.distillation import CompletedPrompt, DistillProgress, Prompt, row_labels, smallest

POSITIONS_PER_RUN = 512
"""Positions that one run of the target continues; bounds the memory of logits and masks."""

MAX_LOGITS = 2**28
"""Logits of the target per run, unless a single row has more: 1 GB in float32."""


def branch_mask(
    position: Int[Tensor, " C"], *, depth: int, text: int, slots: int, window: int | None = None
) -> Bool[Tensor, "1 C slots"]:
    """Attention mask of the tokens at `depth` after each position: the text up to it, and their own branch.

    The text is in the first `text` slots, followed by the chunk's tokens of depth 1, of depth 2 and so on.
    """
    slot = torch.arange(slots, device=position.device)
    offset, branch = slot - text, torch.arange(len(position), device=position.device)[:, None]
    slot_position = torch.where(offset < 0, slot, position[:, None] + 1 + offset.clamp(min=0) // len(position))
    same_branch = (offset >= 0) & (offset % len(position) == branch)
    mask = torch.where(offset < 0, slot <= position[:, None], same_branch)
    if window is not None:
        mask = mask & (position[:, None] + depth - slot_position < window)
    return mask[None]


@torch.inference_mode()
def continuations(
    target: Target,
    input_ids: Int[Tensor, "B P"],
    *,
    depth: int,
    ends: frozenset[int] = frozenset(),
    chunk: int = POSITIONS_PER_RUN,
) -> Int[Tensor, "B P depth"]:
    """The `depth` tokens that the target writes greedily after each position.

    They are -1 after an end token and beyond the target's context.  Rows are padded on the right; values after padding
    are meaningless.
    """
    batch, size = input_ids.shape
    device = input_ids.device
    chunk = min(chunk, size)
    out = input_ids.new_full((batch, size, depth), -1)
    cache = target.new_cache(batch=batch, slots=size + chunk * (depth - 1))
    for begin in range(0, size, chunk):
        tokens = input_ids[:, begin : begin + chunk]
        cache.window.visible = begin + tokens.shape[1]
        _, logits = target.forward(chain(tokens), input_ids.new_full((batch,), begin), cache)
        out[:, begin : begin + chunk, 0] = logits.argmax(-1)
    for begin in range(0, size, chunk):
        position = torch.arange(begin, min(begin + chunk, size), device=device)
        count = len(position)
        for level in range(1, depth):
            first = size + (level - 1) * count
            cache.window.visible = first + count
            _, logits = target.run(
                out[:, position, level - 1],
                (position + level).expand(batch, -1),
                torch.arange(first, first + count, device=device).expand(batch, -1),
                partial(branch_mask, position, depth=level, text=size, slots=first + count),
                cache,
            )
            out[:, position, level] = logits.argmax(-1)
    is_end = torch.isin(out, torch.tensor(sorted(ends), dtype=out.dtype, device=device))
    ended = is_end.cumsum(-1) - is_end.long() > 0
    if target.context_length is not None:
        last_read = torch.arange(size, device=device)[:, None] + torch.arange(depth, device=device)
        ended = ended | (last_read >= target.context_length)
    return out.masked_fill(ended, -1)


def continued(
    target: Target, rows: list[Row], *, depth: int, ends: frozenset[int], batch_size: int
) -> Iterator[tuple[int, Row]]:
    """The rows with the target's continuations after each of their tokens, each with its index.

    They run, and are yielded, in batches of similar length, shortest first.
    """
    for batch in _batches_of_similar_length(rows, batch_size, target.vocab_size):
        ids = collate([rows[index] for index in batch])["input_ids"].to(target.device)
        after = continuations(target, ids, depth=depth, ends=ends).tolist()
        for index, own in zip(batch, after, strict=True):
            yield index, replace(rows[index], continuations=own[: len(rows[index].input_ids)])


def _batches_of_similar_length(rows: list[Row], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, in batches of at most MAX_LOGITS logits."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    while order:
        longest = len(rows[order[:batch_size][-1]].input_ids)
        size = min(batch_size, max(1, MAX_LOGITS // (min(longest, POSITIONS_PER_RUN) * vocabulary)))
        yield order[:size]
        order = order[size:]


def continue_rows(
    prompts: Iterator[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    depth: int,
    chunk: int,
    batch_size: int,
    limit: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: DistillProgress | None = None,
) -> Iterator[CompletedPrompt]:
    """The rows of `data.tokenized_rows` with `depth` tokens that the target writes greedily after each token.

    Rows are cut to `limit` and to the model's context.  `chunk` prompts are read at a time and their rows are batched
    by length, so prompts complete in another order.
    """
    progress = progress or DistillProgress()
    target = Target(model)
    limit = smallest(limit, target.context_length)
    ends = end_tokens(resolve(target.model, None, dict(ONE_TEXT)))
    reading: dict[str, Any] = {"template_kwargs": template_kwargs, "vocab_size": target.vocab_size}
    while part := list(islice(prompts, chunk)):
        owners: list[Prompt] = []  # the prompt of each row
        rows: list[Row] = []
        for prompt in part:
            own = tokenized_rows(prompt.record, tokenizer, prompt.where, **reading)
            rows += own if limit is None else [row.cut(limit) for row in own]
            owners += [prompt] * len(own)
        missing = Counter(prompt.number for prompt in owners)
        results: dict[int, dict[int, dict[str, Any]]] = {prompt.number: {} for prompt in owners}
        tokens: Counter[int] = Counter()
        for index, row in continued(target, rows, depth=depth, ends=ends, batch_size=batch_size):
            prompt = owners[index]
            assert row.continuations is not None
            new = sum(token >= 0 for one in row.continuations for token in one)
            progress.tokens += new
            tokens[prompt.number] += new
            missing[prompt.number] -= 1
            results[prompt.number][index] = {
                **row_labels(prompt),
                "input_ids": row.input_ids,
                "loss_mask": [int(trained) for trained in row.trained],
                "continuations": row.continuations,
            }
            if not missing[prompt.number]:
                complete = [result for _, result in sorted(results[prompt.number].items())]
                counts = Counter(rows=len(complete), tokens=tokens[prompt.number])
                yield CompletedPrompt(prompt, complete, counts)
