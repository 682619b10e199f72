"""An EAGLE head: one transformer layer that continues the target's features, position by position.

Papers: EAGLE (arXiv 2401.15077) for inputs and outputs, EAGLE-2 (arXiv 2406.16858) for the trees.  The target's feature
at a position is the input of its output head there.  From a feature and the token that follows, the head predicts the
next feature, whose tokens the target's own output head scores.  Guarantees one definition of that step (`forward`),
which training and drafting share.  The layer is the unmodified Llama layer of transformers.  Does not know trees or the
target's forward pass; the token embedding and the output head belong to the target and are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from redrafter.core.cache import LayerShape, SlotCache
from redrafter.core.tree_attention import NAME, register
from redrafter.heads.base import Head
from redrafter.heads.config import HeadConfig
from redrafter.targets.target import Target, packed_mask


class EagleConfig(HeadConfig):
    """Shape, origin and decoding defaults of an EAGLE head.

    The layer is as wide as the target; `intermediate_size`, the numbers of heads, `rms_norm_eps` and `rope_theta`
    belong to the layer.  `coupled`: when sampling, drafts are ranked by the target's sampling noise too, as with all
    methods here; without it, by the head's probabilities alone, as published.
    """

    kind: ClassVar[str] = "an EAGLE head"

    model_type: Literal["redrafter_eagle"] = "redrafter_eagle"
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10_000.0
    draft_vocab_size: None = None
    coupled: bool = True

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be an even multiple of num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self

    @property
    def weights_description(self) -> str:
        """The layer and its heads."""
        heads = f"{self.num_attention_heads} heads of {self.hidden_size // self.num_attention_heads}"
        return f"one transformer layer, {heads}, {self.intermediate_size:,} wide inside"

    @property
    def context_description(self) -> str:
        """What the head reads of the target."""
        return f"{super().context_description}, at every position"


class EagleHead(Head):
    """The weights of the head and its step."""

    config: EagleConfig
    config_type = EagleConfig
    reads_text = True

    def __init__(self, config: EagleConfig):
        """Random weights."""
        super().__init__(config)
        register()
        shape = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation=NAME,
        )
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.layer = LlamaDecoderLayer(shape, layer_idx=0)
        self._rotaries: dict[torch.device, LlamaRotaryEmbedding] = {}
        """Rotary frequencies by device.  They are not part of the module, which may be converted to half precision."""

    @classmethod
    def fresh(cls, model: nn.Module, **config: Any) -> EagleHead:
        """An untrained head for a target, on its device, in float32, whose layer has the shape of the target's layers.

        `config` holds further fields of `EagleConfig`, such as `beam_width` or `beam_length`.
        """
        target = Target(model)
        layer, size = target.config, target.hidden_size
        heads = math.gcd(size // 2, getattr(layer, "num_attention_heads", None) or 1)  # each of an even size
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        rope = getattr(layer, "rope_parameters", None) or {}
        return cls(
            EagleConfig(
                **cls.fields_of(target),
                intermediate_size=getattr(layer, "intermediate_size", None) or 4 * size,
                num_attention_heads=heads,
                num_key_value_heads=math.gcd(heads, kv_heads),
                rope_theta=rope.get("rope_theta", 10_000.0),
                **config,
            )
        ).to(target.device)

    def new_cache(self, *, batch: int, slots: int) -> SlotCache:
        """A cache for the keys and values of the layer."""
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        shape = LayerShape(config.num_key_value_heads, size, size, self.dtype, self.device)
        return SlotCache([shape], batch=batch, slots=slots)

    def forward(
        self,
        embeddings: Float[Tensor, "B Q hidden"],
        features: Float[Tensor, "B Q hidden"],
        position: Int[Tensor, "B Q"],
        mask: Tensor,
        cache: Any,
    ) -> Float[Tensor, "B Q hidden"]:
        """The next features, from the features at some positions and the embeddings of the tokens after them.

        `mask` is a packed mask (`core.tree_attention`) or a bool mask [B, 1, Q, S] over the slots of `cache`.
        """
        x = self.fc(torch.cat((embeddings.to(features.dtype), features), dim=-1))
        if x.device not in self._rotaries:
            self._rotaries[x.device] = LlamaRotaryEmbedding(self.layer.self_attn.config).to(x.device)
        found = self.layer(
            x,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self._rotaries[x.device](x, position_ids=position),
        )
        return found  # type: ignore[no-any-return]

    def over_rows(
        self,
        embed: Callable[[Tensor], Tensor],
        hidden: Float[Tensor, "B P state"],
        input_ids: Int[Tensor, "B P"],
        segments: Int[Tensor, "B P"] | None,
        length: int,
    ) -> Float[Tensor, "length B P hidden"]:
        """See `Head.over_rows`.

        The first step reads the target's features.  Each later step reads the features predicted by the previous step;
        it attends to the earlier steps of its own window and to the target's features before the window (the
        training-time test of EAGLE-3, arXiv 2503.01840).
        """
        batch, size = input_ids.shape
        index = torch.arange(size, device=hidden.device)
        segments = torch.ones_like(input_ids) if segments is None else segments
        text = packed_mask(segments, index.expand(batch, size))
        embeddings = embed(nn.functional.pad(input_ids[:, 1:], (0, 1))).to(self.dtype)
        features = hidden[..., -self.config.hidden_size :].to(self.dtype)
        position, keys, found = index.expand(batch, size), DynamicCache(), []
        for step in range(length):  # the step at position s belongs to the window that begins at s - step
            begun = nn.functional.pad(text, (0, 0, step, 0))[:, :size]
            own = [(index[:, None] - step + earlier == index).expand(batch, -1, -1) for earlier in range(1, step + 1)]
            mask = torch.cat((begun, *own), dim=-1)[:, None]
            features = self(embeddings, features, position, mask, keys)
            found.append(features)
            features = nn.functional.pad(features[:, :-1], (0, 0, 1, 0))
        return torch.stack(found)
