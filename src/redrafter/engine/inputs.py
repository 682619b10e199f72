"""Prompts as lists of token ids: reads tensors, arrays and lists, removes padding and checks every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from redrafter.decoding.settings import plain
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target


def read_prompts(target: Target, config: GenerationConfig, input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """The rows of `input_ids` without padding.  Raises RedrafterError for rows that the model cannot continue."""
    prompts = _unpadded(config, _tensor(input_ids), _tensor(attention_mask))
    if not prompts:
        raise RedrafterError("There is no prompt.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise RedrafterError(f"The prompt of row {row} is empty; give it at least one token.")
        if target.context_length is not None and len(prompt) > target.context_length:
            raise RedrafterError(
                f"The prompt of row {row} has {len(prompt)} tokens, the model's context {target.context_length}."
            )
        if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
            raise RedrafterError(f"The prompt of row {row} holds ids outside the vocabulary of {target.vocab_size}.")
    return prompts


def check_padding(rows: list[list[int]], pad: int | None, input_ids: Any) -> None:
    """Raises RedrafterError for rows of a list that look padded with `pad`, because a list has no attention mask."""
    if isinstance(input_ids, Tensor | np.ndarray) or pad is None or len({len(row) for row in rows}) != 1:
        return
    for end in (0, -1):
        padded = [row[end] == pad for row in rows]
        if any(padded) and not all(padded):
            raise RedrafterError(
                f"Row {padded.index(True)} of input_ids looks padded with token {pad}, and a list has no attention "
                "mask: give the rows without padding, or tensors of input_ids and attention_mask."
            )


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """The end tokens of a config.  Raises RedrafterError for values that are not token ids."""
    ids = config.eos_token_id
    if ids is None:
        return frozenset()
    try:
        several = isinstance(ids, Sequence) or (isinstance(ids, Tensor) and ids.ndim)
        return frozenset(map(index, ids if several else [ids]))
    except TypeError:
        raise RedrafterError(f"eos_token_id must be a token id, or several, not {ids!r}.") from None


def padding_token(config: GenerationConfig) -> int:
    """The token that pads finished rows: as in transformers, an end token if there is no padding token."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = plain(config.eos_token_id)
    first = ends[0] if isinstance(ends, Sequence) and ends else ends
    return 0 if first is None or isinstance(first, Sequence) else int(first)


def _tensor(value: Any) -> Any:
    """Converts a NumPy array to a tensor; an array of objects becomes a list."""
    try:
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    except TypeError:
        return list(value)


def _unpadded(config: GenerationConfig, input_ids: Any, attention_mask: Any) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise RedrafterError("An attention mask goes with a tensor of input ids, not with a list of rows.")
        return [_row(number, row) for number, row in enumerate(_rows(input_ids))]
    if input_ids.ndim != 2:
        raise RedrafterError(f"input_ids must have two dimensions, rows and tokens, not {input_ids.ndim}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise RedrafterError(f"input_ids must be integers, not {str(input_ids.dtype).removeprefix('torch.')}.")
    inferred = attention_mask is None
    if attention_mask is None:
        attention_mask = _inferred_mask(config, input_ids)
    if not isinstance(attention_mask, Tensor):
        raise RedrafterError(f"The attention mask must be a tensor, not {type(attention_mask).__name__}.")
    if attention_mask.shape != input_ids.shape:
        raise RedrafterError(
            f"The attention mask has shape {tuple(attention_mask.shape)}; input_ids have {tuple(input_ids.shape)}."
        )
    kept = attention_mask.bool()
    framed = torch.nn.functional.pad(kept.int(), (1, 1))
    if bool((framed.diff(dim=1).abs().sum(dim=1) > 2).any()) or (inferred and not bool(kept.any(dim=1).all())):
        if inferred:
            raise RedrafterError(
                f"A row of input_ids holds the padding token {config.pad_token_id} between other tokens, or nothing "
                "else: pass attention_mask, which says what is padding."
            )
        raise RedrafterError("The attention mask has holes: pad each row at one or both ends only.")
    return [row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)]


def _inferred_mask(config: GenerationConfig, input_ids: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """As in transformers, padding tokens are masked unless the padding token is an end token too.

    Rows of one token have no padding.
    """
    if config.pad_token_id is None or int(config.pad_token_id) in end_tokens(config) or input_ids.shape[1] == 1:
        return torch.ones_like(input_ids)
    return (input_ids.long() != int(config.pad_token_id)).long()


def _rows(input_ids: Any) -> list[Any]:
    if isinstance(input_ids, str | Mapping):
        raise RedrafterError(f"input_ids must be rows of token ids, not a {type(input_ids).__name__}.")
    try:
        return list(input_ids)
    except TypeError:
        raise RedrafterError(f"input_ids must be rows of token ids, not {input_ids!r}.") from None


def _row(number: int, row: Any) -> list[int]:
    try:
        return [index(token) for token in row]
    except TypeError:
        raise RedrafterError(f"Row {number} of input_ids must hold integers, not be {row!r}.") from None
