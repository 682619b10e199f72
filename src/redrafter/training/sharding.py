"""A frozen target that is sharded over the processes of a run, for models that do not fit on one GPU.

Guarantees the model's own forward pass: each process keeps a part of every decoder layer, and a layer is gathered on
all of them while it runs (`torch.distributed.fsdp.fully_shard`).  Embedding, norms and output head are not sharded,
because they are also called separately.  Does not know the drafter.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from redrafter.errors import RedrafterError
from redrafter.training.recipe import processes


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shards a model in place over the processes of this run and moves this process's part to `device`.

    The model should be on the CPU, because only one layer at a time is complete on the device.  From then on all
    processes must run it equally often.  Raises RedrafterError if there is only one process, or no layer to shard.
    """
    if processes() < 2:
        raise RedrafterError("--shard-target needs several processes: start them with torchrun.")
    separate = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    kinds = set(model._no_split_modules or [])
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in kinds and not any(id(part) in separate for part in module.modules())
    ]
    if not layers:
        raise RedrafterError(f"{type(model).__name__} does not declare its layers, so it cannot be sharded.")
    state = PartialState(cpu=device.type == "cpu")
    mesh = init_device_mesh(device.type, (state.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    model.to(device)
    complete = {parameter for parameter in model.parameters() if parameter not in sharded}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=complete)  # enables prefetching of layers
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether all processes must run the model together."""
    return isinstance(model, FSDPModule)


def bytes_here(model: PreTrainedModel) -> int:
    """Bytes of the weights that this process keeps."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
