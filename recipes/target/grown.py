"""A trained target and its drafter at the cost of a larger shape, their function kept.

    python -m recipes.target.grown --target T --drafter D --output OUT [--hidden 4096 --layers 32 --heads 64 ...]

Speed depends on the shape and on how often drafts are accepted; a small pair can be trained in minutes, and grown it
costs what a large one does.  Promises the same logits and the same drafts, up to rounding.  All that is added is
random, normal with a deviation of 0.02, but for zeros where it would reach what was there: a GPU multiplies zeros
faster.  Llama alone, whose function is known here weight by weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from redrafter import RecurrentDrafter, RedrafterError

DEVIATION = 0.02


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
    """A model of the larger shape with the logits of `model`; heads keep their size and, unless told, their groups.

    The residual stream is zero in the added widths: nothing writes to them.  A root mean square over more, all zeros,
    is smaller by the root of their share, which the weights of the norms make up for.  Added layers write nothing.
    Raises RedrafterError where the model is no plain Llama, or larger than what it is to become.
    """
    old = model.config
    if old.model_type != "llama" or old.attention_bias or old.mlp_bias or old.pretraining_tp != 1:
        raise RedrafterError(f"Only Llama without biases can be grown, not this {old.model_type}.")
    group = old.num_attention_heads // old.num_key_value_heads
    kv_heads = kv_heads or heads // group
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }
    for name, size in sizes.items():
        if size < getattr(old, name):
            raise RedrafterError(f"{name} can grow from {getattr(old, name)}, not become {size}.")
    if heads % kv_heads or heads // kv_heads < group:
        raise RedrafterError(f"{heads} heads cannot share {kv_heads} keys where {group} shared one.")
    share = old.hidden_size / hidden
    changes = {
        "tie_word_embeddings": False,
        "initializer_range": DEVIATION,
        "head_dim": model.model.layers[0].self_attn.head_dim,
    }
    config = type(old).from_dict(old.to_dict() | sizes | changes | {"rms_norm_eps": old.rms_norm_eps * share})
    with torch.device(device):
        new = AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype).eval()
    new.generation_config = model.generation_config
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=DEVIATION)

    width = torch.arange(old.hidden_size)
    columns = torch.arange(old.intermediate_size)
    keys = _within(torch.arange(old.num_key_value_heads), config.head_dim)
    queries = torch.arange(old.num_attention_heads)
    queries = _within(queries // group * (heads // kv_heads) + queries % group, config.head_dim)
    _alone(new.model.embed_tokens.weight, model.model.embed_tokens.weight, columns=width)
    _among(new.lm_head.weight, model.lm_head.weight, columns=width)
    _among(new.model.norm.weight, model.model.norm.weight * share**0.5, width)
    for there, here in zip(new.model.layers, model.model.layers, strict=False):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _among(getattr(there, norm).weight, getattr(here, norm).weight * share**0.5, width)
        for name, places in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
            _among(getattr(there.self_attn, name).weight, getattr(here.self_attn, name).weight, places, width)
        for name in ("gate_proj", "up_proj"):
            _among(getattr(there.mlp, name).weight, getattr(here.mlp, name).weight, columns, width)
        _alone(there.self_attn.o_proj.weight, here.self_attn.o_proj.weight, width, queries)
        _alone(there.mlp.down_proj.weight, here.mlp.down_proj.weight, width, columns)
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
    """A drafter for the grown target, named `target`, with the logits of `drafter`; its blocks become `exit_dim` wide.

    What was there reads nothing of what is added.  `exit_dim` is `hidden` unless told.  A head without a projection
    (`exit_dim` twice the hidden size) gets one that copies, unless it is to be without one again.  Raises
    RedrafterError where the drafter sees layers or positions, or is larger than what it is to become.
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
    config = old.model_copy(update={"hidden_size": hidden, "exit_dim": exit_dim, "target": target or old.target})
    with torch.device(device):
        new = RecurrentDrafter(config).to(dtype or drafter.dtype).eval()
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=DEVIATION)

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
        _apart(new.input_proj.weight, copies, inside, both)
        _among(new.input_proj.bias, torch.zeros(old.exit_dim), inside)
    for there, here in zip(new.lm_head[:-1], drafter.lm_head[:-1], strict=True):
        _linear(there.linear, here.linear, inside, inside)
    _apart(new.lm_head[-1].weight, drafter.lm_head[-1].weight, torch.arange(old.head_size), inside)
    if drafter.draft_vocabulary is not None:
        new.draft_vocabulary = drafter.draft_vocabulary.to(device)
    return new


def _within(heads: Tensor, size: int) -> Tensor:
    """The places of these heads' numbers among those of all."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _among(new: Tensor, old: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Puts a weight into a larger one, at its rows and columns."""
    rows = torch.arange(len(old)) if rows is None else rows
    place = (rows,) if columns is None else (rows[:, None], columns)
    new[tuple(one.to(new.device) for one in place)] = old.to(new)


def _alone(new: Tensor, old: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """As `_among`, everything else zero: of what writes to the residual stream."""
    nn.init.zeros_(new)
    _among(new, old, rows, columns)


def _apart(new: Tensor, old: Tensor, rows: Tensor, columns: Tensor) -> None:
    """As `_among`, what was there reading nothing else."""
    new[rows.to(new.device)] = 0
    _among(new, old, rows, columns)


def _linear(new: nn.Linear, old: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    _apart(new.weight, old.weight, rows, columns)
    if old.bias is not None:
        _among(new.bias, old.bias, rows)


def main() -> None:
    """Parses the command line and writes OUTPUT/target and OUTPUT/drafter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of a trained Llama")
    parser.add_argument("--drafter", type=Path, help="folder of its drafter")
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
        drafter = given.drafter and grown_drafter(  # first, for its refusals cost nothing yet
            RecurrentDrafter.from_pretrained(given.drafter),
            hidden=given.hidden,
            exit_dim=given.exit_dim,
            target=folder.name,
            **kind,
        )
        model = grown_target(
            AutoModelForCausalLM.from_pretrained(given.target, dtype=torch.float32),
            hidden=given.hidden,
            layers=given.layers,
            heads=given.heads,
            kv_heads=given.kv_heads,
            inner=given.inner,
            **kind,
        )
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
