"""The sizes of an engine: draft shapes by load, the longest text, and how much of prompts to read beside a step."""

from __future__ import annotations

import math

from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.decoding.step import Decoder
from redrafter.proposers import Method
from redrafter.proposers.base import resolved_shape
from redrafter.targets.target import Target
from redrafter.utils.memory import memory_left

READ_TOKENS = (64, 512)
"""Least and most prompt tokens that are read between two steps of other requests, unless the caller sets them."""

READ_OPERATIONS = 1e12
"""Multiplications for these tokens, roughly what a server GPU does in the time in which a step reads the weights."""

MEMORY_SHARE = 0.8
"""Share of the memory that is left for keys and values if `max_length` is not given."""


def decoders_for(
    target: Target, method: Method | None, shape: DraftShape | None, slots: int, lookup: bool | None = None
) -> dict[int, Decoder]:
    """Decoders by the smallest number of requests that they are meant for."""
    overrides = ShapeOverrides(lookup=lookup)
    if method is None:
        return {1: Decoder(target, None)}
    last = shape or resolved_shape(method, 1, overrides)
    first = Decoder(target, method.proposer(target, last))
    decoders = {1: first}
    with_memory = first.proposer is not None and first.proposer.memory(batch=1, slots=1) is not None
    if shape is not None or with_memory:  # a memory belongs to one shape
        return decoders
    for rows in (1 << bit for bit in range(1, slots.bit_length())):
        tuned = resolved_shape(method, rows, overrides)
        if tuned.model_copy(update={"batch": 1}) != last.model_copy(update={"batch": 1}):
            decoders[rows], last = Decoder(target, method.proposer(target, tuned)), tuned
    return decoders


def describe_decoder(decoder: Decoder) -> str:
    """How it drafts, in words."""
    if decoder.proposer is None:
        return "none"
    return f"a tree of {decoder.size} nodes, up to {decoder.length} tokens deep"


def tokens_beside_steps(target: Target) -> int:
    """Prompt tokens that delay a step little: a power of two."""
    weights = sum(weight.numel() for weight in target.model.parameters())
    tokens = 1 << int(math.log2(max(1.0, READ_OPERATIONS / max(1, weights))))
    return min(max(tokens, READ_TOKENS[0]), READ_TOKENS[1])


def longest_text(target: Target, slots: int) -> int:
    """The longest text for which every slot has room in the memory that is left, up to the model's context."""
    left = memory_left(target.device)
    context = target.context_length or 4096
    if left is None:
        return context
    return max(1, min(context, int(MEMORY_SHARE * left) // (slots * sum(one.token_bytes for one in target.shapes))))
