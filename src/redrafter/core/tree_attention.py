"""Attention of a draft tree's nodes over a cache of slots, for unmodified models of transformers.

Promises what softmax attention under `tree_mask` gives, up to rounding, from a mask that says each row's length, each
node's depth and its ancestors as bits, so that neither the mask nor the work grows with the slots allocated.
`reference` is the plain way and the law; on CUDA devices with triton the kernels of `redrafter.kernels.triton` are used,
which a CUDA graph can hold while rows grow.  Does not know models: after `register()` transformers calls it in layers.
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
"""What transformers knows this attention by, once registered."""
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling, int? window, float? softcap, Tensor? sinks)"
    " -> Tensor"
)
_BITS = 32  # used of each word: the sum of all is then positive, whatever is set


def packed(tree: DraftTree, length: Int[Tensor, " B"]) -> Int64[Tensor, "B 1 N words"]:
    """A tree's mask in few numbers: the row's length, the node's depth, then its ancestors' bits, 32 to a word.

    Asks the device nothing, so a CUDA graph can hold it.
    """
    batch, size = tree.depth.shape
    bits = nn.functional.pad(tree.ancestors, (0, -size % _BITS)).view(batch, size, -1, _BITS)
    words = (bits << torch.arange(_BITS, device=length.device)).sum(dim=-1)
    own = length[:, None, None].expand(-1, size, 1)
    return torch.cat((own, tree.depth[..., None], words), dim=-1)[:, None]


def unpacked(mask: Int64[Tensor, "B 1 N words"]) -> tuple[DraftTree, Int[Tensor, " B"]]:
    """The tree and the lengths of a packed mask; tokens, parents and what is valid it does not say."""
    size = mask.shape[2]
    depth = mask[:, 0, :, 1]
    bits = mask[:, 0, :, 2:, None] >> torch.arange(_BITS, device=mask.device) & 1
    ancestors = bits.bool().flatten(2)[..., :size]
    nothing = torch.zeros_like(depth)
    return DraftTree(nothing, nothing, depth, depth >= 0, ancestors), mask[:, 0, 0, 0]


def tree_attention(
    query: Float[Tensor, "B Hq N D"],
    key: Float[Tensor, "B Hkv S D"],
    value: Float[Tensor, "B Hkv S Dv"],
    mask: Int64[Tensor, "B 1 N words"],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
) -> Float[Tensor, "B N Hq Dv"]:
    """Each node attends to its row's committed slots, its ancestors and itself, at slot length + node.

    `mask` is `packed`'s.  `window`: only positions at most `window - 1` back.  `softcap`: logits become
    cap·tanh(logit / cap).  `sinks`: a logit of each head that takes weight and gives nothing.
    """
    return _operator(query, key, value, mask, scaling, window, softcap, sinks)  # type: ignore[no-any-return]


def reference(
    query: Float[Tensor, "B Hq N D"],
    key: Float[Tensor, "B Hkv S D"],
    value: Float[Tensor, "B Hkv S Dv"],
    mask: Int64[Tensor, "B 1 N words"],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
) -> Float[Tensor, "B N Hq Dv"]:
    """As `tree_attention`, by the dense mask."""
    tree, length = unpacked(mask)
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
    """What transformers calls in a layer: tree attention for a packed mask, for any other what sdpa would give.

    Unlike sdpa it heeds `softcap` and the sinks `s_aux` there too.  Raises RedrafterError for a packed mask with what
    it does not compute.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        if dropout or kwargs.get("position_bias") is not None:
            raise RedrafterError(f"Tree attention has neither dropout nor biases, which {type(module).__name__} asks.")
        told = {"scaling": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
        return tree_attention(query, key, value, attention_mask, **told), None  # type: ignore[arg-type]
    if softcap is None and s_aux is None:
        forward = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise RedrafterError(f"For training, load {type(module).__name__} with attn_implementation='eager'.")
    if attention_mask is None:  # transformers leaves out a mask that says no more than this
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        if query.shape[2] > 1:
            attention_mask = attention_mask.tril()
    return _dense(query, key, value, attention_mask, scaling, softcap, s_aux), None


def register() -> None:
    """Makes `attn_implementation=NAME` known to transformers; to do so again changes nothing."""
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
    """One opaque operator to torch.compile."""
    if not has_kernels(query.device, query.dtype):
        return reference(query, key, value, mask, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    from redrafter.kernels.triton.attention import launch

    with torch.cuda.device_of(query):  # a model may be spread over several
        return launch(query, key, value, mask, scaling, window, softcap, sinks)


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, nodes, _size = query.shape
    return query.new_empty((batch, nodes, heads, value.shape[-1]))


def _without(value: Float[Tensor, "B Hkv S Dv"], unwritten: Bool[Tensor, "B S"]) -> Float[Tensor, "B Hkv S Dv"]:
    """What nobody wrote may be NaN, which weight 0 does not take away."""
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
    """Softmax attention in float32 or more under a mask that is bool or added to the logits, [..., N, S]."""
    batch, _, nodes, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, N, D]
    logits = (grouped @ key.to(wide)[:, :, None].mT).flatten(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    least = torch.finfo(wide).min  # finite, so that padding that sees nothing becomes no NaN
    logits = torch.where(mask, logits, least) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        extra = sinks.to(wide)[None, :, None, None].expand(batch, -1, nodes, 1)
        logits = torch.cat((logits, extra), dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[2]].unflatten(1, (key.shape[1], -1))
    out: Tensor = (weights @ value.to(wide)[:, :, None]).flatten(1, 2)
    return out.transpose(1, 2).to(query.dtype).contiguous()
