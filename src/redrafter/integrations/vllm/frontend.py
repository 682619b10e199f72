"""What the plug-in changes in the process that reads options and requests: two functions, for method `redrafter` only.

`EngineArgs.create_speculative_config` turns the method into vLLM's method `custom_class`, after it has checked the
drafter.  `SamplingParams._validate_spec_decode` accepts `min_p` and `logit_bias`, which the plug-in applies to drafted
tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import vllm
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams

from redrafter.errors import RedrafterError
from redrafter.integrations.vllm.settings import METHOD, Settings, check_shape, read_config
from redrafter.integrations.vllm.versions import check_signature, check_version
from redrafter.targets.structure import base_name

PROPOSER = "redrafter.integrations.vllm.proposer.RedrafterProposer"
"""The class that vLLM makes in each worker."""

_MARK = "_redrafter"


def uses_redrafter(speculative_config: Any) -> bool:
    """Whether a `SpeculativeConfig` of vLLM is one of method `redrafter`."""
    return speculative_config is not None and speculative_config.model == PROPOSER


def install() -> None:
    """Replaces both functions, once per process.  Versions are checked when the method is used."""
    if hasattr(EngineArgs.create_speculative_config, _MARK):
        return
    create, validate = EngineArgs.create_speculative_config, SamplingParams._validate_spec_decode

    @functools.wraps(create)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.speculative_config
        if isinstance(config, dict) and config.get("method") == METHOD:
            check_version(vllm.__version__)
            check_signature(create, ("self", "target_model_config", "target_parallel_config"))
            self.speculative_config = translated(self, config, target_model_config, target_parallel_config)
        return create(self, target_model_config, target_parallel_config, *args, **kwargs)

    @functools.wraps(validate)
    def validate_spec_decode(self: Any, speculative_config: Any, *args: Any, **kwargs: Any) -> None:
        if not uses_redrafter(speculative_config):
            validate(self, speculative_config, *args, **kwargs)

    setattr(create_speculative_config, _MARK, True)
    EngineArgs.create_speculative_config = create_speculative_config
    SamplingParams._validate_spec_decode = validate_spec_decode


def translated(engine_args: Any, config: dict[str, Any], model: Any, parallel: Any) -> dict[str, Any]:
    """vLLM's speculative config for one of method `redrafter`; the settings go into `additional_config`.

    Raises RedrafterError if the drafter does not fit the model, or for options that are not supported with it.
    """
    config = {name.replace("-", "_"): value for name, value in config.items()}
    settings = Settings.from_speculative_config(config)
    if parallel.pipeline_parallel_size > 1:
        raise RedrafterError(
            "Method redrafter does not support pipeline parallelism; use --tensor-parallel-size instead of "
            "--pipeline-parallel-size."
        )
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise RedrafterError(
            "Method redrafter needs vLLM's V1 model runner: unset VLLM_USE_V2_MODEL_RUNNER, or set it to 0."
        )
    drafter = read_config(settings)
    check_shape(
        drafter,
        name=base_name(model.model),
        vocab_size=model.get_vocab_size(),
        hidden_size=model.get_hidden_size(),
    )
    additional = engine_args.additional_config or {}
    engine_args.additional_config = {**additional, METHOD: settings.model_dump(mode="json")}
    length = config.get("num_speculative_tokens", drafter.beam_length)
    kept = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": length}
    schedule = config.get("num_speculative_tokens_per_batch_size")
    return kept if schedule is None else {**kept, "num_speculative_tokens_per_batch_size": schedule}
