"""The training loss of a drafter, teacher-forced (`Head.unrolled`).

As in the released script, at every trained position t the drafter receives the target's hidden state and the true
tokens that follow, and predicts `length` tokens.  Guarantees that no tensor of size `length × positions × vocabulary`
exists: logits and losses are computed in chunks of positions, and each chunk is differentiated immediately, so nothing
is stored or recomputed for the backward pass.  Does not know files or the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import pad, smooth_l1_loss

from redrafter.evaluation.windows import context_at, windows
from redrafter.heads.base import Head
from redrafter.training.objective import TOKENS, Objective

MAX_DRAFTER_LOGITS = 2**27
"""Logits of the drafter that exist at a time: 512 MB in float32."""

IGNORED = -100
"""Label of tokens that are not learned."""


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
    """Sum over the `length` draft positions of the mean loss of `objective`; 0 for a batch without a trained window.

    `hidden`: states of `Target.hidden_states`.  `embed`: the target's token embedding.  `trained`: tokens to learn;
    those outside the draft vocabulary have no cross-entropy.  `segments`: texts that share a row (default: one text per
    row). `head`: maps states [C, state] to the target's logits; required by objectives of distributions, which exclude
    `continuations`, and by heads that predict features (`Head.over_rows`).  `share`: random fraction of the windows to
    score.  `chunk`: windows scored at a time (default: as MAX_DRAFTER_LOGITS allows).
    """
    rows, positions, tokens, wanted = windows(input_ids, trained, length=length, continuations=continuations)
    if share < 1:
        some = torch.randperm(len(rows), device=rows.device)[: math.ceil(share * len(rows))].sort().values
        rows, positions, tokens, wanted = rows[some], positions[some], tokens[some], wanted[some]
    assert continuations is None or not objective.of_distribution
    if not len(rows):  # keeps the graph, so that a trainer can call backward
        return sum((p.sum() for p in drafter.parameters()), torch.zeros((), device=hidden.device)) * 0.0
    labels = _labels(drafter, tokens[:, 1:].contiguous()).masked_fill(~wanted, IGNORED)
    decay = objective.decay ** torch.arange(length, device=hidden.device)
    token_weights, window_weights = (decay * mask / mask.sum(0).clamp(min=1) for mask in (labels != IGNORED, wanted))
    parts = (rows, positions, tokens[:, :-1], labels, token_weights, window_weights)
    chunk = chunk or max(1, MAX_DRAFTER_LOGITS // (length * drafter.config.head_size))
    chunks = zip(*(part.split(chunk) for part in parts), strict=True)
    predicted = drafter.over_rows(embed, hidden, input_ids, segments, length)
    scorer = _ChunkLoss(drafter, predicted, _Batch(objective, embed, head, hidden, segments))
    inputs: list[tuple[str, Tensor]] = [*scorer.named_parameters()] if predicted is None else [("predicted", predicted)]
    trainable = {name: tensor for name, tensor in inputs if tensor.requires_grad}
    if not (torch.is_grad_enabled() and trainable):
        return torch.stack([scorer(*part) for part in chunks]).sum()
    # a power of two changes no float32 gradient; without it the gradients of single windows underflow in float16
    scale = 2.0 ** round(math.log2(len(rows)) - 4)
    return _ChunkedSum.apply(scorer, chunks, scale, list(trainable), *trainable.values())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Batch:
    """What all chunks of a batch share; fields as in `unrolled_loss`."""

    objective: Objective
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None
    hidden: Float[Tensor, "B P state"]
    segments: Int[Tensor, "B P"] | None


class _ChunkLoss(nn.Module):
    """The loss of some windows, as a module: `functional_call` can then replace the drafter's weights and `predicted`,
    the features that `Head.over_rows` returned.
    """

    predicted: Tensor | None

    def __init__(self, drafter: Head, predicted: Float[Tensor, "length B P hidden"] | None, batch: _Batch):
        super().__init__()
        self.drafter, self.batch = drafter, batch
        self.register_buffer("predicted", predicted)

    def forward(
        self,
        rows: Int[Tensor, " C"],
        positions: Int[Tensor, " C"],
        tokens: Int[Tensor, "C length"],
        labels: Int[Tensor, "C length"],
        token_weights: Float[Tensor, "C length"],
        window_weights: Float[Tensor, "C length"],
    ) -> Float[Tensor, ""]:
        """The weighted sum of the losses; `token_weights` are for cross-entropy, `window_weights` for the others."""
        drafter, objective, hidden, head = self.drafter, self.batch.objective, self.batch.hidden, self.batch.head
        depths = torch.arange(tokens.shape[1], device=tokens.device)
        following = (positions[:, None] + 1 + depths).clamp(max=hidden.shape[1] - 1)
        features = None
        if self.predicted is None:
            embeddings = self.batch.embed(tokens).to(drafter.dtype)
            context = context_at(hidden, rows, positions, drafter.positions, self.batch.segments)
            logits = drafter.unrolled(context.to(drafter.dtype), embeddings)
        else:
            assert head is not None
            features = self.predicted[depths, rows[:, None], following - 1]
            logits = head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        loss = log_probs.new_zeros(())
        if features is not None and objective.features:
            truth = hidden[rows[:, None], following][..., -features.shape[-1] :].float()
            distance = smooth_l1_loss(features.float(), truth, reduction="none").mean(-1)
            loss = loss + objective.features * (distance * window_weights).sum()
        if objective.cross_entropy:
            chosen = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            loss = loss - objective.cross_entropy * (chosen * token_weights).sum()
        if objective.of_distribution:
            assert head is not None
            with torch.no_grad():  # windows overlap, so each position's distribution is computed once
                unique, index = (following + rows[:, None] * hidden.shape[1]).unique(return_inverse=True)
                target = _target_log_probs(drafter, head(hidden.flatten(0, 1)[unique]).float())
            loss = loss + (_divergence(objective, log_probs, target, index) * window_weights).sum()
        return loss


class _ChunkedSum(torch.autograd.Function):
    """The sum of `scorer` over chunks, each differentiated by the tensors `names` right after it is computed.

    Every chunk is computed once, and its memory is freed before the next one.  Under autocast the weights are converted
    to half precision once, and gradients are summed in the weights' own dtype.  Gradients are multiplied by `scale`
    inside a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scorer: _ChunkLoss,
        chunks: Iterable[tuple[Tensor, ...]],
        scale: float,
        names: list[str],
        *tensors: Tensor,
    ) -> Tensor:
        device = tensors[0].device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        used = [p.detach().to(half or p.dtype).requires_grad_() for p in tensors]
        weights = dict(zip(names, used, strict=True))
        losses, totals = [], [torch.zeros_like(p) for p in tensors]
        for chunk in chunks:
            with torch.enable_grad():
                loss = functional_call(scorer, weights, chunk)
                gradients = torch.autograd.grad(loss * scale, used, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
            losses.append(loss.detach())
            del loss, gradients, gradient
        ctx.gradients, ctx.scale = totals, scale
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # no reference is kept, so autograd need not copy them
        return None, None, None, None, *(g.mul_(gradient / ctx.scale) for g in gradients)


def _target_log_probs(drafter: Head, logits: Float[Tensor, "U V"]) -> Float[Tensor, "U head1"]:
    """The target's log-probabilities of the draft vocabulary and, last, of all other tokens together."""
    log = logits.log_softmax(-1)
    if drafter.draft_vocabulary is None:
        return pad(log, (0, 1), value=-torch.inf)
    known = log[:, drafter.draft_vocabulary]
    outside = log.index_fill(1, drafter.draft_vocabulary, -torch.inf)
    return torch.cat((known, outside.logsumexp(-1, keepdim=True)), dim=-1)


def _divergence(
    objective: Objective,
    drafted: Float[Tensor, "C length head"],
    target: Float[Tensor, "U head1"],
    index: Int[Tensor, "C length"],
) -> Float[Tensor, "C length"]:
    """Weighted distances between the log-probabilities `drafted` and `target[index]`.

    Tokens outside the draft vocabulary contribute to the total variation only.
    """
    known, outside = target[:, :-1].exp(), target[:, -1].exp()
    loss = torch.zeros_like(drafted[..., 0])
    if objective.kl or objective.total_variation:
        truth = known[index]
    if objective.kl:
        loss = loss - objective.kl * (torch.special.entr(known).sum(-1)[index] + (truth * drafted).sum(-1))
    if objective.total_variation:
        distance = (truth - drafted.exp()).abs().sum(-1) + outside[index]
        loss = loss + objective.total_variation * distance / 2
    if objective.coupled:  # the maximum of several Gumbel variables is one Gumbel variable at their total weight
        log = target[index]
        noise = -torch.empty_like(log).exponential_().log_()
        sampled = (log + noise).argmax(-1)
        perturbed = (drafted + noise[..., :-1]).log_softmax(-1)
        chosen = perturbed.gather(2, sampled.clamp(max=drafted.shape[-1] - 1)[..., None])[..., 0]
        loss = loss - objective.coupled * chosen * (sampled < drafted.shape[-1])
    return loss


def _labels(drafter: Head, tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Target ids as ids of the draft vocabulary; IGNORED for tokens outside it."""
    if drafter.draft_vocabulary is None:
        return tokens
    index = torch.searchsorted(drafter.draft_vocabulary, tokens).clamp(max=len(drafter.draft_vocabulary) - 1)
    return torch.where(drafter.draft_vocabulary[index] == tokens, index, IGNORED)
