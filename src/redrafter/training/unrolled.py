"""A module that maps a batch to the drafter's loss, as a Trainer expects.

Does not know the trainer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from redrafter.data.examples import Row
from redrafter.heads.base import Head
from redrafter.targets.target import Target
from redrafter.training.loss import unrolled_loss
from redrafter.training.objective import TOKENS, Objective
from redrafter.training.states import States


class Unrolled(nn.Module):
    """Maps a batch to the drafter's loss.  The target is not a submodule, so it is neither trained nor saved."""

    def __init__(self, drafter: Head, target: Target, objective: Objective = TOKENS, window_share: float = 1.0):
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.window_share = window_share
        self.target = (target,)  # a tuple hides the module

    def hidden_states(self, input_ids: Int[Tensor, "B P"], segments: Int[Tensor, "B P"]) -> Float[Tensor, "B P F"]:
        """The target's hidden states, without gradients."""
        (target,) = self.target
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            return target.hidden_states(input_ids, segments)

    def cached_states(self, folder: Path, rows: list[Row]) -> States:
        """The states of rows, cached in a folder."""
        reach = max(len(row.input_ids) for row in rows) if self.drafter.reads_text else self.drafter.positions
        return States(folder, self.target[0], self.hidden_states, rows, reach=reach)

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor,
        trained: Tensor,
        continuations: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, under the key `loss`.  `hidden`: the target's states, if they are cached."""
        (target,) = self.target

        def embed(tokens: Tensor) -> Tensor:
            embedding: Tensor = target.embed(tokens)
            return embedding.detach()

        def head(states: Tensor) -> Tensor:
            with torch.autocast(target.device.type, enabled=False):
                return target.logits(states[..., -target.hidden_size :])

        loss = unrolled_loss(
            self.drafter,
            embed,
            self.hidden_states(input_ids, segments) if hidden is None else hidden,
            input_ids,
            trained,
            length=self.drafter.config.beam_length,
            objective=self.objective,
            head=head,
            continuations=continuations,
            segments=segments,
            share=self.window_share,
        )
        return {"loss": loss}
