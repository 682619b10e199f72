"""The proposer that vLLM makes in each worker for method `redrafter`.

Guarantees at most one chain of drafted tokens per request, from the hidden state that the target chose the request's
newest token from.  Keeps nothing about requests between steps, so preemption, prefix caching and chunked prefill
need no bookkeeping.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.integrations.vllm import worker
from redrafter.integrations.vllm.chain import DraftChains, draft_length
from redrafter.integrations.vllm.seeded import SeededSampler
from redrafter.integrations.vllm.served import ServedModel
from redrafter.integrations.vllm.settings import METHOD, Settings, read_config
from redrafter.utils import hub

logger = init_logger(f"vllm.{__name__}")

MAX_VERIFIED_TOKENS = {"cpu": 64}
"""Defaults of `max_verified_tokens`.  A CPU is limited by computation from few tokens on."""

MAX_VERIFIED_TOKENS_ELSEWHERE = 256
"""The default on other devices.  A GPU reads weights for as long as it computes some hundreds of tokens."""


class RedrafterProposer:
    """A drafter for the model of one worker.  With tensor parallelism, each worker has its own copy."""

    def __init__(self, vllm_config: Any):
        """Called by vLLM.  Raises RedrafterError for an unknown version of vLLM and for an unsupported drafter."""
        self.settings = Settings(**vllm_config.additional_config[METHOD])
        self.length: int = vllm_config.speculative_config.num_speculative_tokens
        self._config = vllm_config.model_config
        self._alone = vllm_config.parallel_config.tensor_parallel_size == 1
        self._graphs = not vllm_config.model_config.enforce_eager
        self._runner: Any = None
        self._sampler: SeededSampler | None = None
        read_config(self.settings)
        worker.install(type(self))

    def load_model(self, target_model: nn.Module) -> None:
        """Called by vLLM after it has loaded the target.  Raises RedrafterError for a drafter of another model."""
        served = ServedModel(target_model, self._config)
        drafter = RecurrentDrafter.from_pretrained(self.settings.drafter, revision=self.settings.revision)
        drafter.refuse_other(served, weights=True, any_target=self.settings.any_target)
        drafter.to(device=served.device, dtype=served.dtype)
        hub.check_finite(drafter.state_dict(), hub.fetch(self.settings.drafter) / hub.WEIGHTS, f" in {served.dtype}")
        # with tensor parallelism, an embedding is a collective operation, which vLLM captures in ways of its own
        with torch.inference_mode():
            self._chains = DraftChains(drafter, served.embed, capture=self._alone and self._graphs)
        default = MAX_VERIFIED_TOKENS.get(served.device.type, MAX_VERIFIED_TOKENS_ELSEWHERE)
        self._max_verified = self.settings.max_verified_tokens or default
        logger.info(
            "redrafter drafts up to %d tokens per request for %s (%s); a step verifies at most %d tokens.",
            self.length,
            served.name,
            drafter.config.head_description,
            self._max_verified,
        )

    def attach(self, runner: Any) -> None:
        """Called once the runner is complete."""
        self._runner = runner
        if self.settings.seeded and self._sampler is None:
            self._sampler = SeededSampler(runner)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM requires this method, but its arguments lack the hidden states: `draft` receives them."""
        raise RuntimeError("vLLM called propose of method redrafter instead of the runner's replaced method.")

    @torch.inference_mode()
    def draft(
        self, scheduler_output: Any, sampled: list[list[int]], hidden: Tensor, metadata: Any
    ) -> Tensor | list[list[int]]:
        """Drafts for all requests of a step: a list, or on CUDA a tensor [requests, length] that vLLM copies itself.

        `sampled` are the tokens that the step added to each request; none in the middle of a prompt.  `hidden` [rows,
        hidden size] are the target's states at all positions that the step chose a token from: for each request those
        of its draft and one more.
        """
        rows = [one for one, tokens in enumerate(sampled) if tokens]
        scheduled = getattr(scheduler_output, "num_spec_tokens_to_schedule", self.length)
        length = draft_length(min(self.length, scheduled), len(rows), self._max_verified)
        if not length or not rows:
            return [[] for _ in sampled]
        counts = [0] * len(sampled) if metadata is None else metadata.num_draft_tokens
        ends = list(accumulate(count + 1 for count in counts))
        if len(counts) != len(sampled) or ends[-1] != len(hidden):
            raise RuntimeError(f"vLLM passed {len(hidden)} hidden states for drafts of lengths {list(counts)}.")
        newest = [ends[one] - counts[one] - 2 + len(sampled[one]) for one in rows]
        host = torch.tensor([newest, [sampled[one][-1] for one in rows]])
        index, root = host.to(hidden.device, non_blocking=True)
        noise = None
        if self._sampler is not None:
            noise = self._sampler.upcoming(rows, length, self._chains.drafter.draft_vocabulary)
        drafts = self._chains.draft(hidden[index], root, length, noise)
        if drafts.device.type != "cuda":
            drafted: list[list[int]] = [[] for _ in sampled]
            for one, tokens in zip(rows, drafts.tolist(), strict=True):
                drafted[one] = tokens
            return drafted
        if len(rows) == len(sampled):
            return drafts
        places = torch.tensor(rows).to(drafts.device, non_blocking=True)  # vLLM drops drafts within prompts
        return drafts.new_zeros((len(sampled), length)).index_copy_(0, places, drafts)
