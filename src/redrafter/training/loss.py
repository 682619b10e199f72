"""The drafter's training loss: a teacher-forced unroll of its one recurrence.

As in the released script: at every position t of a trained stretch the drafter is given the target's hidden state there
and the true tokens that follow, and is asked for each next one, `length` times.  Promises that no tensor of
`length × positions × vocabulary` ever exists: heads and losses run over chunks of positions, and are computed again in
the backward pass.  Does not know files or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from redrafter.drafter import RecurrentDrafter

LOGITS = 2**26
"""Logits that exist at one time: 256 MB in float32."""

IGNORED = -100
"""Label of what is not to be learnt."""


@dataclass(frozen=True)
class Objective:
    """What a draft position is taught: weights of losses, and how much each position counts of the one before.

    `cross_entropy` on the token that follows in the data (the released script); `kl`, the Kullback-Leibler divergence
    of the drafter from the target's own distribution there; `total_variation`, half the sum of their distances (both in
    arXiv 2310.08461, section 3); `coupled`, the cross-entropy of what the target draws by Gumbel noise under the
    drafter's logits with the same noise, which is how drafts are ranked when sampling.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    total_variation: float = 0.0
    coupled: float = 0.0
    decay: float = 1.0

    @property
    def of_distribution(self) -> bool:
        """Whether the target's logits are asked for."""
        return bool(self.kl or self.total_variation or self.coupled)


TOKENS = Objective()
"""The released script's: cross-entropy alone."""


def windows(
    input_ids: Int[Tensor, "B P"], trained: Bool[Tensor, "B P"], *, length: int
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, "M length1"], Bool[Tensor, "M length"]]:
    """Every place where drafting can begin: rows, positions t, tokens `t+1 … t+1+length` and which to predict.

    The guaranteed token t+1 and every predicted one must be trained tokens, without a gap; a window of which nothing is
    to be predicted is left out.  `length1 = length + 1`.
    """
    padded = torch.nn.functional.pad(input_ids, (0, length + 1))
    wanted = torch.nn.functional.pad(trained, (0, length + 1))
    tokens = padded.unfold(1, length + 1, 1)[:, 1:]  # [B, P, length + 1], entry t begins at t + 1
    unbroken = wanted.unfold(1, length + 1, 1)[:, 1:].cumprod(dim=-1).bool()[..., 1:]
    rows, positions = unbroken[..., 0].nonzero(as_tuple=True)
    return rows, positions, tokens[rows, positions], unbroken[rows, positions]


def unrolled_loss(
    drafter: RecurrentDrafter,
    embed: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "B P H"],
    input_ids: Int[Tensor, "B P"],
    trained: Bool[Tensor, "B P"],
    *,
    length: int,
    objective: Objective = TOKENS,
    head: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over the `length` draft positions of the mean loss (nats) that `objective` says.

    `hidden` is what the target's output head reads, `embed` its token embedding, `trained` marks the tokens to learn;
    `head` gives the target's logits from its hidden states [C, H], where the objective is about its distribution.
    Tokens outside the draft vocabulary have no cross-entropy.  A batch without a trained window gives 0.  `chunk`
    positions are scored at a time, by default as many as LOGITS allows.
    """
    chunk = chunk or max(1, LOGITS // drafter.config.head_size)
    rows, positions, tokens, wanted = windows(input_ids, trained, length=length)
    labels = _labels(drafter, tokens[:, 1:].contiguous()).masked_fill(~wanted, IGNORED)
    context = hidden[rows, positions].to(drafter.dtype)
    losses = []
    state = None
    for position in range(length):
        state = drafter.step(state, embed(tokens[:, position]).to(drafter.dtype))
        parts = [x.split(chunk) for x in (context, state, labels[:, position])]
        weight, counted = objective.decay**position, (labels[:, position] != IGNORED).sum().clamp(min=1)
        losses += [
            weight * objective.cross_entropy / counted * checkpoint(_cross_entropy, drafter, *part, use_reentrant=False)
            for part in zip(*parts, strict=True)
            if objective.cross_entropy
        ]
        if objective.of_distribution:
            assert head is not None
            counted = wanted[:, position].sum().clamp(min=1)
            above = hidden[rows, (positions + 1 + position).clamp(max=hidden.shape[1] - 1)]
            parts = [x.split(chunk) for x in (context, state, above, wanted[:, position])]
            losses += [
                weight / counted * checkpoint(_divergence, drafter, objective, head, *part, use_reentrant=False)
                for part in zip(*parts, strict=True)
            ]
    if not losses:  # keeps the graph, so that a batch with nothing to learn can pass through any trainer
        return sum((p.sum() for p in drafter.parameters()), torch.zeros((), device=hidden.device)) * 0.0
    return torch.stack(losses).sum()


def _cross_entropy(
    drafter: RecurrentDrafter, context: Float[Tensor, "C H"], state: Float[Tensor, "C H"], label: Int[Tensor, " C"]
) -> Float[Tensor, ""]:
    logits = drafter.logits(context, state).float()
    return cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")


def _divergence(
    drafter: RecurrentDrafter,
    objective: Objective,
    head: Callable[[Tensor], Tensor],
    context: Float[Tensor, "C H"],
    state: Float[Tensor, "C H"],
    above: Float[Tensor, "C H"],
    wanted: Bool[Tensor, " C"],
) -> Float[Tensor, ""]:
    """Summed distances from the target's distribution; what lies outside the draft vocabulary is out of reach."""
    with torch.no_grad():
        truth = head(above).float().log_softmax(-1)
    own = drafter.logits(context, state).float().log_softmax(-1)
    ids = torch.arange(truth.shape[-1], device=truth.device)
    ids = ids if drafter.draft_vocabulary is None else drafter.draft_vocabulary
    known = truth[:, ids]
    loss = torch.zeros_like(known[:, 0])
    if objective.kl:
        loss = loss + objective.kl * (known.exp() * (known - own)).sum(-1)
    if objective.total_variation:
        outside = 1 - known.exp().sum(-1)
        loss = loss + objective.total_variation * ((known.exp() - own.exp()).abs().sum(-1) + outside) / 2
    if objective.coupled:
        noise = -torch.empty_like(truth).exponential_().log_()
        label = _labels(drafter, (truth + noise).argmax(-1))
        drawn = cross_entropy(own + noise[:, ids], label, ignore_index=IGNORED, reduction="none")
        loss = loss + objective.coupled * drawn
    return (loss * wanted).sum()


def _labels(drafter: RecurrentDrafter, tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Target ids as ids of the draft vocabulary, IGNORED where it lacks them."""
    if drafter.draft_vocabulary is None:
        return tokens
    place = torch.searchsorted(drafter.draft_vocabulary, tokens).clamp(max=len(drafter.draft_vocabulary) - 1)
    return torch.where(drafter.draft_vocabulary[place] == tokens, place, IGNORED)
