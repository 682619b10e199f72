"""Any causal language model of transformers, unmodified, as a verifier of draft trees.

Guarantees the model's own logits, and the hidden state that its output head reads, at every node of a tree.  A model
for which this is impossible is refused with the reason.  Only the public forward is used, so quantised, sharded and
adapted models work too.  Runs a copy of the modules that shares their weights (`redrafter.targets.isolation`): the
caller's model is never changed, and its training mode does not matter.  Does not know how trees are made or what is
kept of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from redrafter.core.cache import LayerShape, SlotCache
from redrafter.core.rows import PromptChunk, at_positions
from redrafter.core.tree import DraftTree, chain, tree_mask
from redrafter.core.tree_attention import MAX_ATTENTION_NODES, NAME, bit_mask
from redrafter.kernels import has_kernels
from redrafter.targets import structure
from redrafter.targets.fingerprint import Fingerprint, fingerprint
from redrafter.targets.isolation import isolated
from redrafter.targets.locks import ModelLock
from redrafter.targets.probe import probe
from redrafter.utils.memory import check_left


def packed_mask(
    segments: Int[Tensor, "B P"], positions: Int[Tensor, "B P"], *, window: int | None = None
) -> Bool[Tensor, "B P P"]:
    """The causal mask for rows that contain several texts: each token attends only to its own text."""
    mask = (segments[:, :, None] == segments[:, None]).tril()
    if window is not None:
        mask = mask & (positions[:, :, None] - positions[:, None] < window)
    return mask


class Target:
    """A causal language model with the properties that decoding needs."""

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()):
        """Takes a `PreTrainedModel`, or a wrapper of PEFT or `torch.compile` around one.

        `layers` are the numbers, from 1, of layers whose outputs are returned in addition to the input of the output
        head.  Raises RedrafterError if the model cannot verify trees or lacks such a layer.
        """
        self._held: PreTrainedModel | None = structure.unwrapped(model)
        self._model = weakref.ref(self._held)
        structure.check_structure(self.model, self.model.config.get_text_config())
        self.module: PreTrainedModel = isolated(self.model)
        """The copy that runs, in evaluation mode.  It may be changed."""
        self.config: Any = self.module.config.get_text_config()
        self.head: nn.Module = self.module.get_output_embeddings()
        self.embed: nn.Embedding = self.module.get_input_embeddings()
        self.device: torch.device = structure.device_of(self.embed)
        self.dtype: torch.dtype = self.model.dtype
        self.hidden_size: int = self.config.hidden_size
        self.state_size: int = (1 + len(layers)) * self.hidden_size
        self.layers: tuple[int, ...] = tuple(layers)
        self.vocab_size: int = self.config.vocab_size
        self.context_length: int | None = structure.context_length(self.config)
        self.name: str | None = structure.public_name(self.model.config._name_or_path)
        self.revision: str | None = getattr(self.model.config, "_commit_hash", None)
        self._layers = structure.numbered_layers(self.module, self.config, layers)
        types = getattr(self.config, "layer_types", None)
        self._layer_types: list[str] | None = sorted(set(types)) if types else None
        self._window = structure.sliding_window(self.config)
        self.shapes: list[LayerShape] = []
        """Cached tensors of each layer."""
        self.tree_kernels = False
        """Whether the kernels of `core.tree_attention` verify trees."""
        self.causal_prompts = False
        """Whether the model's own causal attention reads prompts into a cache."""
        with ModelLock(self.model):
            probed = probe(self)
        self.shapes, self.head_alone = probed.shapes, probed.head_alone
        self.causal_prompts = probed.causal_prompts
        self.tree_kernels = bool(probed.tree_kernels) and has_kernels(self.device, self.dtype)

    @property
    def model(self) -> PreTrainedModel:
        """The caller's model, which never runs here."""
        model = self._model()
        assert model is not None
        return model

    def forget_model(self) -> None:
        """From now on, this object does not keep the caller's model alive."""
        self._held = None

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The decoder's layers in order; empty if the model has no list of them."""
        return structure.decoder_layers(self.module, self.config)

    def new_cache(self, *, batch: int, slots: int) -> SlotCache:
        """Allocates keys and values for `batch` rows of `slots` positions.

        Raises RedrafterError, with the required and available memory, if there is not enough.
        """
        token = sum(one.token_bytes for one in self.shapes)
        check_left(
            self.device,
            batch * slots * token,
            f"Keys and values of {batch} x {slots:,} tokens",
            "lower batch_size or max_new_tokens",
            arithmetic=f", {token / 2**10:,.1f} KiB a token in {len(self.shapes)} layers",
        )
        return SlotCache(self.shapes, batch=batch, slots=slots)

    def forward(
        self,
        tree: DraftTree,
        length: Int[Tensor, " B"],
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None = None,
        rows: Int[Tensor, " B"] | None = None,
        heads: int | None = None,
        alive: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "R M V"]]:
        """Runs the model over trees whose nodes go into slots `length … length + N - 1` of their rows.

        Returns the hidden states of all nodes (those of `layers`, then the output head's input), and the logits of all
        nodes (M = N) or of the nodes in `select`, of all rows or of the first `heads` rows.  `rows` are the rows of the
        cache, None for the first B in order; others than these need the kernels for tree attention.  The results of
        rows that are not `alive` (0) do not matter: the kernels read little for them.
        """
        slots = length[:, None] + torch.arange(tree.size, device=length.device)
        position = length[:, None] + tree.depth
        cache.window.rows, cache.window.only_new = rows, False
        if self.tree_kernels and tree.size <= MAX_ATTENTION_NODES:
            cache.window.visible = None
            mask = bit_mask(tree, length if alive is None else length * alive, rows)
            masks = mask if self._layer_types is None else dict.fromkeys(self._layer_types, mask)
            with self._attention(NAME):
                return self._run(tree.tokens, position, slots, masks, cache, select, heads)
        if self._sees_all(tree, length, cache):
            return self._run(tree.tokens, position, slots, None, cache, select, heads)
        visible = partial(tree_mask, tree, length, slots=cache.visible)
        return self._run(tree.tokens, position, slots, self._masks(visible), cache, select, heads)

    def _sees_all(self, tree: DraftTree, length: Int[Tensor, " B"], cache: SlotCache) -> bool:
        """Whether it is one token that attends to all visible slots, so that the model needs no mask (on a CPU)."""
        full = self._window is None and set(self._layer_types or ()) <= {"full_attention"}
        alone = tree.tokens.numel() == 1 and self.device.type == "cpu" and full and self.causal_prompts
        return alone and cache.visible == int(length) + 1

    def read_prompt(self, chunk: PromptChunk, cache: SlotCache) -> Float[Tensor, "V N state"]:
        """Runs prompt tokens into their rows of the cache and returns the hidden states of all of them.

        Texts that begin with the chunk run through the model's own causal attention.  Later chunks need the kernels for
        tree attention, or one row at a time.
        """
        slots = chunk.begin[:, None] + torch.arange(chunk.tokens.shape[1], device=chunk.begin.device)
        first = torch.zeros_like(chunk.begin[:, None])
        if chunk.from_start and self.causal_prompts:
            cache.window.rows, cache.window.only_new = chunk.rows, True
            return self._run(chunk.tokens, slots, slots, None, cache, first)[0]
        if self.tree_kernels and chunk.tokens.shape[1] <= MAX_ATTENTION_NODES:
            return self.forward(chain(chunk.tokens), chunk.begin, cache, first, chunk.rows)[0]
        states = []
        for i, row in enumerate(chunk.rows.tolist()):
            view = cache.view(slice(row, row + 1))
            view.window.visible = cache.window.visible
            one = slice(i, i + 1)
            states.append(self.forward(chain(chunk.tokens[one]), chunk.begin[one], view, first[one])[0])
        return torch.cat(states)

    def run(
        self,
        tokens: Int[Tensor, "B N"],
        position: Int[Tensor, "B N"],
        slots: Int[Tensor, "B N"],
        visible: Callable[..., Tensor],
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None = None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "B M V"]]:
        """Runs the model over tokens that go into the given slots.  `visible(window=...)` returns the bool mask
        [B, N, cache.visible].  Returns the same as `forward`.
        """
        return self._run(tokens, position, slots, self._masks(visible), cache, select)

    def _run(
        self,
        tokens: Int[Tensor, "B N"],
        position: Int[Tensor, "B N"],
        slots: Int[Tensor, "B N"],
        masks: Tensor | dict[str, Tensor] | None,
        cache: SlotCache,
        select: Int[Tensor, "B M"] | None,
        heads: int | None = None,
    ) -> tuple[Float[Tensor, "B N state"], Float[Tensor, "R M V"]]:
        if self.context_length is not None:  # nodes beyond the end are never kept, but must not overrun tables
            position = position.clamp(max=self.context_length - 1)
        cache.window.slots = slots
        with self.captured(select, heads) as captured:
            output = self.module(
                input_ids=tokens,
                position_ids=position,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
            )
        return self._concatenated(captured), output.logits.to(self.device)

    def hidden_states(self, input_ids: Int[Tensor, "B P"], segments: Int[Tensor, "B P"]) -> Float[Tensor, "B P state"]:
        """The states of `layers` and the output head's input at every position of plain text, without logits.

        `segments` numbers the texts in a row from 1; 0 is padding, on the right.  Texts do not attend to each other,
        and each begins at position 0.  For rows with one text, it is the attention mask.
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        begins = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        positions = index - (index * begins).cummax(dim=1).values
        mask: Any = (segments > 0).long()
        if bool((segments > 1).any()):
            mask = self._masks(partial(packed_mask, segments, positions))
        with self.captured(torch.zeros_like(input_ids[:, :1])) as captured:
            self.module(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return self._concatenated(captured)

    def logits(self, hidden: Float[Tensor, "C H"]) -> Float[Tensor, "C V"]:
        """The model's logits for inputs of its output head, including the family's scaling or capping."""
        if self.head_alone:
            device = structure.device_of(self.head)
            return self.head(hidden.to(device, self.dtype)).to(self.device)  # type: ignore[no-any-return]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (hidden[None].to(args[0]), *args[1:])

        handle = self.head.register_forward_pre_hook(hook)
        try:  # one token runs through all layers in order to reach the head
            token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            return self.module(input_ids=token, use_cache=False).logits[0].to(self.device)  # type: ignore[no-any-return]
        finally:
            handle.remove()

    def fingerprint(self) -> Fingerprint:
        """Digests that identify the model's weights; empty if the weights cannot be read."""
        return fingerprint(self.model, self.embed, self.vocab_size)

    @contextmanager
    def captured(self, select: Int[Tensor, "B M"] | None, heads: int | None = None) -> Iterator[list[Tensor]]:
        """Captures the outputs of `layers`, then the output head's input, of the runs within the context.

        The head receives only the positions in `select`, and only the first `heads` rows.
        """
        captured: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            captured.append(args[0])
            selected = args[0] if select is None else at_positions(args[0], select.to(args[0].device))
            return (selected[:heads], *args[1:])

        def layer_hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(layer_hook) for layer in self._layers]
        handles.append(self.head.register_forward_pre_hook(hook))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _concatenated(self, captured: list[Tensor]) -> Float[Tensor, "B N state"]:
        """The captured states as one tensor on the target's first device."""
        if len(captured) == 1:
            return captured[0].to(self.device)
        return torch.cat([state.to(self.device) for state in captured], dim=-1)

    def _masks(self, visible_within: Callable[..., Tensor]) -> Tensor | dict[str, Tensor]:
        """Additive attention masks in the form that the family expects: one, or one per type of layer."""

        def additive(window: int | None) -> Tensor:
            visible = visible_within(window=window)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]

        if self._layer_types is None:
            return additive(self._window)
        return {kind: additive(self._window if kind == "sliding_attention" else None) for kind in self._layer_types}

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Within the context, the layers use the attention function registered under this name."""
        before = self.config._attn_implementation
        self.config._attn_implementation = name
        try:
            yield
        finally:
            self.config._attn_implementation = before
