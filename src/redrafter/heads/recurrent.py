"""The recurrent drafter: a small head that continues from the target's last hidden state.

Paper: arXiv 2403.09919, section 3.1.  The variants and tensor names are those of Apple's released code.  Guarantees one
definition of the recurrence (`step`) and of the head (`logits`), which training and beam search share.  Does not know
beams, trees or the target's forward pass.  The token embedding belongs to the target and is passed in, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from redrafter.heads.base import Head
from redrafter.heads.config import HeadConfig
from redrafter.kernels.activation import silu_add
from redrafter.targets.target import Target


class DrafterConfig(HeadConfig):
    """Shape, origin and decoding defaults of a recurrent drafter.

    `exit_dim` is the width of the head's residual blocks (default, as in the paper: 2 × hidden size),
    `num_draft_layers` their number.  `rnn=False` replaces the recurrence by a running sum of embeddings; `gated` adds a
    gate to it. `context_layers` are numbers of target layers, from 1, whose outputs the drafter reads in addition to
    the last hidden state; `context_positions` is the number of last positions at which it reads them.
    """

    kind: ClassVar[str] = "a recurrent drafter"

    model_type: Literal["recurrent_drafting_drafter"] = "recurrent_drafting_drafter"
    exit_dim: PositiveInt
    num_draft_layers: int
    rnn: bool = True
    gated: bool = False
    context_layers: tuple[PositiveInt, ...] = ()
    context_positions: PositiveInt = 1

    @model_validator(mode="before")
    @classmethod
    def _released_defaults(cls, values: Any) -> Any:
        """Adds the defaults of the released training script: two blocks, exit_dim 2H."""
        if isinstance(values, dict):
            values = {"num_draft_layers": 2, **values}
            if values.get("exit_dim") is None and isinstance(values.get("hidden_size"), int):
                values["exit_dim"] = 2 * values["hidden_size"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_draft_layers < 0:
            raise ValueError("num_draft_layers cannot be negative")
        if self.gated and not self.rnn:
            raise ValueError("a gate needs the recurrence")
        return self

    @property
    def context_size(self) -> int:
        """Size of the features that a draft reads: the hidden states of all layers and positions."""
        return self.context_positions * (1 + len(self.context_layers)) * self.hidden_size

    @property
    def weights_description(self) -> str:
        """The recurrence and the blocks."""
        step = "one recurrent step" if self.rnn else "a running sum of embeddings"
        gate = ", gated" if self.gated else ""
        return f"{step}{gate}, {self.num_draft_layers} blocks of width {self.exit_dim:,}"

    @property
    def context_description(self) -> str:
        """What the drafter reads of the target."""
        seen = ", ".join([super().context_description, *(f"layer {number}" for number in self.context_layers)])
        return f"{seen}, at {self.context_positions} positions" if self.context_positions > 1 else seen

    def to_json(self) -> str:
        """The text of `config.json`, without the fields that have their published default."""
        published = {"gated": False, "context_layers": (), "context_positions": 1, "shapes": ()}
        unset = {name for name, value in published.items() if getattr(self, name) == value}
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unset) + "\n"


class ResidualBlock(nn.Module):
    """`x + SiLU(Linear(x))`."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """The output has the shape of the input."""
        return silu_add(self.linear(x), residual=x)


class RecurrentDrafter(Head):
    """The weights of the drafter and its two formulas."""

    config: DrafterConfig
    config_type = DrafterConfig

    def __init__(self, config: DrafterConfig):
        """Random weights; `draft_vocabulary` starts as the first ids."""
        super().__init__(config)
        hidden, width = config.hidden_size, config.exit_dim
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        if config.gated:
            self.gate_u = nn.Linear(hidden, hidden)
            self.gate_w = nn.Linear(hidden, hidden, bias=False)
        if config.context_size != hidden:
            self.fuse = nn.Linear(config.context_size, hidden)
            for parameter in self.fuse.parameters():  # training starts from the paper's context
                nn.init.zeros_(parameter)
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        self.lm_head = nn.Sequential(
            *(ResidualBlock(width) for _ in range(config.num_draft_layers)),
            nn.Linear(width, config.head_size, bias=False),
        )

    @classmethod
    def for_target(
        cls,
        model: nn.Module,
        *,
        draft_vocabulary: Int[Tensor, " draft"] | None = None,
        context_layers: Sequence[int] = (),
        **config: Any,
    ) -> RecurrentDrafter:
        """An untrained drafter for a target, on its device, in float32.

        `draft_vocabulary` holds the ids of the target's vocabulary that may be drafted; default: all.  `config` holds
        further fields of `DrafterConfig`, such as `exit_dim`, `num_draft_layers`, `beam_width` or `beam_length`.
        """
        target = Target(model, context_layers)
        drafter = cls(
            DrafterConfig(
                **cls.fields_of(target),
                draft_vocab_size=None if draft_vocabulary is None else len(draft_vocabulary),
                context_layers=tuple(context_layers),
                **config,
            )
        ).to(target.device)
        if draft_vocabulary is not None:
            drafter.draft_only(draft_vocabulary, target)
        return drafter

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the target's layers that it reads in addition to the last hidden state."""
        return self.config.context_layers

    @property
    def positions(self) -> int:
        """Number of last positions whose states it reads."""
        return self.config.context_positions

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """See `Head.unrolled`: the recurrence over the true tokens."""
        states: list[Tensor] = []
        for embedding in embeddings.unbind(1):
            states.append(self.step(states[-1] if states else None, embedding))
        context = self.context(features)[:, None].expand_as(embeddings)
        return self.logits(context, torch.stack(states, dim=1))

    def step(
        self, state: Float[Tensor, "*batch hidden"] | None, embedding: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """One step of the recurrence.  `None` is the state before the first token, which is zero.

        `s_t = SiLU(W e_t + U s_{t-1} + b)`, or `s_t = s_{t-1} + e_t` without recurrence.  With a gate, `s_t` moves from
        `s_{t-1}` towards that value by the fraction `sigmoid(W' e_t + U' s_{t-1} + b')`.
        """
        if not self.config.rnn:
            return embedding if state is None else state + embedding
        if state is None:
            moved = silu_add(nn.functional.linear(embedding, self.rnn_w.weight, self.rnn_u.bias))
        else:
            moved = silu_add(self.rnn_w(embedding), self.rnn_u(state))
        if not self.config.gated:
            return moved
        gate = torch.sigmoid(self.gate_w(embedding) + (self.gate_u.bias if state is None else self.gate_u(state)))
        return gate * moved if state is None else state + gate * (moved - state)

    def context(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch hidden"]:
        """The head's view of the target, computed once per draft: its last hidden state, as published.

        `features` are the hidden states of the last `context_positions` positions, oldest first, each of
        `context_layers` and then the input of the output head; zeros before a text begins.  If there is more than one,
        a linear map of all of them, each divided by its root mean square, is added to the last.
        """
        if not hasattr(self, "fuse"):
            return features
        size = self.config.hidden_size
        normalized = nn.functional.rms_norm(features.unflatten(-1, (-1, size)), (size,)).flatten(-2)
        return features[..., -size:] + self.fuse(normalized)  # type: ignore[no-any-return]

    def logits(
        self,
        context: Float[Tensor, "*batch hidden"],
        state: Float[Tensor, "*batch hidden"],
        read: Float[Tensor, "B 1 exit"] | None = None,
    ) -> Float[Tensor, "*batch head"]:
        """Scores of the next token over the draft vocabulary, from `context` and the recurrent state.

        `read`: the result of `self.read(context)`, so that a context that is used repeatedly is multiplied once.
        """
        layer = self.reader
        if read is None or layer is None:
            x = torch.cat((context, state), dim=-1)
            return self.lm_head(x if self.begins_with_block else self.input_proj(x))  # type: ignore[no-any-return]
        first = nn.functional.linear(state, layer.weight[:, self.config.hidden_size :]) + read
        seen = self.seen(context, state)
        return self.scores(first if seen is None else silu_add(first, residual=seen))

    def seen(
        self, context: Float[Tensor, "*batch hidden"], state: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch both"] | None:
        """Context and state, concatenated, if the head begins with a residual block; otherwise None."""
        return torch.cat((context, state), dim=-1) if self.begins_with_block else None

    def scores(self, first: Float[Tensor, "*batch exit"]) -> Float[Tensor, "*batch head"]:
        """`logits` from the output of the head's projection or, without one, of its first block."""
        x: Tensor = first.flatten(0, -2)  # linear layers would copy a slice with more dimensions
        for module in list(self.lm_head)[int(self.begins_with_block) :]:
            x = module(x)
        return x.unflatten(0, first.shape[:-1])  # type: ignore[no-any-return]

    def read(self, context: Float[Tensor, "B 1 hidden"]) -> Float[Tensor, "B 1 exit"] | None:
        """The context's half of the head's first product, with bias; None if the head is that product alone."""
        layer = self.reader
        if layer is None:
            return None
        return nn.functional.linear(context, layer.weight[:, : self.config.hidden_size], layer.bias)

    @property
    def begins_with_block(self) -> bool:
        """Whether context and state enter the first block directly, without a projection."""
        return not hasattr(self, "input_proj")

    @property
    def reader(self) -> nn.Linear | None:
        """The layer that reads context and state; None if it is the output layer."""
        if not self.begins_with_block:
            return self.input_proj
        return self.lm_head[0].linear if self.config.num_draft_layers else None  # type: ignore[return-value]
