"""Sampling by seeded noise in vLLM's V1 runner.

Guarantees that each token is the argmax of the processed logits plus Gumbel noise, a function of the request's seed and
the token's position (`core.noise`).  So a request with a seed has the same text with any drafts or none, in float32,
and the drafter can rank its candidates by the noise to come.  Logits processors, penalties and truncation are vLLM's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from redrafter.core.noise import SEEDS, gumbel
from redrafter.core.rows import Features, RowSettings, SamplingNoise
from redrafter.integrations.vllm.sampling import DraftedRows, accepted

VERIFY = tuple(
    "draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens draft_probs target_logits bonus_token_ids "
    "sampling_metadata".split()
)
"""First parameters of vLLM's `rejection_sample`."""


def seed_of(request: str, seed: int | None, engine_seed: int) -> int:
    """A request's seed; without one, a number that follows from its id, which is the same in all workers."""
    if seed is not None:
        return seed % SEEDS
    digest = hashlib.sha256(f"{engine_seed} {request}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEEDS


class SeededSampler:
    """Replaces the random draws of one runner."""

    def __init__(self, runner: Any):
        """Installs itself in the runner's samplers."""
        self.runner = runner
        self._counts: Sequence[int] | None = None
        """Lengths of the drafts that the current step verifies."""
        self._logprobs_mode = runner.sampler.logprobs_mode
        runner.sampler.topk_topp_sampler.forward = self.draw
        runner.rejection_sampler.forward = self._within_step(runner.rejection_sampler.forward)

    def draw(
        self,
        logits: Float[Tensor, "R V"],
        generators: dict[int, torch.Generator],
        k: Int[Tensor, " R"] | None,
        p: Float[Tensor, " R"] | None,
    ) -> tuple[Int[Tensor, " R"], Tensor | None]:
        """The token of each request after its draft, or after its text, and processed log-probabilities if needed."""
        generators.clear()  # not used; vLLM would rewind them after parts of prompts, which fails on a CPU
        logits = apply_top_k_top_p(logits, k, p)
        counts = torch.tensor(self._counts or [0] * len(logits))
        noise = self._noise(range(len(logits)), counts[:, None], logits.device)[:, 0]
        tokens = (logits.float() + noise).argmax(dim=-1)
        if self._logprobs_mode == "processed_logits":
            return tokens, logits
        if self._logprobs_mode == "processed_logprobs":
            return tokens, logits.log_softmax(dim=-1, dtype=torch.float32)
        return tokens, None

    def verify(
        self,
        draft_token_ids: Int[Tensor, " T"],
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Int[Tensor, " R"],
        draft_probs: Tensor | None,
        target_logits: Float[Tensor, "T V"],
        bonus_token_ids: Int[Tensor, "R 1"],
        sampling_metadata: Any,
        **_: Any,
    ) -> Int[Tensor, "R longest+1"]:
        """The tokens of each request, as vLLM's `rejection_sample` returns them: int32, -1 after the last one."""
        scores = target_logits.float()
        drafted = DraftedRows.of(num_draft_tokens)
        rows = drafted.to(scores.device)
        if not sampling_metadata.all_greedy:
            noise = self._noise(drafted.request.tolist(), drafted.offset[:, None], scores.device)[:, 0]
            sampled = (sampling_metadata.temperature != 0)[rows.request]
            scores = scores + noise * sampled[:, None]
        chosen = scores.argmax(dim=-1)
        return accepted(chosen, draft_token_ids, bonus_token_ids[:, 0], rows, max_spec_len).int()

    def upcoming(
        self, requests: Sequence[int], length: int, names: Int[Tensor, " head"] | None
    ) -> SamplingNoise | None:
        """The noise of the next `length` tokens of these requests, for a drafter; None if all are greedy.

        `names` are the ids of the draft vocabulary.
        """
        batch = self.runner.input_batch
        metadata = batch.sampling_metadata
        if metadata.all_greedy:
            return None
        device = metadata.temperature.device
        index = torch.tensor(requests).to(device, non_blocking=True)
        temperature = metadata.temperature[index]
        sampled = temperature != 0
        ahead = torch.arange(length).expand(len(requests), length)
        noise = self._noise(requests, ahead, device, names) * sampled[:, None, None]
        zeros, ones = torch.zeros_like(temperature), torch.ones_like(temperature)
        settings = RowSettings(
            sampled=sampled.long(),
            prompt=zeros.long(),
            top_k=zeros.long(),
            temperature=torch.where(sampled, temperature, ones),
            top_p=ones if metadata.top_p is None else torch.where(sampled, metadata.top_p[index], ones),
            min_p=zeros,
            repetition=ones,
            presence=zeros,
            frequency=zeros,
        )
        return SamplingNoise(noise, Features(sampling=True, top_p=metadata.top_p is not None), settings)

    def _noise(
        self,
        requests: Sequence[int],
        ahead: Int[Tensor, "M D"],
        device: torch.device,
        names: Int[Tensor, " head"] | None = None,
    ) -> Float[Tensor, "M D V"]:
        """Noise of tokens that come `ahead` places after the next one of each of the requests, by their batch index."""
        batch = self.runner.input_batch
        position = torch.from_numpy(batch.num_tokens_no_spec[list(requests)]).long()[:, None] + ahead
        seeds = torch.tensor([self._seed(batch.req_ids[one]) for one in requests], dtype=torch.long)
        return gumbel(
            seeds.to(device, non_blocking=True), position.to(device, non_blocking=True), batch.vocab_size, names
        )

    def _seed(self, request: str) -> int:
        seed = self.runner.requests[request].sampling_params.seed
        return seed_of(request, seed, self.runner.model_config.seed)

    def _within_step(self, forward: Any) -> Any:
        """vLLM's rejection sampler, with `verify` for its acceptance and positions behind the drafts."""

        @functools.wraps(forward)
        def seeded(metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
            self._counts = metadata.num_draft_tokens
            try:
                with _replaced(rejection_sampler, "rejection_sample", self.verify):
                    return forward(metadata, None, logits, sampling_metadata)
            finally:
                self._counts = None

        return seeded


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
