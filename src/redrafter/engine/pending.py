"""Steps that were launched, and their results on the host.

Guarantees that launching does not wait for the device.  Does not know rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redrafter.decoding.step import Emission

Owners = Sequence[tuple[int, Any]]
"""Indices of rows in an emission, each with what the caller knows the row by."""


@dataclass(frozen=True)
class StepResult:
    """A step whose report has been read."""

    owners: Owners
    """What the caller passed for the step."""
    emitted: Emission
    reports: list[list[int]]
    """`Emission.report` on the host."""
    logprobs: list[list[list[float]]] | None
    """`Emission.logprobs` on the host."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched and whose report has not been read."""

    owners: Owners
    emitted: Emission
    report: Tensor
    logprobs: Tensor | None
    begin: float
    copied: torch.cuda.Event | None = None
    """When the report has arrived at the host."""

    @classmethod
    def launched(cls, owners: Owners, emitted: Emission, begin: float) -> PendingStep:
        """Starts to copy the report from a GPU to the host."""
        device = emitted.report.device
        if device.type != "cuda":
            return cls(owners, emitted, emitted.report, emitted.logprobs, begin)
        report, logprobs = _to_host(emitted.report), None if emitted.logprobs is None else _to_host(emitted.logprobs)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        return cls(owners, emitted, report, logprobs, begin, copied)

    def result(self) -> StepResult:
        """Waits for the report."""
        if self.copied is not None:
            self.copied.synchronize()
        logprobs = None if self.logprobs is None else self.logprobs.tolist()
        return StepResult(self.owners, self.emitted, self.report.tolist(), logprobs)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which has not arrived yet."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
