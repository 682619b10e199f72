"""A frozen target divided among processes, for one that is too large for a GPU.

Promises the model's own forward: each process keeps its part of every decoder layer, and a layer is put together on all
of them while it runs (`torch.distributed.fsdp.fully_shard`).  Embedding, norms and output head stay whole, as they are
used alone.  Does not know the drafter.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from redrafter.errors import RedrafterError


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Divides a model in place among the processes of this run, and puts this one's part on its device.

    The model should be on the CPU: of what the device holds at one time, only a layer is whole.  All processes must run
    it equally often from here on.  Raises RedrafterError where there is one process alone, or no layer to divide.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise RedrafterError("A target can be divided among several processes only: start them by torchrun.")
    own = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    kinds = set(model._no_split_modules or [])
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in kinds and not any(id(part) in own for part in module.modules())
    ]
    if not layers:
        raise RedrafterError(f"{type(model).__name__} does not say what its layers are, so it cannot be divided.")
    state = PartialState(cpu=device.type == "cpu")
    mesh = init_device_mesh(device.type, (state.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    divided = {parameter for layer in layers for parameter in layer.parameters()}
    model.to(device)
    whole = {parameter for parameter in model.parameters() if parameter not in divided}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)  # lets layers be fetched ahead
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether all processes must run it together."""
    return isinstance(model, FSDPModule)


def bytes_here(model: PreTrainedModel) -> int:
    """Bytes of the weights that this process keeps."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
