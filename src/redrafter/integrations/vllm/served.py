"""The model that a vLLM worker serves: its token embedding, and the fingerprint by which a drafter knows it.

Guarantees the embeddings that transformers' model of the same config computes, also if vLLM divides the table between
devices or wraps it for LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from redrafter.errors import RedrafterError
from redrafter.targets.fingerprint import Fingerprint, checkpoint_fingerprint, embedding_digests
from redrafter.targets.structure import public_name


class ServedModel:
    """A model in a worker of vLLM, as `targets.fingerprint.Identified`."""

    def __init__(self, model: nn.Module, config: Any):
        """`config` is vLLM's `ModelConfig`.  Raises RedrafterError if the model has no token embedding of its own."""
        self.vocab_size: int = config.get_vocab_size()
        self.hidden_size: int = config.get_hidden_size()
        self.name = public_name(config.model)
        self._path, self._revision = config.model, config.revision
        self._table_name, self._table = _embedding(model, self.hidden_size)
        self._scale = embedding_scale(config.hf_text_config)
        self.dtype: torch.dtype = config.dtype
        self.device: torch.device = next(self._table.parameters()).device

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        """Token embeddings without adapters.  All workers of a tensor-parallel group must call it together."""
        rows = self._table(tokens.flatten()).unflatten(0, tokens.shape).to(self.dtype)
        return rows if self._scale is None else rows * self._scale.to(rows)  # type: ignore[no-any-return]

    def fingerprint(self) -> Fingerprint:
        """Digests of the embedding in memory and, for a model that has a folder, of the weights in its files."""
        digests = embedding_digests(
            lambda ids: self._table(ids.to(self.device)).to(self.dtype), self.vocab_size, self.hidden_size
        )
        folder = _local_folder(self._path, self._revision)
        stored = Fingerprint() if folder is None else checkpoint_fingerprint(folder, self._table_name)
        return stored.model_copy(update={"embedding": digests})


def _embedding(model: nn.Module, hidden_size: int) -> tuple[str, VocabParallelEmbedding]:
    """The last two parts of the token embedding's name, and the embedding.  LoRA wraps it as `base_layer`."""
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            if module.embedding_dim != hidden_size:
                break
            return f"{name.removesuffix('.base_layer').rpartition('.')[2]}.weight", module
    raise RedrafterError(f"{type(model).__name__} has no token embedding that method redrafter can use.")


def embedding_scale(config: Any) -> Tensor | None:
    """The factor that transformers' token embedding multiplies its rows by; None if it is a plain table.

    Gemma 3 and its relatives have one; vLLM multiplies outside of the table.  Raises RedrafterError for an embedding of
    a form that is not known.
    """
    try:
        with torch.device("meta"):
            embedding = AutoModelForCausalLM.from_config(config).get_input_embeddings()
    except Exception:  # a model that transformers does not know, in vLLM's own code: most use plain tables
        return None
    if type(embedding) is nn.Embedding:
        return None
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is None:
        raise RedrafterError(f"The token embedding of {config.model_type} models is not supported by method redrafter.")
    return torch.tensor(float(scale))


def _local_folder(path: str, revision: str | None) -> Path | None:
    """The folder with the files of a model that has been loaded; None if it was not loaded from files on this disk."""
    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # weights from another kind of storage: the embedding alone is compared
        return None
