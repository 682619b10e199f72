"""Drafts one chain of tokens for every request of a batch.

Guarantees the tokens of a beam search of width 1, whatever the number of requests.  On CUDA, drafts without noise are
replayed as one CUDA graph for each length and power of two of requests.  Does not synchronize with the device.  Does
not know vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.engine.cuda_graph import Captured
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.kernels import has_kernels
from redrafter.proposers.fused_drafter import FusedDrafter
from redrafter.proposers.recurrent import beam_search

MAX_CAPTURED = 64
"""The largest number of requests that is captured."""

Embed = Callable[[Tensor], Tensor]


class DraftChains:
    """A drafter with the token embedding of its target."""

    def __init__(self, drafter: RecurrentDrafter, embed: Embed, *, capture: bool):
        """`embed` returns embeddings in the drafter's dtype.  `capture`: whether drafts may become CUDA graphs."""
        self.drafter, self.embed = drafter, embed
        self.fused = FusedDrafter.of(drafter, embed) if has_kernels(drafter.device, drafter.dtype) else None
        self._capture = capture and drafter.device.type == "cuda"
        self._graphs: dict[tuple[int, int], Captured[Tensor]] = {}
        self._context = torch.zeros((MAX_CAPTURED, drafter.config.hidden_size), device=drafter.device).to(drafter.dtype)
        self._root = torch.zeros(MAX_CAPTURED, dtype=torch.long, device=drafter.device)

    def draft(
        self,
        context: Float[Tensor, "R hidden"],
        root: Int[Tensor, " R"],
        length: int,
        noise: SamplingNoise | None = None,
    ) -> Int[Tensor, "R length"]:
        """The drafted tokens after each `root`, which the target chose from `context`.

        With `noise`, candidates are ranked by the noise that the target will use.  It covers the draft vocabulary.
        """
        count = len(root)
        context = context.to(self.drafter.dtype)
        if noise is not None or not self._capture or count > MAX_CAPTURED:
            return self._search(context, root, length, noise)
        self._context[:count].copy_(context)
        self._root[:count].copy_(root)
        size = 1 << (count - 1).bit_length()
        graph = self._graphs.get((size, length))
        if graph is None:
            inputs = self._context[:size], self._root[:size]
            graph = Captured(lambda: self._search(*inputs, length, None), self.drafter.device)
            self._graphs[size, length] = graph
        return graph()[:count].clone()  # the next replay writes into the same memory

    def _search(
        self,
        context: Float[Tensor, "R hidden"],
        root: Int[Tensor, " R"],
        length: int,
        noise: SamplingNoise | None,
    ) -> Int[Tensor, "R length"]:
        found = beam_search(
            self.drafter,
            self.embed,
            context,
            root,
            DraftShape(beam_width=1, beam_length=length),
            adjust=None if noise is None else noise.ranking(),
            fused=self.fused,
        )
        return found.beams[:, 0]


def draft_length(most: int, requests: int, max_verified_tokens: int) -> int:
    """The draft length at which `requests` requests verify at most `max_verified_tokens` tokens together."""
    return max(0, min(most, max_verified_tokens // max(1, requests) - 1))
