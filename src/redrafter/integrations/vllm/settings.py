"""The speculative config of method `redrafter`: its fields, and what can be refused before an engine starts.

Does not import vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from redrafter.errors import RedrafterError
from redrafter.heads.recurrent import DrafterConfig, RecurrentDrafter
from redrafter.proposers.loading import kind_of
from redrafter.utils import hub

METHOD = "redrafter"
"""The method's name in the speculative config, and the key of its settings in vLLM's `additional_config`."""

VLLM_FIELDS = ("method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size")
"""Fields of vLLM's own `SpeculativeConfig` that keep their meaning."""


class Settings(BaseModel):
    """What the processes of an engine must know about the drafter.  JSON, because vLLM hashes it with its config.

    `seeded`: tokens are sampled with this package's noise, a function of a request's seed and the position, and the
    drafter ranks its candidates by it.  `any_target`: a drafter that was trained for another model of the same shape is
    accepted.  `max_verified_tokens`: the number of tokens, drafted or not, that a step verifies for all requests
    together; drafts become shorter if there are more requests, and stop at this number of requests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    drafter: str
    revision: str | None = None
    seeded: bool = False
    any_target: bool = False
    max_verified_tokens: PositiveInt | None = None

    @classmethod
    def from_speculative_config(cls, config: Mapping[str, Any]) -> Self:
        """The settings in a speculative config.  Raises RedrafterError for missing, unknown and invalid fields."""
        if not isinstance(config.get("model"), str):
            raise RedrafterError("The speculative config needs a field model: the folder or Hub id of a drafter.")
        own = {name: value for name, value in config.items() if name not in VLLM_FIELDS}
        known = [name for name in cls.model_fields if name != "drafter"]
        for name in own:
            if name not in known:
                raise RedrafterError(
                    f"Method redrafter has no field {name} in the speculative config; its fields are "
                    f"{', '.join([*VLLM_FIELDS, *known])}."
                )
        try:
            return cls(drafter=config["model"], **own)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RedrafterError(f"Field {field} of the speculative config: {first['msg']}.") from None


def read_config(settings: Settings) -> DrafterConfig:
    """The drafter's config.  Raises RedrafterError if there is no drafter or if vLLM cannot draft with it."""
    name = settings.drafter
    if kind_of(name) is not RecurrentDrafter:
        raise RedrafterError(
            f"{name} is not a recurrent drafter: method redrafter supports no other heads or models in vLLM."
        )
    config = DrafterConfig.from_file(hub.fetch(name, revision=settings.revision) / hub.CONFIG)
    if config.context_layers:
        layers = ", ".join(map(str, config.context_layers))
        raise RedrafterError(
            f"{name} reads the outputs of layers {layers} (context_layers), which method redrafter does not support in "
            "vLLM; train a drafter without --context-layers."
        )
    if config.context_positions > 1:
        raise RedrafterError(
            f"{name} reads the model's states at {config.context_positions} positions (context_positions), which "
            "method redrafter does not support in vLLM; train a drafter with one."
        )
    return config


def check_shape(config: DrafterConfig, *, name: str, vocab_size: int, hidden_size: int) -> None:
    """Raises RedrafterError if a drafter does not fit the shape of the served model `name`."""
    if (config.vocab_size, config.hidden_size) != (vocab_size, hidden_size):
        raise RedrafterError(
            f"This drafter was made for {config.target or 'a model that it does not name'} (vocabulary "
            f"{config.vocab_size}, hidden size {config.hidden_size}), not for {name} (vocabulary {vocab_size}, hidden "
            f"size {hidden_size})."
        )
