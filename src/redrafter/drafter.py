"""The recurrent drafter: a small head that continues the target's own last hidden state.

Paper: arXiv 2403.09919, section 3.1; the forms and tensor names are those of Apple's released code.  Promises one
definition of the recurrence (`step`) and of the head (`logits`), which training and beam search both call.  Does not
know beams, trees or the target's forward pass; the token embedding is the target's and is handed in, never stored.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter import hub
from redrafter.config import DrafterConfig
from redrafter.errors import RedrafterError


class ResidualBlock(nn.Module):
    """`x + SiLU(Linear(x))`."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Same shape out as in."""
        return x + nn.functional.silu(self.linear(x))


class RecurrentDrafter(nn.Module):
    """The drafter's weights and its two formulas."""

    draft_vocabulary: Tensor | None

    def __init__(self, config: DrafterConfig):
        """Random weights of the shape that `config` says; `draft_vocabulary` starts as the first ids."""
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.exit_dim
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        self.lm_head = nn.Sequential(
            *(ResidualBlock(width) for _ in range(config.num_draft_layers)),
            nn.Linear(width, config.head_size, bias=False),
        )
        ids = torch.arange(config.head_size) if config.draft_vocab_size else None
        self.register_buffer("draft_vocabulary", ids)

    @classmethod
    def for_target(
        cls,
        model: nn.Module,
        *,
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        draft_vocabulary: Int[Tensor, " draft"] | None = None,
        beam_length: int = 4,
        beam_width: int = 10,
        node_budget: int | None = None,
    ) -> RecurrentDrafter:
        """A fresh drafter for a target, on its device, in float32.

        `draft_vocabulary`: ids of the target's vocabulary that may be drafted, all of them by default.
        """
        from redrafter.target import Target

        target = Target(model)
        drafter = cls(
            DrafterConfig(
                vocab_size=target.vocab_size,
                hidden_size=target.hidden_size,
                exit_dim=exit_dim or 2 * target.hidden_size,
                num_draft_layers=num_draft_layers,
                rnn=rnn,
                draft_vocab_size=None if draft_vocabulary is None else len(draft_vocabulary),
                target=target.name,
                target_revision=target.revision,
                beam_length=beam_length,
                beam_width=beam_width,
                node_budget=node_budget,
            )
        ).to(target.device)
        if draft_vocabulary is not None:
            ids = torch.as_tensor(draft_vocabulary, dtype=torch.long).sort().values
            if ids.unique().numel() != ids.numel() or ids[0] < 0 or ids[-1] >= target.vocab_size:
                raise RedrafterError("The draft vocabulary must hold distinct ids of the target's vocabulary.")
            drafter.draft_vocabulary = ids.to(target.device)
        return drafter

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        target: nn.Module | None = None,
        revision: str | None = None,
    ) -> RecurrentDrafter:
        """Loads a drafter folder or hub repository, written by this package or by Apple's code.

        With `target` the drafter takes that model's device and dtype, and a drafter made for another model is refused.
        Raises RedrafterError where the folder is incomplete, damaged or contradicts its own config.
        """
        folder = hub.fetch(path, revision=revision)
        config = DrafterConfig.from_file(folder / hub.CONFIG)
        drafter = cls(config)
        hub.load_weights(drafter, folder)
        drafter.eval()
        if target is not None:
            from redrafter.target import Target

            told = Target(target)
            told.check_drafter(config)
            drafter.to(device=told.device, dtype=told.dtype)
        return drafter

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and, where given, the card as `README.md`, each whole or not."""
        hub.save_folder(Path(path), self.config.to_json(), self.state_dict(), card)

    def step(
        self, state: Float[Tensor, "*batch hidden"] | None, embedding: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """One step of the recurrence; `None` is the state before the first token, zero.

        `s_t = SiLU(W e_t + U s_{t-1} + b)`, or without recurrence `s_t = s_{t-1} + e_t`.
        """
        if not self.config.rnn:
            return embedding if state is None else state + embedding
        carried = self.rnn_u.bias if state is None else self.rnn_u(state)
        return nn.functional.silu(self.rnn_w(embedding) + carried)

    def logits(
        self, context: Float[Tensor, "*batch hidden"], state: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch head"]:
        """Scores of the next token over the draft vocabulary, from the target's hidden state and the recurrent one."""
        x = torch.cat((context, state), dim=-1)
        if hasattr(self, "input_proj"):
            x = self.input_proj(x)
        return self.lm_head(x)  # type: ignore[no-any-return]

    def to_target_ids(self, drafted: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Draft-vocabulary ids as ids of the target's vocabulary."""
        return drafted if self.draft_vocabulary is None else self.draft_vocabulary[drafted]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.lm_head[-1].weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head[-1].weight.device  # type: ignore[return-value]
