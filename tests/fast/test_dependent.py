"""Which devices launch dependently; test_hopper.py sees that kernels wait, test_drafting.py what they compute."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from redrafter.fast.kernels import dependent

LAUNCHED = {"DEPENDENT": True, "launch_pdl": True}


@pytest.mark.parametrize(
    ("device", "capability", "hip", "interpreted", "can"),
    [
        ("cuda:0", 9, None, "", True),
        ("cuda:0", 12, None, "", True),
        ("cuda:0", 8, None, "", False),
        ("cuda:0", 9, "6.4", "", False),  # AMD's have capabilities too, and no such launches
        ("cuda:0", 9, None, "1", False),
        ("cpu", 9, None, "", False),
    ],
)
def test_newer_gpus_of_nvidia_launch_dependently(device, capability, hip, interpreted, can, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    dependent.can_depend.cache_clear()
    place = torch.device(device)
    assert dependent.dependently(place) == (LAUNCHED if can else {"DEPENDENT": False})
    assert dependent.dependently(place, wanted=False) == {"DEPENDENT": False}
    monkeypatch.setattr(dependent, "WANTED", False)
    assert dependent.dependently(place) == {"DEPENDENT": False}
    dependent.can_depend.cache_clear()
