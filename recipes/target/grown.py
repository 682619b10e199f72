"""Pads a trained target and its draft heads to a larger shape without changing their outputs.

    python -m recipes.target.grown --target T --drafter D --output OUT [--hidden 4096 --layers 32 --heads 64 ...]

Speed depends on the shape and on the acceptance rate.  A small pair can be trained in minutes; padded, it costs as much
compute as a large one.  Guarantees the same logits and drafts, up to rounding.  Added weights are random, normal with a
standard deviation of 0.02, except for zeros where they would affect the original outputs, because a GPU multiplies
zeros faster.  Supports Llama, a recurrent drafter that reads only the last hidden state, Medusa heads, and an EAGLE
head, whose layer is a Llama layer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from redrafter import EagleHead, MedusaHeads, RecurrentDrafter, RedrafterError
from redrafter.heads.base import Head
from redrafter.proposers.loading import load_head

DEVIATION = 0.02


@dataclass(frozen=True)
class Places:
    """Indices of the original weights of a Llama layer, or of a similar layer, in a larger layer."""

    hidden: tuple[int, int]
    """Width of the residual stream: as it was and as it becomes."""
    inner: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    head_dim: int

    @property
    def share(self) -> float:
        """Original share of the width of the residual stream."""
        return self.hidden[0] / self.hidden[1]

    @cached_property
    def width(self) -> Tensor:
        """Indices in the residual stream."""
        return torch.arange(self.hidden[0])

    @cached_property
    def columns(self) -> Tensor:
        """Indices in the MLP."""
        return torch.arange(self.inner)

    @cached_property
    def keys(self) -> Tensor:
        """Indices of keys and values."""
        return _within(torch.arange(self.kv_heads[0]), self.head_dim)

    @cached_property
    def queries(self) -> Tensor:
        """Indices of queries; each head keeps its key head."""
        heads = torch.arange(self.heads[0])
        group, new = self.heads[0] // self.kv_heads[0], self.heads[1] // self.kv_heads[1]
        return _within(heads // group * new + heads % group, self.head_dim)

    def layer(self, there: nn.Module, here: nn.Module) -> None:
        """Copies a layer into a larger one, which writes nothing to the added widths."""
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _copy_block(getattr(there, norm).weight, getattr(here, norm).weight * self.share**0.5, self.width)
        for name, places in {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}.items():
            _copy_block(getattr(there.self_attn, name).weight, getattr(here.self_attn, name).weight, places, self.width)
        for name in ("gate_proj", "up_proj"):
            _copy_block(getattr(there.mlp, name).weight, getattr(here.mlp, name).weight, self.columns, self.width)
        _copy_and_zero(there.self_attn.o_proj.weight, here.self_attn.o_proj.weight, self.width, self.queries)
        _copy_and_zero(there.mlp.down_proj.weight, here.mlp.down_proj.weight, self.width, self.columns)


@torch.no_grad()
def grown_target(
    model: LlamaForCausalLM,
    *,
    hidden: int,
    layers: int,
    heads: int,
    inner: int,
    kv_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LlamaForCausalLM:
    """A model of the larger shape with the logits of `model`; the head size stays, and by default the grouping.

    The residual stream is zero in the added widths, because nothing writes to them.  The zeros shrink the root mean
    square by the root of the original share, which the norm weights compensate.  Added layers write nothing.  Raises
    RedrafterError if the model is not a plain Llama or is larger than the new shape.
    """
    old = model.config
    if old.model_type != "llama" or old.attention_bias or old.mlp_bias or old.pretraining_tp != 1:
        raise RedrafterError(f"Only Llama without biases can be grown, not this {old.model_type}.")
    kv_heads = _kv_heads(old, heads, kv_heads)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }
    _check_growth(old, sizes)
    places = Places(
        (old.hidden_size, hidden),
        old.intermediate_size,
        (old.num_attention_heads, heads),
        (old.num_key_value_heads, kv_heads),
        model.model.layers[0].self_attn.head_dim,
    )
    changes = {
        "tie_word_embeddings": False,
        "initializer_range": DEVIATION,
        "head_dim": places.head_dim,
        "rms_norm_eps": old.rms_norm_eps * places.share,
    }
    config = type(old).from_dict(old.to_dict() | sizes | changes)
    with torch.device(device):
        new = AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype).eval()
    new.generation_config = model.generation_config
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=DEVIATION)

    _copy_and_zero(new.model.embed_tokens.weight, model.model.embed_tokens.weight, columns=places.width)
    _copy_block(new.lm_head.weight, model.lm_head.weight, columns=places.width)
    _copy_block(new.model.norm.weight, model.model.norm.weight * places.share**0.5, places.width)
    for there, here in zip(new.model.layers, model.model.layers, strict=False):
        places.layer(there, here)
    for there in new.model.layers[old.num_hidden_layers :]:
        nn.init.zeros_(there.self_attn.o_proj.weight)
        nn.init.zeros_(there.mlp.down_proj.weight)
    return new


@torch.no_grad()
def grown_drafter(
    drafter: RecurrentDrafter,
    *,
    hidden: int,
    exit_dim: int | None = None,
    target: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> RecurrentDrafter:
    """A drafter for the padded target, named `target`, with the logits of `drafter` and blocks of width `exit_dim`.

    Original weights read nothing of the added widths.  `exit_dim` defaults to `hidden`.  A head without a projection
    (`exit_dim` twice the hidden size) gets one that copies, unless the result has none either.  Raises RedrafterError
    if the drafter reads several layers or positions, or is larger than the new shape.
    """
    old, exit_dim = drafter.config, exit_dim or hidden
    if old.context_size != old.hidden_size:
        raise RedrafterError("A drafter that sees layers or several positions cannot be grown.")
    if hidden < old.hidden_size or exit_dim < old.exit_dim:
        raise RedrafterError(
            f"A drafter of hidden size {old.hidden_size} and width {old.exit_dim} cannot become one of {hidden} and "
            f"{exit_dim}."
        )
    projected = hasattr(drafter, "input_proj")
    if projected and exit_dim == 2 * hidden:
        raise RedrafterError(f"A head of width {exit_dim} would lack the drafter's projection: take another width.")
    sizes = {"hidden_size": hidden, "exit_dim": exit_dim}
    new = _larger(drafter, sizes, target, device, dtype)
    width = torch.arange(old.hidden_size)
    both = torch.cat((width, hidden + width))  # the context, then the state
    inside = torch.arange(old.exit_dim) if hasattr(new, "input_proj") else both
    for name in ("rnn_u", "rnn_w", "gate_u", "gate_w"):
        if hasattr(drafter, name):
            _linear(getattr(new, name), getattr(drafter, name), width, width)
    if projected:
        _linear(new.input_proj, drafter.input_proj, inside, both)
    elif hasattr(new, "input_proj"):
        copies = torch.eye(old.exit_dim)
        _copy_isolated(new.input_proj.weight, copies, inside, both)
        _copy_block(new.input_proj.bias, torch.zeros(old.exit_dim), inside)
    for there, here in zip(new.lm_head[:-1], drafter.lm_head[:-1], strict=True):
        _linear(there.linear, here.linear, inside, inside)
    _copy_isolated(new.lm_head[-1].weight, drafter.lm_head[-1].weight, torch.arange(old.head_size), inside)
    return new


@torch.no_grad()
def grown_medusa(
    heads: MedusaHeads,
    *,
    hidden: int,
    target: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MedusaHeads:
    """Heads for the padded target, named `target`, with the logits of `heads` and their tree.

    Original weights read nothing of the added widths.  Raises RedrafterError if the heads are larger than the new
    shape.
    """
    _check_growth(heads.config, {"hidden_size": hidden})
    new = _larger(heads, {"hidden_size": hidden}, target, device, dtype)
    width = torch.arange(heads.config.hidden_size)
    for there, here in zip(new.heads, heads.heads, strict=True):
        for block, old in zip(there[:-1], here[:-1], strict=True):
            _linear(block.linear, old.linear, width, width)
        _copy_isolated(there[-1].weight, here[-1].weight, torch.arange(heads.config.head_size), width)
    return new


@torch.no_grad()
def grown_eagle(
    head: EagleHead,
    *,
    hidden: int,
    heads: int,
    inner: int,
    kv_heads: int | None = None,
    target: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> EagleHead:
    """A head for the padded target, named `target`, with the features of `head`, and zeros in the added widths.

    As in `grown_target`, nothing writes to those.  Raises RedrafterError if the head is larger than the new shape, or
    if its head size would change, which cannot be told apart from its width.
    """
    old = head.config
    kv_heads = _kv_heads(old, heads, kv_heads)
    sizes = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }
    _check_growth(old, sizes)
    size = old.hidden_size // old.num_attention_heads
    if hidden != heads * size:
        raise RedrafterError(f"An EAGLE head with heads of {size} needs {hidden // size} of them for {hidden}.")
    places = Places(
        (old.hidden_size, hidden),
        old.intermediate_size,
        (old.num_attention_heads, heads),
        (old.num_key_value_heads, kv_heads),
        size,
    )
    new = _larger(head, sizes | {"rms_norm_eps": old.rms_norm_eps * places.share}, target, device, dtype)
    new.fc.weight[old.hidden_size :] = 0
    _copy_block(new.fc.weight, head.fc.weight, places.width, torch.cat((places.width, hidden + places.width)))
    _copy_and_zero(new.fc.bias, head.fc.bias, places.width)
    places.layer(new.layer, head.layer)
    return new


def grown_head(
    head: Head,
    *,
    hidden: int,
    heads: int,
    inner: int,
    kv_heads: int | None = None,
    exit_dim: int | None = None,
    **more: Any,
) -> Head:
    """A head of any supported kind for the padded target.  Raises RedrafterError."""
    if isinstance(head, MedusaHeads):
        return grown_medusa(head, hidden=hidden, **more)
    if isinstance(head, EagleHead):
        return grown_eagle(head, hidden=hidden, heads=heads, inner=inner, kv_heads=kv_heads, **more)
    assert isinstance(head, RecurrentDrafter)
    return grown_drafter(head, hidden=hidden, exit_dim=exit_dim, **more)


def _kv_heads(old: Any, heads: int, kv_heads: int | None) -> int:
    """The number of key heads: as given, or with the same group size.

    Raises RedrafterError if the groups would change.
    """
    group = old.num_attention_heads // old.num_key_value_heads
    kv_heads = kv_heads or max(1, heads // group)
    if heads % kv_heads or heads // kv_heads < group:
        raise RedrafterError(f"{heads} heads cannot share {kv_heads} keys where {group} shared one.")
    return kv_heads


def _check_growth(old: Any, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < getattr(old, name):
            raise RedrafterError(f"{name} can grow from {getattr(old, name)}, not become {size}.")


def _larger(
    head: Any, sizes: dict[str, Any], target: str | None, device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    """A head of the same kind and vocabulary with other sizes and random weights.

    It has no tuned shapes, because its steps cost more.
    """
    untuned = {"shapes": (), "tuned_on": None}
    named = {"target": target or head.config.target, "target_fingerprint": None}  # the padded target has other weights
    config = head.config.model_copy(update=sizes | untuned | named)
    with torch.device(device):
        new = type(head)(config).to(dtype or head.dtype).eval()
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=DEVIATION)
    if head.draft_vocabulary is not None:
        new.draft_vocabulary = head.draft_vocabulary.to(device)
    return new


def _within(heads: Tensor, size: int) -> Tensor:
    """Indices of the weights of these heads among those of all heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _copy_block(new: Tensor, old: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Copies a weight into the given rows and columns of a larger one."""
    rows = torch.arange(len(old)) if rows is None else rows
    place = (rows,) if columns is None else (rows[:, None], columns)
    new[tuple(one.to(new.device) for one in place)] = old.to(new)


def _copy_and_zero(new: Tensor, old: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """As `_copy_block`, with zeros elsewhere: for weights whose results are added to the residual stream."""
    nn.init.zeros_(new)
    _copy_block(new, old, rows, columns)


def _copy_isolated(new: Tensor, old: Tensor, rows: Tensor, columns: Tensor) -> None:
    """As `_copy_block`, with zeros in the other columns of these rows, so that they read nothing else."""
    new[rows.to(new.device)] = 0
    _copy_block(new, old, rows, columns)


def _linear(new: nn.Linear, old: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    _copy_isolated(new.weight, old.weight, rows, columns)
    if old.bias is not None:
        _copy_block(new.bias, old.bias, rows)


def main() -> None:
    """Parses the command line and writes OUTPUT/target and OUTPUT/drafter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of a trained Llama")
    parser.add_argument("--drafter", type=Path, help="folder of a head that drafts for it")
    parser.add_argument("--output", type=Path, required=True, help="where target/ and drafter/ are written")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=64, help="of the size that they have")
    parser.add_argument("--kv-heads", type=int, help="by default as many for each head as there are")
    parser.add_argument("--inner", type=int, default=11008, help="columns of the MLP")
    parser.add_argument("--exit-dim", type=int, help="of the drafter; by default the hidden size")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    given = parser.parse_args()
    torch.manual_seed(0)
    kind = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, given.dtype)}
    folder = given.output / "target"
    try:
        sizes = {"hidden": given.hidden, "heads": given.heads, "kv_heads": given.kv_heads, "inner": given.inner}
        drafter = given.drafter and grown_head(  # first, for its refusals cost nothing yet
            load_head(given.drafter), exit_dim=given.exit_dim, target=folder.name, **sizes, **kind
        )
        model = AutoModelForCausalLM.from_pretrained(given.target, dtype=torch.float32)
        model = grown_target(model, layers=given.layers, **sizes, **kind)
    except RedrafterError as error:
        raise SystemExit(f"grown: {error}") from None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(given.target).save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")
    if drafter is not None:
        drafter.save_pretrained(given.output / "drafter")
        print(f"{given.output / 'drafter'}: {sum(p.numel() for p in drafter.parameters()):,} parameters")


if __name__ == "__main__":
    main()
