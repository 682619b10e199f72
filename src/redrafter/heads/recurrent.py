"""The recurrent drafter: a small head that continues the target's own last hidden state.

Paper: arXiv 2403.09919, section 3.1; the forms and tensor names are those of Apple's released code.  Promises one
definition of the recurrence (`step`) and of the head (`logits`), which training and beam search both call.  Does not
know beams, trees or the target's forward pass; the token embedding is the target's and is handed in, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from redrafter.engine.fused_linear import unchanged
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.heads.config import HeadConfig
from redrafter.heads.eight import EightBit
from redrafter.kernels.product import activated, fused, product
from redrafter.targets.isolation import isolated

if TYPE_CHECKING:
    from redrafter.proposers import RecurrentProposer
    from redrafter.targets.target import Target


class DrafterConfig(HeadConfig):
    """Shape, origin and decoding defaults of a recurrent drafter.

    `exit_dim` is the width of the head's blocks (paper: 2 × hidden size, the default).  `num_draft_layers` counts its
    residual blocks.  `rnn=False` replaces the recurrence by a running sum of embeddings, `gated` adds a gate to it.
    `context_layers` are numbers of target layers, from 1, whose outputs the drafter sees beside the last hidden state,
    `context_positions` the last positions at which it sees them.  With a `node_budget` drafts are the so many most
    probable nodes, not whole beams.
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
        """Fills in what the released training script takes when not told: exit_dim 2H, two blocks."""
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
        """Numbers that the target hands over for a draft: hidden states of layers and positions."""
        return self.context_positions * (1 + len(self.context_layers)) * self.hidden_size

    @property
    def weights_in_words(self) -> str:
        """The recurrence and the blocks."""
        step = "one recurrent step" if self.rnn else "a running sum of embeddings"
        gate = ", gated" if self.gated else ""
        return f"{step}{gate}, {self.num_draft_layers} blocks of width {self.exit_dim:,}"

    @property
    def context_in_words(self) -> str:
        """What the drafter sees of the target."""
        seen = ", ".join([super().context_in_words, *(f"layer {number}" for number in self.context_layers)])
        return f"{seen}, at {self.context_positions} positions" if self.context_positions > 1 else seen

    def to_json(self) -> str:
        """The text of `config.json`; what is not set is left out."""
        published = {"gated": False, "context_layers": (), "context_positions": 1, "shapes": ()}  # the paper's form
        unset = {name for name, value in published.items() if getattr(self, name) == value}
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unset) + "\n"


class ResidualBlock(nn.Module):
    """`x + SiLU(Linear(x))`."""

    def __init__(self, size: int):
        super().__init__()
        self.linear: nn.Linear | EightBit = nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Same shape out as in."""
        layer = self.linear
        scale = layer.scale if isinstance(layer, EightBit) else None
        own = scale is not None or unchanged(layer)  # an adapted layer's product is its own affair
        if not (own and fused(x, layer.weight, scale)):
            return activated(layer(x), onto=x)
        return product(x, layer.weight, layer.bias, scale=scale, onto=x, silu=True)


class RecurrentDrafter(Head):
    """The drafter's weights and its two formulas."""

    config: DrafterConfig
    config_type = DrafterConfig

    def __init__(self, config: DrafterConfig):
        """Random weights of the shape that `config` says; `draft_vocabulary` starts as the first ids."""
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
            for parameter in self.fuse.parameters():  # training begins with the paper's context
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
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        gated: bool = False,
        draft_vocabulary: Int[Tensor, " draft"] | None = None,
        context_layers: Sequence[int] = (),
        context_positions: int = 1,
        beam_length: int = 4,
        beam_width: int = 10,
        node_budget: int | None = None,
    ) -> RecurrentDrafter:
        """A fresh drafter for a target, on its device, in float32.

        `draft_vocabulary`: ids of the target's vocabulary that may be drafted, all of them by default;
        `gated`, `context_layers`, `context_positions`: see `DrafterConfig`.
        """
        from redrafter.targets.target import Target

        target = Target(model, context_layers)
        drafter = cls(
            DrafterConfig(
                vocab_size=target.vocab_size,
                hidden_size=target.hidden_size,
                exit_dim=exit_dim or 2 * target.hidden_size,
                num_draft_layers=num_draft_layers,
                rnn=rnn,
                gated=gated,
                draft_vocab_size=None if draft_vocabulary is None else len(draft_vocabulary),
                context_layers=tuple(context_layers),
                context_positions=context_positions,
                target=target.name,
                target_revision=target.revision,
                target_fingerprint=target.fingerprint() or None,
                beam_length=beam_length,
                beam_width=beam_width,
                node_budget=node_budget,
            )
        ).to(target.device)
        if draft_vocabulary is not None:
            drafter.draft_only(draft_vocabulary, target)
        return drafter

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        target: nn.Module | None = None,
        revision: str | None = None,
        any_target: bool = False,
        bits: int = 16,
    ) -> RecurrentDrafter:
        """Loads a drafter folder or hub repository, written by this package or by Apple's code.

        `target`, `revision` and `any_target` are those of `Head.from_pretrained`: with `target` the drafter takes that
        model's device and dtype, and a drafter that was made for another model is refused unless `any_target`.
        `bits`: 8 for a head as of `to_eight_bits`, 16 for one of the dtype that it has.
        Raises RedrafterError where the folder is incomplete, damaged or contradicts its own config.
        """
        if bits not in (16, 8):
            raise RedrafterError(f"A drafter is loaded in 16 or 8 bits, not {bits}.")
        drafter = super().from_pretrained(path, target=target, revision=revision, any_target=any_target)
        return drafter.to_eight_bits() if bits == 8 else drafter

    def to_eight_bits(self) -> RecurrentDrafter:
        """Rounds most of the head to weights of 8 bits (`redrafter.heads.eight`), in place; returns itself.

        These are the output layer and the residual blocks, but for a first block that reads context and state: its
        columns are multiplied apart.  They are most of what a draft reads, and on a GPU a draft of up to 16 beams takes
        less time.  No text depends on it, only how much of a draft is accepted.  Cannot be undone, so that such a
        drafter is neither saved nor trained.
        """
        if not self.has_eight_bits:
            *blocks, last = self.lm_head.children()
            for block in blocks:
                if block.linear is not self.reader:
                    block.linear = EightBit.of(block.linear)  # type: ignore[arg-type]
            self.lm_head[-1] = EightBit.of(last)  # type: ignore[arg-type]
        return self

    @property
    def has_eight_bits(self) -> bool:
        """Whether `to_eight_bits` was called."""
        return isinstance(self.lm_head[-1], EightBit)

    def check_whole(self, purpose: str) -> None:
        """Raises RedrafterError, which names the purpose ("saved"), for a drafter whose weights were rounded."""
        if self.has_eight_bits:
            raise RedrafterError(f"A drafter in 8 bits cannot be {purpose}: load it in 16.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the target's layers that it sees beside the last hidden state."""
        return self.config.context_layers

    @property
    def positions(self) -> int:
        """Last positions of which it sees the states."""
        return self.config.context_positions

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> RecurrentProposer | None:
        """What drafts so for a target; None for a length of 0.

        Raises RedrafterError where the drafter was made for another model, is elsewhere or cannot draft so.
        """
        from redrafter.proposers.recurrent import RecurrentProposer

        self.check(target, width, length, budget)
        return RecurrentProposer(isolated(self), target, width, length, budget) if length else None

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """As `Head.unrolled`: the recurrence over the true tokens."""
        states: list[Tensor] = []
        for embedding in embeddings.unbind(1):
            states.append(self.step(states[-1] if states else None, embedding))
        context = self.context(features)[:, None].expand_as(embeddings)
        return self.logits(context, torch.stack(states, dim=1))

    def step(
        self, state: Float[Tensor, "*batch hidden"] | None, embedding: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """One step of the recurrence; `None` is the state before the first token, zero.

        `s_t = SiLU(W e_t + U s_{t-1} + b)`, or without recurrence `s_t = s_{t-1} + e_t`.  With a gate that is what
        `s_t` moves to from `s_{t-1}`, by a share `sigmoid(W' e_t + U' s_{t-1} + b')` of the way.
        """
        if not self.config.rnn:
            return embedding if state is None else state + embedding
        if state is None:
            moved = product(embedding, self.rnn_w.weight, self.rnn_u.bias, silu=True)
        else:
            moved = activated(self.rnn_w(embedding), self.rnn_u(state))
        if not self.config.gated:
            return moved
        gate = torch.sigmoid(self.gate_w(embedding) + (self.gate_u.bias if state is None else self.gate_u(state)))
        return gate * moved if state is None else state + gate * (moved - state)

    def context(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch hidden"]:
        """What the head reads of the target, once for each draft: its last hidden state, as published.

        `features` are hidden states of the last `context_positions` positions, oldest first, each of `context_layers`
        and then the output head's input; zeros before a text begins.  With more than one of them, a linear map of all,
        each divided by its root mean square, is added to the last.
        """
        if not hasattr(self, "fuse"):
            return features
        size = self.config.hidden_size
        alike = nn.functional.rms_norm(features.unflatten(-1, (-1, size)), (size,)).flatten(-2)
        return features[..., -size:] + self.fuse(alike)  # type: ignore[no-any-return]

    def logits(
        self,
        context: Float[Tensor, "*batch hidden"],
        state: Float[Tensor, "*batch hidden"],
        read: Float[Tensor, "B 1 exit"] | None = None,
    ) -> Float[Tensor, "*batch head"]:
        """Scores of the next token over the draft vocabulary, from `context` and the recurrent state.

        `read`: what `self.read(context)` gave, so that a context asked more than once is multiplied once.
        """
        layer = self.reader
        if read is None or layer is None:
            x = torch.cat((context, state), dim=-1)
            return self.lm_head(x if self.begins_with_block else self.input_proj(x))  # type: ignore[no-any-return]
        seen = self.seen(context, state)
        return self.scores(
            product(state, layer.weight[:, self.config.hidden_size :], read, onto=seen, silu=seen is not None)
        )

    def seen(
        self, context: Float[Tensor, "*batch hidden"], state: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch both"] | None:
        """Context and state, where the head begins with a block, whose result is added to them; else None."""
        return torch.cat((context, state), dim=-1) if self.begins_with_block else None

    def scores(self, first: Float[Tensor, "*batch exit"]) -> Float[Tensor, "*batch head"]:
        """As `logits`, from what the head's projection gave, or else its first block."""
        x: Tensor = first.flatten(0, -2)  # products would copy a slice of more dimensions
        for module in list(self.lm_head)[int(self.begins_with_block) :]:
            x = module(x)
        return x.unflatten(0, first.shape[:-1])  # type: ignore[no-any-return]

    def read(self, context: Float[Tensor, "B 1 hidden"]) -> Float[Tensor, "B 1 exit"] | None:
        """The context's half of the head's first product, and its bias; None where the head is that product alone."""
        layer = self.reader
        if layer is None:
            return None
        return product(context, layer.weight[:, : self.config.hidden_size], layer.bias)

    @property
    def begins_with_block(self) -> bool:
        """Whether context and state go into the head's first block, or layer, as they are: it is as wide as both."""
        return not hasattr(self, "input_proj")

    @property
    def reader(self) -> nn.Linear | None:
        """The layer that reads context and state, where others follow."""
        if not self.begins_with_block:
            return self.input_proj
        return self.lm_head[0].linear if self.config.num_draft_layers else None  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in: of the weights, or of those that were rounded to 8 bits."""
        last = self.lm_head[-1]
        return last.dtype if isinstance(last, EightBit) else last.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head[-1].weight.device  # type: ignore[return-value]
