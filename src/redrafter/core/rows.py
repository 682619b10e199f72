"""The state of the rows of a batch, their sampling settings, and the sampling noise of the next step.

Does not know which model or proposer reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from redrafter.core.warping import above_min_p, with_temperature, within_top_k, within_top_p


@dataclass(frozen=True)
class RowSettings:
    """How each row is sampled.  Neutral values (see `core.warping`) switch a setting off."""

    sampled: Int[Tensor, " B"]
    """1 for sampling, 0 for greedy decoding."""
    prompt: Int[Tensor, " B"]
    """Number of tokens of the prompt, which presence and frequency penalties do not count."""
    top_k: Int[Tensor, " B"]
    temperature: Float[Tensor, " B"]
    top_p: Float[Tensor, " B"]
    min_p: Float[Tensor, " B"]
    repetition: Float[Tensor, " B"]
    presence: Float[Tensor, " B"]
    frequency: Float[Tensor, " B"]
    bias: Float[Tensor, "B V"] | None = None
    """Added to the logits; None if no row has a bias."""


@dataclass(frozen=True)
class Features:
    """What the settings of some row require.  A step computes nothing else."""

    sampling: bool = False
    """Sampling noise and temperature."""
    top_k: int = 0
    """At least the largest `top_k`; 0 if no row has one."""
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    """Repetition, presence and frequency penalties."""
    bias: bool = False
    drafter_off: bool = False
    """Whether some row is decoded without drafts while others have some."""
    logprobs: int | None = None
    """The number of most likely tokens whose log-probabilities are reported; None for no log-probabilities."""

    def warp(self, scores: Float[Tensor, "B N K"], settings: RowSettings) -> Float[Tensor, "B N K"]:
        """Temperature and truncation, for scores over any vocabulary, in transformers' order."""
        if self.sampling:
            scores = with_temperature(scores, settings.temperature)
        if self.top_k:
            scores = within_top_k(scores, settings.top_k, self.top_k)
        if self.top_p:
            scores = within_top_p(scores, settings.top_p)
        return above_min_p(scores, settings.min_p) if self.min_p else scores


NO_FEATURES = Features()
"""Greedy decoding of all rows."""


@dataclass(frozen=True)
class RowState:
    """The texts so far, one per row."""

    row: Int[Tensor, " B"]
    """The number of each row in its call."""
    seed: Int[Tensor, " B"]
    text: Int[Tensor, "B S"]
    """Tokens by position, including the root.  Later entries are undefined."""
    length: Int[Tensor, " B"]
    """Position of the root."""
    alive: Int[Tensor, " B"]
    """1 for rows that are being decoded, 0 for free slots."""
    drafting: Int[Tensor, " B"] | None = None
    """1 for rows whose drafts are verified; None for all."""
    settings: RowSettings | None = None
    """None if all rows are decoded greedily."""

    @property
    def root(self) -> Int[Tensor, " B"]:
        """The last token.  The target has chosen it, but not yet processed it."""
        return self.text.gather(1, self.length[:, None])[:, 0]


@dataclass(frozen=True)
class SamplingNoise:
    """What is known before the target runs about how it will sample at the next positions."""

    gumbel: Float[Tensor, "B depths V"] | None = None
    """Gumbel noise after nodes of each depth, 0 for greedy rows; None if all rows are greedy."""
    features: Features = NO_FEATURES
    settings: RowSettings | None = None
    warpers: tuple[LogitsProcessor, ...] = ()
    """Further processors of all rows that treat all tokens alike."""

    def warp(self, logits: Float[Tensor, "B N K"]) -> Float[Tensor, "B N K"]:
        """Applies temperature and truncation to logits over any vocabulary.  Returns float32 or wider."""
        scores = precise(logits)
        if self.settings is not None:
            scores = self.features.warp(scores, self.settings)
        for warper in self.warpers:
            scores = warper(None, scores.flatten(0, -2)).view(logits.shape)
        return scores

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """A function `(logits, depth) -> scores` that a drafter ranks candidates by; None for the logits themselves.

        When the target samples, scores include its noise if `coupled`, and the warpers in any case.  `names`: see
        `with_noise`.
        """
        if self.gumbel is None:
            return None
        return partial(self.with_noise, names=names) if coupled else lambda logits, _: self.warp(logits)

    def with_noise(
        self, logits: Float[Tensor, "B beams head"], depth: int, names: Int[Tensor, " head"] | None = None
    ) -> Float[Tensor, "B beams head"]:
        """A drafter's logits after nodes of a depth, with the warpers and noise that the target will use there.

        They rank the token first that the target is about to sample.  `names` are the target's ids of the draft
        vocabulary, if the drafter has one.
        """
        assert self.gumbel is not None
        noise = self.gumbel[:, depth]
        return self.warp(logits) + (noise if names is None else noise[:, names])[:, None]


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of prompts, to be read into a cache.  Rows may belong to one prompt and must be in order."""

    tokens: Int[Tensor, "V N"]
    following: Int[Tensor, "V N"]
    """The token after each token."""
    begin: Int[Tensor, " V"]
    """Position of each row's first token."""
    rows: Int[Tensor, " V"]
    """The cache's row that each row belongs to."""
    from_start: bool = False
    """Whether all rows begin at position 0."""


def at_positions(states: Float[Tensor, "B P size"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M size"]:
    """The vectors of each row at the positions in `index`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def precise(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float32 or wider, as transformers' scores."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
