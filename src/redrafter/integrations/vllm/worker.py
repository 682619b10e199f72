"""What the plug-in changes in a worker of vLLM, once a proposer of method `redrafter` is made there.

`GPUModelRunner.propose_draft_token_ids` passes the target's hidden states to the proposer, which vLLM does not do for
method `custom_class`.  `apply_sampling_constraints` and `RejectionSampler.apply_logits_processors` also apply `min_p`
and `logit_bias` to drafted positions, and `build_logitsprocs` keeps both for the other positions; vLLM refuses these
settings with drafts.  `GPUModelRunner.initialize_kv_cache` tells the proposer its runner.  Guarantees that runners with
another proposer are unaffected.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from redrafter.integrations.vllm import seeded
from redrafter.integrations.vllm.frontend import uses_redrafter
from redrafter.integrations.vllm.sampling import DraftedRows, constrained
from redrafter.integrations.vllm.versions import check_signature

PROPOSE = tuple(
    "self scheduler_output sampled_token_ids sampling_metadata hidden_states sample_hidden_states aux_hidden_states "
    "spec_decode_metadata common_attn_metadata slot_mappings".split()
)
"""Parameters of `GPUModelRunner.propose_draft_token_ids`."""

_MARK = "_redrafter"


def install(proposer: type[Any]) -> None:
    """Replaces vLLM's functions, once per process.  `proposer` is the class whose runners use them.

    Raises RedrafterError if one of the functions has an unknown signature.
    """
    if hasattr(GPUModelRunner.propose_draft_token_ids, _MARK):
        return
    check_signatures()
    _pass_hidden_states(proposer)
    _attach_to_runner(proposer)
    _keep_processors()
    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints
    _bias_drafted_positions()


def check_signatures() -> None:
    """Raises RedrafterError if a function that the plug-in replaces or stands for has an unknown signature."""
    sampler = rejection_sampler.RejectionSampler
    check_signature(GPUModelRunner.propose_draft_token_ids, PROPOSE)
    check_signature(GPUModelRunner.initialize_kv_cache, ("self", "kv_cache_config"))
    check_signature(rejection_sampler.rejection_sample, seeded.VERIFY)
    check_signature(
        rejection_sampler.apply_sampling_constraints, ("logits", "cu_num_draft_tokens", "sampling_metadata")
    )
    check_signature(sampler.forward, ("self", "metadata", "draft_probs", "logits", "sampling_metadata"))
    check_signature(sampler.apply_logits_processors, ("self", "logits", "sampling_metadata", "metadata"))
    check_signature(gpu_model_runner.build_logitsprocs, ("vllm_config", "device", "is_pin_memory", "is_pooling_model"))


def _pass_hidden_states(proposer: type[Any]) -> None:
    original = GPUModelRunner.propose_draft_token_ids

    @functools.wraps(original)
    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        drafter: Any = self.drafter
        if isinstance(drafter, proposer):
            self._draft_probs = self._draft_prob_req_ids = None  # drafts are fixed tokens, not samples
            return drafter.draft(scheduler_output, sampled_token_ids, sample_hidden_states, spec_decode_metadata)
        inputs = (scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states)
        return original(self, *inputs, aux_hidden_states, spec_decode_metadata, *rest, **named)

    setattr(propose_draft_token_ids, _MARK, True)
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids


def _attach_to_runner(proposer: type[Any]) -> None:
    """The runner's samplers and batch exist when it receives its KV cache, which is before the first request."""
    original = GPUModelRunner.initialize_kv_cache

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        drafter: Any = getattr(self, "drafter", None)
        if isinstance(drafter, proposer):
            drafter.attach(self)
        return result

    GPUModelRunner.initialize_kv_cache = initialize_kv_cache


def _keep_processors() -> None:
    original = gpu_model_runner.build_logitsprocs

    @functools.wraps(original)
    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, *args: Any, **kwargs: Any
    ) -> Any:
        built = original(vllm_config, device, is_pin_memory, is_pooling_model, *args, **kwargs)  # refuses users' own
        if not uses_redrafter(vllm_config.speculative_config):
            return built
        kinds = (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
        return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in kinds)

    gpu_model_runner.build_logitsprocs = build_logitsprocs


def apply_sampling_constraints(logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any) -> Tensor:
    """vLLM's function of this name, with `min_p`.

    It also replaces vLLM's expansion of settings to drafted positions, which leaves them undefined on a CPU
    (https://github.com/vllm-project/vllm/issues/55005).
    """
    if sampling_metadata.all_greedy or not len(logits):
        return logits
    requests = torch.arange(len(logits), device=logits.device)
    request = torch.searchsorted(cu_num_draft_tokens, requests, right=True)
    return constrained(
        logits,
        request,
        temperature=sampling_metadata.temperature,
        min_p=_min_p(sampling_metadata),
        top_k=sampling_metadata.top_k,
        top_p=sampling_metadata.top_p,
        truncate=apply_top_k_top_p,
    )


def _min_p(sampling_metadata: Any) -> Tensor | None:
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            return processor.min_p.flatten()  # type: ignore[no-any-return]
    return None


def _bias_drafted_positions() -> None:
    sampler = rejection_sampler.RejectionSampler
    original = sampler.apply_logits_processors

    @functools.wraps(original)
    def apply_logits_processors(self: Any, logits: Tensor, sampling_metadata: Any, metadata: Any) -> Any:
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor) and processor.biases:
                counts = metadata.num_draft_tokens
                bias = processor.apply(logits.new_zeros((len(counts), logits.shape[-1])))
                logits = logits + bias[DraftedRows.of(counts).to(logits.device).request]
        return original(self, logits, sampling_metadata, metadata)  # penalties come after the bias, as without drafts

    sampler.apply_logits_processors = apply_logits_processors
