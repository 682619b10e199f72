"""A drafter's training loss, teacher-forced (`Head.unrolled`).

As in the released script: at every position t of a trained stretch the drafter is given the target's hidden state there
and the true tokens that follow, and is asked for each next one, `length` times.  Promises that no tensor of
`length × positions × vocabulary` ever exists: heads and losses run over chunks of positions, each of which is
differentiated at once, so that nothing is kept or computed again for the backward pass.  Does not know files or the
trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from redrafter.heads.base import Head

LOGITS = 2**27
"""Logits of the drafter that exist at one time: 512 MB in float32."""

IGNORED = -100
"""Label of what is not to be learnt."""


@dataclass(frozen=True)
class Objective:
    """What a draft position is taught: weights of losses, and how much each position counts of the one before.

    `cross_entropy` on the token that follows in the data (the released script); `kl`, the Kullback-Leibler divergence
    of the drafter from the target's own distribution there; `total_variation`, half the sum of their distances (both in
    arXiv 2310.08461, section 3); `coupled`, the cross-entropy of what the target draws by Gumbel noise under the
    drafter's logits with the same noise, which is how drafts are ranked when sampling; `features`, of a head that
    predicts the target's features, the smooth L1 distance from them, the mean over their numbers (arXiv 2401.15077,
    section 4.2).
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    total_variation: float = 0.0
    coupled: float = 0.0
    decay: float = 1.0
    features: float = 0.0

    @property
    def of_distribution(self) -> bool:
        """Whether the target's logits are asked for."""
        return bool(self.kl or self.total_variation or self.coupled)

    def in_words(self, loss: float, length: int) -> str:
        """A loss of `length` draft positions with its unit: for each drafted token, and their sum.

        Cross-entropies and divergences are in nats; with other parts the sum has no unit.
        """
        each = loss / sum(self.decay**depth for depth in range(length))
        if self.total_variation or self.features:
            return f"{each:.3f} per drafted token (weighted sum of losses; {loss:.3f} over {length} draft positions)"
        return f"{each:.3f} nats per drafted token ({loss:.3f} over {length} draft positions)"


TOKENS = Objective()
"""The released script's: cross-entropy alone."""


def windows(
    input_ids: Int[Tensor, "B P"],
    trained: Bool[Tensor, "B P"],
    *,
    length: int,
    continuations: Int[Tensor, "B P depth"] | None = None,
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, "M length1"], Bool[Tensor, "M length"]]:
    """Every place where drafting can begin: rows, positions t, tokens `t+1 … t+1+length` and which to predict.

    The guaranteed token t+1 and every predicted one must be trained tokens, without a gap; a window of which nothing is
    to be predicted is left out.  `length1 = length + 1`.  With `continuations`, what the target itself writes after
    each t (-1 past its end), those are the tokens, wherever t+1 is a trained one.
    """
    if continuations is not None:
        tokens = continuations[..., : length + 1]
        tokens = torch.nn.functional.pad(tokens, (0, length + 1 - tokens.shape[-1]), value=-1)
        wanted = (tokens[..., 1:] >= 0) & torch.nn.functional.pad(trained, (0, 1))[:, 1:, None]
        rows, positions = wanted[..., 0].nonzero(as_tuple=True)
        return rows, positions, tokens[rows, positions].clamp(min=0), wanted[rows, positions]
    padded = torch.nn.functional.pad(input_ids, (0, length + 1))
    wanted = torch.nn.functional.pad(trained, (0, length + 1))
    tokens = padded.unfold(1, length + 1, 1)[:, 1:]  # [B, P, length + 1], entry t begins at t + 1
    unbroken = wanted.unfold(1, length + 1, 1)[:, 1:].cumprod(dim=-1).bool()[..., 1:]
    rows, positions = unbroken[..., 0].nonzero(as_tuple=True)
    return rows, positions, tokens[rows, positions], unbroken[rows, positions]


def unrolled_loss(
    drafter: Head,
    embed: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "B P state"],
    input_ids: Int[Tensor, "B P"],
    trained: Bool[Tensor, "B P"],
    *,
    length: int,
    objective: Objective = TOKENS,
    head: Callable[[Tensor], Tensor] | None = None,
    continuations: Int[Tensor, "B P depth"] | None = None,
    segments: Int[Tensor, "B P"] | None = None,
    share: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over the `length` draft positions of the mean loss (nats) that `objective` says.

    `hidden` are the states that `Target.hidden_states` gives, `embed` is the target's token embedding, `trained` marks
    the tokens to learn and `segments` the texts that share a row (by default each is one); `head` gives the target's
    logits from its states [C, state], where the objective is about its distribution: that is known along the text
    alone, so not where `continuations` take the place of the tokens that follow.  Tokens outside the draft vocabulary
    have no cross-entropy.  A batch without a trained window gives 0.  Of the windows a random `share` is scored,
    `chunk` at a time, by default as many as LOGITS allows.  A head that predicts features runs over the whole rows once
    (`Head.over_rows`); its logits are what `head` makes of them.
    """
    rows, positions, tokens, wanted = windows(input_ids, trained, length=length, continuations=continuations)
    if share < 1:
        some = torch.randperm(len(rows), device=rows.device)[: math.ceil(share * len(rows))].sort().values
        rows, positions, tokens, wanted = rows[some], positions[some], tokens[some], wanted[some]
    assert continuations is None or not objective.of_distribution
    if not len(rows):  # keeps the graph, so that a batch with nothing to learn can pass through any trainer
        return sum((p.sum() for p in drafter.parameters()), torch.zeros((), device=hidden.device)) * 0.0
    labels = _labels(drafter, tokens[:, 1:].contiguous()).masked_fill(~wanted, IGNORED)
    depth = torch.arange(length, device=hidden.device)
    weight = objective.decay**depth
    parts = (
        rows,
        positions,
        tokens[:, :-1],
        labels,
        weight * (labels != IGNORED) / (labels != IGNORED).sum(0).clamp(min=1),
        weight * wanted / wanted.sum(0).clamp(min=1),
    )
    chunk = chunk or max(1, LOGITS // (length * drafter.config.head_size))
    score = partial(_loss_of_windows, objective=objective, embed=embed, head=head, hidden=hidden, segments=segments)
    chunks = zip(*(p.split(chunk) for p in parts), strict=True)
    predicted = drafter.over_rows(embed, hidden, input_ids, segments, length)
    scored = _Scored(drafter, predicted, score)
    given: list[tuple[str, Tensor]] = [*scored.named_parameters()] if predicted is None else [("predicted", predicted)]
    learnt = {name: tensor for name, tensor in given if tensor.requires_grad}
    if not (torch.is_grad_enabled() and learnt):
        return torch.stack([scored(*part) for part in chunks]).sum()
    # a power of two, so that it changes no float32 gradient; without it those of one window vanish in float16
    scale = 2.0 ** round(math.log2(len(rows)) - 4)
    return _SummedAtOnce.apply(scored, chunks, scale, list(learnt), *learnt.values())  # type: ignore[no-any-return]


class _Scored(nn.Module):
    """`score(drafter, predicted, *part)` as a module, so that other tensors can stand in for the weights and for what
    the drafter predicted over whole rows.
    """

    predicted: Tensor | None

    def __init__(self, drafter: Head, predicted: Tensor | None, score: Callable[..., Tensor]):
        super().__init__()
        self.drafter, self.score = drafter, score
        self.register_buffer("predicted", predicted)

    def forward(self, *part: Tensor) -> Tensor:
        """The loss of some windows."""
        return self.score(self.drafter, self.predicted, *part)


class _SummedAtOnce(torch.autograd.Function):
    """The sum of a module over parts, each differentiated by `learnt`, of those names, as soon as it is known.

    So every part is computed once, and what it needed is freed before the next.  Under autocast the weights are made
    half-precise once, and gradients of that precision are summed in the weights' own.  Gradients are multiplied by
    `scale` while they pass through a part's operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scored: _Scored,
        parts: Iterable[tuple[Tensor, ...]],
        scale: float,
        names: list[str],
        *learnt: Tensor,
    ) -> Tensor:
        kind = learnt[0].device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        used = [p.detach().to(half or p.dtype).requires_grad_() for p in learnt]
        weights = dict(zip(names, used, strict=True))
        losses, gradients = [], [torch.zeros_like(p) for p in learnt]
        for part in parts:
            with torch.enable_grad():
                loss = functional_call(scored, weights, part)
                found = torch.autograd.grad(loss * scale, used, allow_unused=True)
            for total, gradient in zip(gradients, found, strict=True):
                if gradient is not None:
                    total.add_(gradient)
            losses.append(loss.detach())
            del loss, found, gradient
        ctx.gradients, ctx.scale = gradients, scale
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # handed on, so that they become the parameters' own
        return None, None, None, None, *(g.mul_(gradient / ctx.scale) for g in gradients)


def context_at(
    hidden: Float[Tensor, "B P state"],
    rows: Int[Tensor, " M"],
    positions: Int[Tensor, " M"],
    count: int,
    segments: Int[Tensor, "B P"] | None = None,
) -> Float[Tensor, "M features"]:
    """What a drafter is given at each place: the states of the last `count` positions, oldest first.

    Zeros stand for what lies before the text, or in another one of `segments` that shares the row.
    """
    seen = positions[:, None] - torch.arange(count - 1, -1, -1, device=hidden.device)
    there = seen >= 0
    seen, rows = seen.clamp(min=0), rows[:, None]
    if segments is not None:
        there = there & (segments[rows, seen] == segments[rows, positions[:, None]])
    return (hidden[rows, seen] * there[..., None]).flatten(1)


def _loss_of_windows(
    drafter: Head,
    predicted: Float[Tensor, "length B P hidden"] | None,
    rows: Int[Tensor, " C"],
    positions: Int[Tensor, " C"],
    tokens: Int[Tensor, "C length"],
    labels: Int[Tensor, "C length"],
    labelled: Float[Tensor, "C length"],
    wanted: Float[Tensor, "C length"],
    *,
    objective: Objective,
    embed: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor] | None,
    hidden: Float[Tensor, "B P state"],
    segments: Int[Tensor, "B P"] | None,
) -> Float[Tensor, ""]:
    """The weighted sum over some windows; `predicted` is what `Head.over_rows` gave.

    `labelled` and `wanted` are the weights of the cross-entropy and of the distances between distributions.
    """
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    following = (positions[:, None] + 1 + steps).clamp(max=hidden.shape[1] - 1)
    if predicted is None:
        embeddings = embed(tokens).to(drafter.dtype)
        features = context_at(hidden, rows, positions, drafter.positions, segments)
        logits = drafter.unrolled(features.to(drafter.dtype), embeddings)
    else:
        assert head is not None
        found = predicted[steps, rows[:, None], following - 1]
        logits = head(found.flatten(0, 1)).unflatten(0, found.shape[:2])
    own = logits.log_softmax(-1, dtype=torch.float32)
    loss = own.new_zeros(())
    if predicted is not None and objective.features:
        truth = hidden[rows[:, None], following][..., -found.shape[-1] :].float()
        distance = torch.nn.functional.smooth_l1_loss(found.float(), truth, reduction="none").mean(-1)
        loss = loss + objective.features * (distance * wanted).sum()
    if objective.cross_entropy:
        loss = loss - objective.cross_entropy * (own.gather(2, labels.clamp(min=0)[..., None])[..., 0] * labelled).sum()
    if objective.of_distribution:
        assert head is not None
        with torch.no_grad():  # windows overlap: each place's distribution is made once
            places, index = (following + rows[:, None] * hidden.shape[1]).unique(return_inverse=True)
            law = _law(drafter, head(hidden.flatten(0, 1)[places]).float())
        loss = loss + (_divergence(objective, own, law, index) * wanted).sum()
    return loss


def _law(drafter: Head, logits: Float[Tensor, "U V"]) -> Float[Tensor, "U head1"]:
    """Log-probabilities of the draft vocabulary and, last, of all that lies outside it together (log 0 where none)."""
    log = logits.log_softmax(-1)
    if drafter.draft_vocabulary is None:
        return torch.nn.functional.pad(log, (0, 1), value=-torch.inf)
    known = log[:, drafter.draft_vocabulary]
    outside = log.index_fill(1, drafter.draft_vocabulary, -torch.inf)
    return torch.cat((known, outside.logsumexp(-1, keepdim=True)), dim=-1)


def _divergence(
    objective: Objective,
    own: Float[Tensor, "C length head"],
    law: Float[Tensor, "U head1"],
    index: Int[Tensor, "C length"],
) -> Float[Tensor, "C length"]:
    """Distances from the target's distribution, which is `law[index]`.

    What lies outside the draft vocabulary is out of reach.
    """
    known, outside = law[:, :-1].exp(), law[:, -1].exp()
    loss = torch.zeros_like(own[..., 0])
    if objective.kl or objective.total_variation:
        truth = known[index]
    if objective.kl:
        loss = loss - objective.kl * (torch.special.entr(known).sum(-1)[index] + (truth * own).sum(-1))
    if objective.total_variation:
        distance = (truth - own.exp()).abs().sum(-1) + outside[index]
        loss = loss + objective.total_variation * distance / 2
    if objective.coupled:  # the largest of many Gumbel draws is one draw at the sum of their weights
        log = law[index]
        noise = -torch.empty_like(log).exponential_().log_()
        drawn = (log + noise).argmax(-1)
        heard = (own + noise[..., :-1]).log_softmax(-1)
        said = heard.gather(2, drawn.clamp(max=own.shape[-1] - 1)[..., None])[..., 0]
        loss = loss - objective.coupled * said * (drawn < own.shape[-1])
    return loss


def _labels(drafter: Head, tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Target ids as ids of the draft vocabulary, IGNORED where it lacks them."""
    if drafter.draft_vocabulary is None:
        return tokens
    place = torch.searchsorted(drafter.draft_vocabulary, tokens).clamp(max=len(drafter.draft_vocabulary) - 1)
    return torch.where(drafter.draft_vocabulary[place] == tokens, place, IGNORED)
