"""The drafter as a module that maps a batch to its loss, as a Trainer wants it.

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
from redrafter.training.loss import TOKENS, Objective, unrolled_loss
from redrafter.training.states import States


class Unrolled(nn.Module):
    """The drafter as a module that maps a batch to its loss; the target is held outside, so it is never saved."""

    def __init__(self, drafter: Head, target: Target, objective: Objective = TOKENS, window_share: float = 1.0):
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self.window_share = window_share
        self.target = (target,)  # a tuple, so that its weights are not taken for this module's

    def hidden_states(self, input_ids: Int[Tensor, "B P"], segments: Int[Tensor, "B P"]) -> Float[Tensor, "B P F"]:
        """What the drafter is given of the target, which is not trained."""
        (target,) = self.target
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            return target.hidden_states(input_ids, segments)

    def kept_states(self, folder: Path, rows: list[Row]) -> States:
        """Where those of the rows lie on disk, or will."""
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
        """The loss under the key that the Trainer looks for; `hidden` are the target's states, where they are known."""
        (target,) = self.target
        if hidden is None:
            hidden = self.hidden_states(input_ids, segments)

        def embed(tokens: Tensor) -> Tensor:
            embedding: Tensor = target.embed(tokens)
            return embedding.detach()

        def head(states: Tensor) -> Tensor:
            with torch.autocast(target.device.type, enabled=False):
                return target.logits(states[..., -target.hidden_size :])

        loss = unrolled_loss(
            self.drafter,
            embed,
            hidden,
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
