"""Attention of a draft tree's nodes over a slot cache, for unmodified transformers models.

Guarantees softmax attention under `tree_mask`, up to rounding.  The mask is passed as a bit mask: each row's length,
each node's depth and its ancestors as bits, so that neither the mask nor the work grows with the allocated slots.
`reference` is the definition; on CUDA devices with Triton the kernels of `redrafter.kernels.triton.attention` run,
which a CUDA graph can contain while rows grow.  Does not know models: after `register()`, transformers calls it in the
layers.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from redrafter.core.tree import DraftTree, tree_mask
from redrafter.errors import RedrafterError
from redrafter.kernels import has_kernels

NAME = "redrafter"
"""The name of this attention implementation in transformers."""

MAX_ATTENTION_NODES = 256
"""The largest tree that the kernels support; longer chunks of a prompt use a dense mask."""

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling, int? window, float? softcap, Tensor? sinks)"
    " -> Tensor"
)
_BITS = 32  # per word, so that the sum stays positive


def bit_mask(
    tree: DraftTree, length: Int[Tensor, " B"], rows: Int[Tensor, " B"] | None = None
) -> Int64[Tensor, "B 1 N words"]:
    """A tree's mask as integers: the row's length, the node's depth, the row's row in the cache (`rows`; default: its
    own number), then the node's ancestors as bits, 32 per word.

    Does not synchronize with the device, so a CUDA graph can contain it.
    """
    batch, size = tree.depth.shape
    bits = nn.functional.pad(tree.ancestors, (0, -size % _BITS)).view(batch, size, -1, _BITS)
    words = (bits << torch.arange(_BITS, device=length.device)).sum(dim=-1)
    own = length[:, None, None].expand(-1, size, 1)
    cached = torch.arange(batch, device=length.device) if rows is None else rows
    return torch.cat((own, tree.depth[..., None], cached[:, None, None].expand(-1, size, 1), words), dim=-1)[:, None]


def from_bit_mask(
    mask: Int64[Tensor, "B 1 N words"],
) -> tuple[DraftTree, Int[Tensor, " B"], Int[Tensor, " B"]]:
    """The tree, lengths and cache rows of a bit mask, without tokens, parents and validity."""
    size = mask.shape[2]
    depth = mask[:, 0, :, 1]
    bits = mask[:, 0, :, 3:, None] >> torch.arange(_BITS, device=mask.device) & 1
    ancestors = bits.bool().flatten(2)[..., :size]
    nothing = torch.zeros_like(depth)
    return DraftTree(nothing, nothing, depth, depth >= 0, ancestors), mask[:, 0, 0, 0], mask[:, 0, 0, 2]


def tree_attention(
    query: Float[Tensor, "B Hq N D"],
    key: Float[Tensor, "R Hkv S D"],
    value: Float[Tensor, "R Hkv S Dv"],
    mask: Int64[Tensor, "B 1 N words"],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
) -> Float[Tensor, "B N Hq Dv"]:
    """Each node attends to its row's committed slots, its ancestors and itself; node n is at slot length + n.

    `mask` comes from `bit_mask`, which also says which of the R rows of `key` and `value` belong to each row.  `window`
    limits attention to positions at most `window - 1` back.  `softcap` replaces logits by cap·tanh(logit / cap).
    `sinks` is one logit per head that takes probability but contributes no value.
    """
    return _operator(query, key, value, mask, scaling, window, softcap, sinks)  # type: ignore[no-any-return]


def reference(
    query: Float[Tensor, "B Hq N D"],
    key: Float[Tensor, "R Hkv S D"],
    value: Float[Tensor, "R Hkv S Dv"],
    mask: Int64[Tensor, "B 1 N words"],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
) -> Float[Tensor, "B N Hq Dv"]:
    """`tree_attention` in PyTorch, with the dense mask."""
    tree, length, rows = from_bit_mask(mask)
    key, value = key[rows], value[rows]
    visible = tree_mask(tree, length, slots=key.shape[2], window=window)
    written = torch.arange(key.shape[2], device=length.device) < length[:, None] + tree.size
    return _dense(query, key, _without(value, ~written), visible[:, None], scaling, softcap, sinks)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in a layer: tree attention for a bit mask, otherwise sdpa.

    Unlike sdpa, it supports `softcap` and the sinks `s_aux` for other masks too.  Raises RedrafterError for features
    that tree attention does not support.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        if dropout or kwargs.get("position_bias") is not None:
            raise RedrafterError(
                f"Tree attention supports neither dropout nor position biases, which {type(module).__name__} needs."
            )
        options = {"scaling": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
        return tree_attention(query, key, value, attention_mask, **options), None  # type: ignore[arg-type]
    if softcap is None and s_aux is None:
        forward = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise RedrafterError(f"For training, load {type(module).__name__} with attn_implementation='eager'.")
    if attention_mask is None:  # transformers omits a causal mask
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        if query.shape[2] > 1:
            attention_mask = attention_mask.tril()
    return _dense(query, key, value, attention_mask, scaling, softcap, s_aux), None


def register() -> None:
    """Registers `attn_implementation=NAME` with transformers.  Idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@torch.library.custom_op("redrafter::tree_attention", mutates_args=(), schema=_SCHEMA)
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One opaque operator for torch.compile."""
    if not has_kernels(query.device, query.dtype):
        return reference(query, key, value, mask, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    from redrafter.kernels.triton.attention import launch

    with torch.cuda.device_of(query):  # a model may be on several devices
        return launch(query, key, value, mask, scaling, window, softcap, sinks)


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, nodes, _size = query.shape
    return query.new_empty((batch, nodes, heads, value.shape[-1]))


def _without(value: Float[Tensor, "B Hkv S Dv"], unwritten: Bool[Tensor, "B S"]) -> Float[Tensor, "B Hkv S Dv"]:
    """Unwritten values may be NaN, which a weight of 0 would not remove."""
    return value.masked_fill(unwritten[:, None, :, None], 0)


def _dense(
    query: Float[Tensor, "B Hq N D"],
    key: Float[Tensor, "B Hkv S D"],
    value: Float[Tensor, "B Hkv S Dv"],
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " Hq"] | None,
) -> Float[Tensor, "B N Hq Dv"]:
    """Softmax attention in float32 or wider; the mask [..., N, S] is bool or additive."""
    batch, _, nodes, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, N, D]
    logits = (grouped @ key.to(wide)[:, :, None].mT).flatten(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    least = torch.finfo(wide).min  # finite: rows that see nothing must not become NaN
    logits = torch.where(mask, logits, least) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        extra = sinks.to(wide)[None, :, None, None].expand(batch, -1, nodes, 1)
        logits = torch.cat((logits, extra), dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[2]].unflatten(1, (key.shape[1], -1))
    out: Tensor = (weights @ value.to(wide)[:, :, None]).flatten(1, 2)
    return out.transpose(1, 2).to(query.dtype).contiguous()
