"""An EAGLE head: one transformer layer that continues the target's features, position by position.

Papers: EAGLE (arXiv 2401.15077), whose inputs and outputs these are; EAGLE-2 (arXiv 2406.16858) for the trees that are
drafted.  The target's feature at a position is what its output head reads there; from that and the token that follows
the head predicts the next feature, whose tokens the target's own output head scores.  Promises one definition of that
step (`forward`), which training and drafting both call; the layer is Llama's of transformers, unmodified.  Does not
know trees or the target's forward pass; the token embedding and the output head are the target's, never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

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
from redrafter.targets.isolation import isolated
from redrafter.targets.target import packed_mask

if TYPE_CHECKING:
    from redrafter.proposers.eagle import EagleProposer
    from redrafter.targets.target import Target


class EagleConfig(HeadConfig):
    """Shape, origin and decoding defaults of an EAGLE head.

    Its one layer is as wide as the target: `intermediate_size`, the numbers of heads, `rms_norm_eps` and `rope_theta`
    are that layer's.  With a `node_budget` drafts are the so many most probable nodes (EAGLE-2), not whole beams.
    `coupled`: when sampling, drafts are ranked by the noise that the target is about to draw with too, as all methods
    do here; without it, as published, by the head's probabilities alone.
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
    def weights_in_words(self) -> str:
        """The layer."""
        heads = f"{self.num_attention_heads} heads of {self.hidden_size // self.num_attention_heads}"
        return f"one transformer layer, {heads}, {self.intermediate_size:,} wide inside"

    @property
    def context_in_words(self) -> str:
        """What the head sees of the target."""
        return f"{super().context_in_words}, at every position"


class EagleHead(Head):
    """The head's weights and its step."""

    config: EagleConfig
    config_type = EagleConfig
    reads_text = True

    def __init__(self, config: EagleConfig):
        """Random weights of the shape that `config` says."""
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
        """Its angles' frequencies on each device; no part of the module, which may be converted to half precision."""

    @classmethod
    def fresh(
        cls, model: nn.Module, *, beam_length: int = 4, beam_width: int = 10, node_budget: int | None = None
    ) -> EagleHead:
        """A fresh head for a target, on its device, in float32; its layer has the shape of the target's own."""
        from redrafter.targets.target import Target

        target = Target(model)
        told, size = target.config, target.hidden_size
        heads = math.gcd(size // 2, getattr(told, "num_attention_heads", None) or 1)  # of an even size each
        kept = getattr(told, "num_key_value_heads", None) or heads
        rope = getattr(told, "rope_parameters", None) or {}
        return cls(
            EagleConfig(
                vocab_size=target.vocab_size,
                hidden_size=size,
                intermediate_size=getattr(told, "intermediate_size", None) or 4 * size,
                num_attention_heads=heads,
                num_key_value_heads=math.gcd(heads, kept),
                rope_theta=rope.get("rope_theta", 10_000.0),
                target=target.name,
                target_revision=target.revision,
                target_fingerprint=target.fingerprint() or None,
                beam_length=beam_length,
                beam_width=beam_width,
                node_budget=node_budget,
            )
        ).to(target.device)

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> EagleProposer | None:
        """What drafts so for a target; None for a length of 0.

        Raises RedrafterError where the head was made for another model, is elsewhere or cannot draft so.
        """
        from redrafter.proposers.eagle import EagleProposer

        self.check(target, width, length, budget)
        return EagleProposer(isolated(self), target, width, length, budget) if length else None

    def new_cache(self, *, batch: int, slots: int) -> SlotCache:
        """Memory for its layer's keys and values."""
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
        """The features that follow, from those at some positions and the tokens after each.

        `mask` is what the layer's attention takes: a packed one, or a bool one [B, 1, Q, S] over what `cache` holds.
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
        """As `Head.over_rows`: every window's features, unrolled as drafts are.

        The first step reads the target's features; each later one reads those that the step before predicted, and
        beside them its own window's earlier steps and the target's features up to where that window begins (the
        training-time test of EAGLE-3, arXiv 2503.01840).
        """
        batch, size = input_ids.shape
        index = torch.arange(size, device=hidden.device)
        segments = torch.ones_like(input_ids) if segments is None else segments
        text = packed_mask(segments, index.expand(batch, size))
        embeddings = embed(nn.functional.pad(input_ids[:, 1:], (0, 1))).to(self.dtype)
        features = hidden[..., -self.config.hidden_size :].to(self.dtype)
        position, keys, found = index.expand(batch, size), DynamicCache(), []
        for step in range(length):  # the step at position s is that of the window which begins at s - step
            begun = nn.functional.pad(text, (0, 0, step, 0))[:, :size]
            own = [(index[:, None] - step + earlier == index).expand(batch, -1, -1) for earlier in range(1, step + 1)]
            mask = torch.cat((begun, *own), dim=-1)[:, None]
            features = self(embeddings, features, position, mask, keys)
            found.append(features)
            features = nn.functional.pad(features[:, :-1], (0, 0, 1, 0))
        return torch.stack(found)
