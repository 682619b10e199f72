"""A run-time test of a model: the shapes of its cache, and whether it verifies trees correctly.

Compares a small tree of two rows of unequal length with the model's own forward pass.  Results are kept per model until
its weights move or change their dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from redrafter.core.cache import LayerShape, SlotCache
from redrafter.core.rows import PromptChunk
from redrafter.core.tree import DraftTree, ancestors_of, chain
from redrafter.core.tree_attention import register
from redrafter.errors import RedrafterError
from redrafter.kernels import has_kernels
from redrafter.targets.structure import refusal

if TYPE_CHECKING:
    from redrafter.targets.target import Target


@dataclass(frozen=True)
class Probe:
    """What a probe found out."""

    shapes: list[LayerShape]
    """Cached tensors of each layer."""
    head_alone: bool
    """Whether the output head alone computes the logits from its input."""
    causal_prompts: bool
    """Whether the model reads prompts into a cache with its own causal attention."""
    tree_kernels: bool | None
    """Whether the kernels of `core.tree_attention` give the model's results; None if kernels did not run."""


_Placement = list[tuple[torch.device, torch.dtype]]
_probes: weakref.WeakKeyDictionary[nn.Module, tuple[_Placement, Probe]] = weakref.WeakKeyDictionary()


def probe(target: Target) -> Probe:
    """The results for a target, from an earlier call if possible.  Raises RedrafterError if it cannot verify trees."""
    placement = [(parameter.device, parameter.dtype) for parameter in target.model.parameters()]
    known, kernels = _probes.get(target.model), has_kernels(target.device, target.dtype)
    if known is None or known[0] != placement or (kernels and known[1].tree_kernels is None):
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            known = _probes[target.model] = placement, _run(target)
    return known[1]


def _run(target: Target) -> Probe:
    ids = torch.arange(1, 9, device=target.device) % target.vocab_size
    prompts = [ids[:2], ids[2:5]]
    shapes, head_alone, expected = _plain(target, [torch.cat((prompt, ids[5:7])) for prompt in prompts])
    target.shapes = shapes
    cache = target.new_cache(batch=2, slots=8)
    start = torch.zeros(2, dtype=torch.long, device=target.device)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    try:
        target.forward(chain(padded), start, cache)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise refusal(target.model, f"its forward takes no tree mask ({error})") from error
    tokens = torch.stack((ids[5], ids[7], ids[6])).expand(2, 3)  # a root and two children; the second is compared
    parents = torch.zeros_like(tokens)
    depth = torch.tensor([0, 1, 1], device=target.device).expand(2, 3)
    tree = DraftTree(tokens, parents, depth, depth >= 0, ancestors_of(parents, max_depth=1))

    def agrees() -> bool:
        hidden, _ = target.forward(tree, torch.tensor([2, 3], device=target.device), cache)
        distance = (hidden[:, 2, -target.hidden_size :].double() - expected).norm() / expected.norm()
        return bool(distance < (1e-3 if target.dtype in (torch.float32, torch.float64) else 0.1))

    if not agrees():
        raise refusal(target.model, "its states at the nodes of a tree differ from those of plain text")
    prompt = PromptChunk(padded, padded, start, torch.arange(2, device=target.device), from_start=True)
    causal = _reads_prompts(target, prompt, cache, agrees)
    kernels: bool | None = None
    if has_kernels(target.device, target.dtype):
        register()
        target.tree_kernels = True
        try:
            kernels = agrees()
        except torch.OutOfMemoryError:  # not a property of the kernels
            raise
        except Exception:  # attention that does not use transformers' interface, or kernels that are too large
            kernels = False
    return Probe(shapes, head_alone, causal, kernels)


def _reads_prompts(target: Target, chunk: PromptChunk, cache: SlotCache, agrees: Callable[[], bool]) -> bool:
    """Whether trees are verified after prompts that the model's own causal attention has read."""
    for pool in cache.pools:
        pool.zero_()
    target.causal_prompts = True
    try:
        target.read_prompt(chunk, cache)
        return agrees()
    except torch.OutOfMemoryError:  # not a property of the model
        raise
    except Exception:  # a model that makes its masks in another way
        return False


def _plain(target: Target, texts: list[Tensor]) -> tuple[list[LayerShape], bool, Tensor]:
    """Runs the texts without a tree: the shapes of the cache, `head_alone`, and the last states [texts, H]."""
    states = []
    for text in texts:
        with target.captured(None) as captured:
            output = target.module(input_ids=text[None], use_cache=True)
        if not captured:
            raise refusal(target.model, "its output head is not called as a module, so its input cannot be read")
        states.append(captured[-1][0, -1].to(target.device))
        if not bool(states[-1].isfinite().all()):
            raise _not_finite(target)
    head_alone = torch.equal(target.head(captured[-1]).to(output.logits), output.logits)
    shapes = []
    for layer in getattr(output.past_key_values, "layers", []):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4:
            raise refusal(target.model, "not all of its layers keep keys and values")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device))
    if not shapes:
        raise refusal(target.model, "it returns no cache of keys and values")
    if states[0].shape[-1] != target.hidden_size or target.embed.weight.shape[-1] != target.hidden_size:
        raise refusal(target.model, "its embedding, hidden state and output head differ in width")
    return shapes, head_alone, torch.stack(states).double()


def _not_finite(target: Target) -> RedrafterError:
    """Names the first parameter with NaN or infinity, if there is one."""
    name = target.name or "the model"
    for parameter, value in target.model.named_parameters():
        if value.is_floating_point() and not value.is_meta and not bool(value.isfinite().all()):
            return RedrafterError(f"Parameter {parameter} of {name} holds NaN or infinity.")
    dtype = str(target.dtype).removeprefix("torch.")
    return RedrafterError(f"The hidden states of {name} are NaN or infinite in {dtype}: load it in another dtype.")
