"""Any causal language model of transformers, unmodified, as a verifier of draft trees.

Promises the model's own logits, and the hidden state that its output head reads, at every node of a tree; refuses a
model for which it cannot, with the reason.  Uses the public forward alone, so quantised, sharded and adapted models
work alike.  Runs a copy of the modules that shares their weights (`redrafter.targets.isolation`): the caller's model is never
changed, and its training mode does not matter.  Does not know how trees are made nor what is kept of them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from redrafter.core.cache import LayerShape, SlotCache
from redrafter.core.tree import DraftTree, ancestors_of, chain, tree_mask
from redrafter.core.tree_attention import NAME, packed, register
from redrafter.errors import RedrafterError
from redrafter.heads.config import HeadConfig
from redrafter.kernels import has_kernels
from redrafter.targets.fingerprint import Fingerprint, fingerprint
from redrafter.targets.isolation import isolated
from redrafter.targets.locks import ModelLock
from redrafter.utils.memory import check_left

MAX_ATTENTION_NODES = 256
"""Nodes of a tree that the kernels of `fast.attention` verify at once; longer chunks of a prompt see a dense mask."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_Kinds = list[tuple[torch.device, torch.dtype]]
_probed: weakref.WeakKeyDictionary[nn.Module, tuple[_Kinds, tuple[list[LayerShape], bool, bool]]] = (
    weakref.WeakKeyDictionary()
)
"""What is known of a model, and where and in what dtype its weights were when it was found out."""


def packed_mask(
    segments: Int[Tensor, "B P"], positions: Int[Tensor, "B P"], *, window: int | None = None
) -> Bool[Tensor, "B P P"]:
    """Which tokens each token attends to where several texts share a row: those before it in its own, and itself."""
    mask = (segments[:, :, None] == segments[:, None]).tril()
    if window is not None:
        mask = mask & (positions[:, :, None] - positions[:, None] < window)
    return mask


class Target:
    """A causal language model and what decoding needs to know of it."""

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()):
        """Takes a `PreTrainedModel`, or a wrapper of PEFT or `torch.compile` around one.

        `layers`: numbers, from 1, of those whose outputs are given beside what the output head reads.  Raises
        RedrafterError where the model cannot verify trees or lacks such a layer.
        """
        self.model = unwrapped(model)
        """The caller's, which is never run here."""
        _refuse_by_structure(self.model, self.model.config.get_text_config())
        self.module: PreTrainedModel = isolated(self.model)
        """The copy that runs, in evaluation mode; it may be changed."""
        self.config: Any = self.module.config.get_text_config()
        self.head: nn.Module = self.module.get_output_embeddings()
        self.embed: nn.Embedding = self.module.get_input_embeddings()
        self.device: torch.device = _device(self.embed)
        self.dtype: torch.dtype = self.model.dtype
        self.hidden_size: int = self.config.hidden_size
        self.state_size: int = (1 + len(layers)) * self.hidden_size
        self.layers: tuple[int, ...] = tuple(layers)
        self._layers = _numbered(self.module, self.config, layers)
        self.vocab_size: int = self.config.vocab_size
        self.context_length: int | None = _context_length(self.config)
        self.name: str | None = _public_name(self.model.config._name_or_path)
        self.revision: str | None = getattr(self.model.config, "_commit_hash", None)
        types = getattr(self.config, "layer_types", None)
        self._layer_types: list[str] | None = sorted(set(types)) if types else None
        self._window: int | None = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "use_sliding_window", True) is False:
            self._window = None
        self._shapes: list[LayerShape] = []
        self.packs = False
        kinds = [(one.device, one.dtype) for one in self.model.parameters()]
        with ModelLock(self.model):
            if self.model not in _probed or _probed[self.model][0] != kinds:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    _probed[self.model] = kinds, self._probe()
        self._shapes, self.head_alone, self.packs = _probed[self.model][1]
        """`head_alone`: `logits` asks the output head and nothing else.  `packs`: trees are verified by kernels."""

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """All of them, first to last; empty where they were not found."""
        return _decoder_layers(self.module, self.config)

    def new_cache(self, *, batch: int, slots: int) -> SlotCache:
        """Memory for `batch` rows of `slots` positions each, all of it at once.

        Raises RedrafterError, with the arithmetic, where the device has not so much left.
        """
        rows = sum(one.heads * (one.key_size + one.value_size) * one.dtype.itemsize for one in self._shapes)
        check_left(
            self.device,
            batch * slots * rows,
            f"Keys and values of {batch} x {slots:,} tokens",
            "lower batch_size or max_new_tokens",
            arithmetic=f", {rows / 2**10:,.1f} KiB a token in {len(self._shapes)} layers",
        )
        return SlotCache(self._shapes, batch=batch, slots=slots)

    def forward(
        self,
        tree: DraftTree,
        length: Int[Tensor, " B"],
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None = None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "B M V"]]:
        """One run of the model over trees whose nodes take the slots `length … length + N - 1` of their rows.

        Returns the hidden states of every node, those of `layers` and last what the output head reads, and logits: of
        every node (M = N), or of those that `select` numbers.
        """
        slots = length[:, None] + torch.arange(tree.size, device=length.device)
        position = length[:, None] + tree.depth
        if self.packs and tree.size <= MAX_ATTENTION_NODES:
            cache.window.visible = None
            mask = packed(tree, length)
            masks = mask if self._layer_types is None else dict.fromkeys(self._layer_types, mask)
            with self._attending(NAME):
                return self._run(tree.tokens, position, slots, masks, cache, select)
        visible = partial(tree_mask, tree, length, slots=cache.visible)
        return self.run(tree.tokens, position, slots, visible, cache, select)

    def run(
        self,
        tokens: Int[Tensor, "B N"],
        position: Int[Tensor, "B N"],
        slots: Int[Tensor, "B N"],
        visible: Callable[..., Tensor],
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None = None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "B M V"]]:
        """One run of the model over tokens that go to the given slots of their rows and see what `visible` says.

        `visible(window=...)` gives a bool mask [B, N, cache.visible].  Returns as `forward` does.
        """
        return self._run(tokens, position, slots, self._masks(visible), cache, select)

    def _run(
        self,
        tokens: Int[Tensor, "B N"],
        position: Int[Tensor, "B N"],
        slots: Int[Tensor, "B N"],
        masks: Tensor | dict[str, Tensor],
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "B M V"]]:
        if self.context_length is not None:  # nodes past the end are never kept, but tables must not be overrun
            position = position.clamp(max=self.context_length - 1)
        cache.window.slots = slots
        with self._states(select) as captured:
            output = self.module(
                input_ids=tokens,
                position_ids=position,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
            )
        return self._joined(captured), output.logits.to(self.device)

    def hidden_states(self, input_ids: Int[Tensor, "B P"], segments: Int[Tensor, "B P"]) -> Float[Tensor, "B P state"]:
        """The states of `layers` and last what the output head would read, at every position of plain text.

        Rows are padded right; no logits are computed.

        `segments` numbers the texts that share a row from 1, 0 is padding: none attends to another, and each begins at
        position 0.  Of rows with one text it is their attention mask.
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        begins = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        positions = index - (index * begins).cummax(dim=1).values
        mask: Any = (segments > 0).long()
        if bool((segments > 1).any()):
            mask = self._masks(partial(packed_mask, segments, positions))
        with self._states(torch.zeros_like(input_ids[:, :1])) as captured:
            self.module(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            )
        return self._joined(captured)

    def logits(self, hidden: Float[Tensor, "C H"]) -> Float[Tensor, "C V"]:
        """The model's own logits, scaled or capped as the family does, from what its output head reads."""

        if self.head_alone:
            device = _device(self.head)
            return self.head(hidden.to(device, self.dtype)).to(self.device)  # type: ignore[no-any-return]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (hidden[None].to(args[0]), *args[1:])

        handle = self.head.register_forward_pre_hook(hook)
        try:  # one token runs through the layers only to reach the head
            token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            return self.module(input_ids=token, use_cache=False).logits[0].to(self.device)  # type: ignore[no-any-return]
        finally:
            handle.remove()

    def fingerprint(self) -> Fingerprint:
        """What identifies the model's weights; empty for weights that cannot be read."""
        return fingerprint(self.model, self.embed, self.vocab_size)

    def check_drafter(self, config: HeadConfig, *, weights: bool = True, any_target: bool = False) -> None:
        """Raises RedrafterError if a drafter was made for another model.

        Weights are compared where the drafter knows those of its model and they can be read here, and names otherwise.
        With `any_target` only the shape must fit.  Without `weights` only names and shapes are compared.
        """
        made_for = config.target or "a model that it does not name"
        this = self.name or "this model"
        if (config.vocab_size, config.hidden_size) != (self.vocab_size, self.hidden_size):
            raise RedrafterError(
                f"This drafter was made for {made_for} (vocabulary {config.vocab_size}, hidden size "
                f"{config.hidden_size}), not for {this} (vocabulary {self.vocab_size}, hidden size {self.hidden_size})."
            )
        if any_target:
            return
        known = config.target_fingerprint
        same = known.matches(self.fingerprint()) if known is not None and weights else None
        differs = "" if same is None else ", whose weights differ"
        if same is None and config.target and self.name:
            same = _base_name(config.target) == _base_name(self.name)
        if same is False:
            raise RedrafterError(
                f"This drafter was made for {made_for}, not for {this}{differs}; to use it all the same, with fewer "
                "drafts accepted, pass any_target=True (--any-target on the command line)."
            )

    @contextmanager
    def _states(self, select: Int[Tensor, "B M"] | None) -> Iterator[list[Tensor]]:
        """Captures what `layers` give and last what the output head is given, whatever the family calls it.

        The head is handed `select` of it alone.
        """
        captured: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            captured.append(args[0])
            return (_at(args[0], select), *args[1:])

        def layer_hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(layer_hook) for layer in self._layers]
        handles.append(self.head.register_forward_pre_hook(hook))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _joined(self, captured: list[Tensor]) -> Float[Tensor, "B N state"]:
        """One tensor of what was captured; a model spread over devices ends on another one than it begins."""
        if len(captured) == 1:
            return captured[0].to(self.device)
        return torch.cat([one.to(self.device) for one in captured], dim=-1)

    def _masks(self, visible_within: Callable[..., Tensor]) -> Tensor | dict[str, Tensor]:
        """An attention mask in the form the family reads: additive, one for each type of layer."""

        def additive(window: int | None) -> Tensor:
            visible = visible_within(window=window)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]

        if self._layer_types is None:
            return additive(self._window)
        return {kind: additive(self._window if kind == "sliding_attention" else None) for kind in self._layer_types}

    @contextmanager
    def _attending(self, name: str) -> Iterator[None]:
        """The model's layers attend by the function that transformers knows under this name."""
        before = self.config._attn_implementation
        self.config._attn_implementation = name
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def _probe(self) -> tuple[list[LayerShape], bool, bool]:
        """Learns what the layers keep, whether the head alone makes the logits and whether the kernels serve.

        Holds a small tree of unequal rows against the model's own forward.
        """
        ids = torch.arange(1, 9, device=self.device) % self.vocab_size
        prompts = [ids[:2], ids[2:5]]
        expected = []
        for prompt in prompts:
            with self._states(None) as captured:
                output = self.module(input_ids=torch.cat((prompt, ids[5:7]))[None], use_cache=True)
            if not captured:
                raise self._refusal("its output head is not called as a module, so its input cannot be read")
            expected.append(captured[-1][0, -1].to(self.device))
            if not bool(expected[-1].isfinite().all()):
                raise self._not_finite()
        head_alone = torch.equal(self.head(captured[-1]).to(output.logits), output.logits)
        self._shapes = []
        for layer in getattr(output.past_key_values, "layers", []):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.ndim != 4:
                raise self._refusal("not all of its layers keep keys and values")
            self._shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device))
        if not self._shapes:
            raise self._refusal("it returns no cache of keys and values")
        if expected[0].shape[-1] != self.hidden_size or self.embed.weight.shape[-1] != self.hidden_size:
            raise self._refusal("its embedding, hidden state and output head differ in width")

        cache = self.new_cache(batch=2, slots=8)
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        start = torch.zeros(2, dtype=torch.long, device=self.device)
        try:
            self.forward(chain(padded), start, cache)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._refusal(f"its forward takes no tree mask ({error})") from error
        tokens = torch.stack((ids[5], ids[7], ids[6])).expand(2, 3)  # a root and two children, the second one checked
        parents = torch.zeros_like(tokens)
        depth = torch.tensor([0, 1, 1], device=self.device).expand(2, 3)
        tree = DraftTree(tokens, parents, depth, depth >= 0, ancestors_of(parents, max_depth=1))
        wanted = torch.stack(expected).double()

        def agrees() -> bool:
            hidden, _ = self.forward(tree, torch.tensor([2, 3], device=self.device), cache)
            distance = (hidden[:, 2, -self.hidden_size :].double() - wanted).norm() / wanted.norm()
            return bool(distance < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1))

        if not agrees():
            raise self._refusal("its states at the nodes of a tree differ from those of plain text")
        self.packs = has_kernels(self.device, self.dtype)
        if self.packs:
            register()
            try:
                self.packs = agrees()
            except torch.OutOfMemoryError:  # says nothing of the kernels
                raise
            except Exception:  # attention that does not ask transformers which function to call, or kernels too large
                self.packs = False
        return self._shapes, head_alone, self.packs

    def _not_finite(self) -> RedrafterError:
        """Names the first parameter that holds NaN or infinity, if there is one."""
        for name, one in self.model.named_parameters():
            if one.is_floating_point() and not one.is_meta and not bool(one.isfinite().all()):
                return RedrafterError(f"Parameter {name} of {self.name or 'the model'} holds NaN or infinity.")
        kind = str(self.dtype).removeprefix("torch.")
        return RedrafterError(
            f"The hidden states of {self.name or 'the model'} are NaN or infinite in {kind}: load it in another dtype."
        )

    def _refusal(self, reason: str) -> RedrafterError:
        return RedrafterError(f"{type(self.model).__name__} cannot verify draft trees: {reason}.")


def unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers inside the wrappers of PEFT, whose adapters stay in effect, and of `torch.compile`.

    What `torch.compile` compiled is not used: decoding runs the model itself.  Raises RedrafterError for other models.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise RedrafterError("Adapters that put virtual tokens before the prompt are not supported; LoRA is.")
        model = getattr(model.get_base_model(), "_orig_mod", model.get_base_model())
    if not isinstance(model, PreTrainedModel):
        raise RedrafterError(f"{type(model).__name__} is not a model of transformers.")
    return model


def _refuse_by_structure(model: PreTrainedModel, config: Any) -> None:
    """Raises RedrafterError for what can be told without running the model."""
    attention = getattr(model.config, "_attn_implementation", None)
    types = set(getattr(config, "layer_types", None) or [])
    reason = None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        reason = "it has no language-model head"
    elif getattr(model, "_is_stateful", False):
        reason = "it keeps a recurrent state, which cannot branch"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "it takes no position_ids, so branches cannot share a position"
    elif not types <= _LAYER_TYPES:
        reason = f"its layers of type {', '.join(sorted(types - _LAYER_TYPES))} take no tree mask"
    elif attention not in ("sdpa", "eager"):
        reason = f"its attention implementation {attention} takes no tree mask; load it with attn_implementation='sdpa'"
    if reason is not None:
        raise RedrafterError(f"{type(model).__name__} cannot verify draft trees: {reason}.")


def _device(layer: nn.Module) -> torch.device:
    """Where a layer computes; accelerate keeps weights that it offloads on the meta device between calls."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return weight.device if weight.device.type != "meta" or device is None else torch.device(device)


def _context_length(config: Any) -> int | None:
    """Positions in which a text depends on nothing but itself; None where the config does not say.

    With longrope (arXiv 2402.13753) a run beyond the original context takes other frequencies for every position of
    every row, so that a draft, or a neighbour, would change a text before any of it gets there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or for each type
    short = [one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"]
    lengths = [getattr(config, "max_position_embeddings", None), *short]
    return min((one for one in lengths if one is not None), default=None)


def _decoder_layers(model: PreTrainedModel, config: Any) -> list[nn.Module]:
    """The decoder's layers, whatever the family calls their list; empty where there is no such list."""
    count = config.num_hidden_layers
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return lists[0] if lists else []


def _numbered(model: PreTrainedModel, config: Any, layers: Sequence[int]) -> list[nn.Module]:
    """The decoder's layers of those numbers."""
    if not layers:
        return []
    count = config.num_hidden_layers
    if list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] < count:
        raise RedrafterError(f"context_layers must be different numbers from 1 to {count - 1}, rising, not {layers}.")
    found = _decoder_layers(model, config)
    if not found:
        raise RedrafterError(f"The layers of {type(model).__name__} were not found, so context_layers cannot be had.")
    return [found[number - 1] for number in layers]


def _at(hidden: Float[Tensor, "B N H"], select: Int[Tensor, "B M"] | None) -> Float[Tensor, "B M H"]:
    """Some positions of each row, or all where none is selected."""
    if select is None:
        return hidden
    return hidden.gather(1, select.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def _public_name(told: str | None) -> str | None:
    """A hub id as it is; of a local folder its own name alone, which is all that may leave the machine."""
    if not told:
        return None
    folder = Path(told)
    return _base_name(str(folder.resolve())) if folder.exists() or folder.is_absolute() else told


def _base_name(name: str) -> str:
    """The last part of a hub id or path, looking through the hub's cache folders."""
    parts = Path(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else parts[-1]
