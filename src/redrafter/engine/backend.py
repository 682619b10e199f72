"""The decision which optimisations a call uses, made once before its first step.

Guarantees that `fast=False` runs PyTorch only, and that every decision has a reason that can be printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from redrafter.decoding.step import Decoder
from redrafter.engine.fused_linear import fuse_linears, groups_of, is_grouped
from redrafter.engine.onednn_linear import pack_linears, why_not_packed
from redrafter.kernels import why_no_kernels

DISABLED = "fast=False"


@dataclass(frozen=True)
class Backend:
    """For each optimisation None if it is used, or the reason why it is not."""

    kernels: str | None
    """Triton kernels for drafting, trees and verification."""
    attention: str | None
    """Triton kernels for tree attention in the target's layers."""
    graph: str | None
    """One CUDA graph per step."""
    compile: str | None
    """torch.compile for the target's layers."""
    linears: str | None
    """Fused or packed linear layers."""
    device: torch.device

    @classmethod
    def choose(cls, decoder: Decoder, *, fast: bool, compile: bool, single: bool = False) -> Backend:
        """The decisions for a call on the target's device.  `single`: a step runs one token of one row."""
        target, models = decoder.target, models_of(decoder)
        device = target.device
        if not fast:
            return cls(DISABLED, DISABLED, DISABLED, DISABLED, DISABLED, device)
        kernels = why_no_kernels(device, target.dtype)
        attention = kernels if target.tree_kernels or kernels else "the model's attention does not support them"
        graph = None
        if device.type != "cuda":
            graph = f"the device is {device.type}, not cuda"
        elif len({parameter.device for model in models for parameter in model.parameters()}) > 1:
            graph = "the model is on several devices"
        compiling = None if compile else "not requested"
        if compile and not target.tree_kernels:  # a dense mask would be compiled anew for every length
            compiling = "it needs the kernels for tree attention"
        grouped = any(map(is_grouped, models))  # by an earlier call with the same copies
        if graph is None:
            linears = None if any(map(groups_of, models)) or grouped else "no groups of plain layers"
        elif single:
            linears = "one token at a time gains nothing"
        else:
            linears = None if grouped else why_not_packed(*models)
        return cls(kernels, attention, graph, compiling, linears, device)

    def prepare(self, decoder: Decoder) -> Decoder:
        """The decoder with optimised layers.  Changes the call's own copies of the models only."""
        models = models_of(decoder)
        if self.linears is None:
            (fuse_linears if self.graph is None else pack_linears)(*models)
        if self.kernels is not None or decoder.proposer is None:
            return decoder
        return Decoder(decoder.target, decoder.proposer.prepare())

    def describe(self) -> dict[str, str]:
        """What runs, in words, with the reason for each optimisation that is not used."""
        linears = "fused projections" if self.graph is None else "packed by oneDNN"
        return {
            "a step": _either(self.graph, "one CUDA graph", "call by call"),
            "attention": _either(self.attention, "Triton kernels for trees", "the model's own, with a dense mask"),
            "drafting": _either(self.kernels, "Triton kernels", "PyTorch"),
            "linear layers": _either(self.linears, linears, "PyTorch"),
            "layers": _either(self.compile, "torch.compile", "not compiled"),
        }


def models_of(decoder: Decoder) -> tuple[nn.Module, ...]:
    """The modules that a step runs: the target's copy and the proposer's modules."""
    return (decoder.target.module, *(decoder.proposer.modules if decoder.proposer else ()))


def _either(reason: str | None, used: str, otherwise: str) -> str:
    return used if reason is None else f"{otherwise} ({reason})"
