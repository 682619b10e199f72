"""Times one draft of one row on a GPU, replayed as a CUDA graph: with the drafting kernels and in PyTorch.

    python benchmarks/drafting.py [--only NAME] [--replays N] [--seconds S]

Drafters with random weights in bfloat16 and an embedding of the target's vocabulary; 10 and 50 beams of 4 tokens.
Medians over replays of the complete draft and of its parts: the best tokens of the head's logits, a step of the beam
search, the prefix tree, the 64 most probable nodes, and the head's products.  Also checks that both ways agree: the
same tree for the same beams, and the same tokens unless scores are tied.  A failure is reported, and the rest is
measured.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import most_probable, prefix_tree
from redrafter.engine.cuda_graph import Captured
from redrafter.heads.recurrent import DrafterConfig, RecurrentDrafter
from redrafter.kernels import kernels_enabled
from redrafter.kernels.topk import TopK, topk
from redrafter.proposers.beam_search import Level, extend_beams
from redrafter.proposers.recurrent import RecurrentProposer, beam_search

LENGTH, BUDGET = 4, 64
SHAPES: dict[str, dict[str, Any]] = {
    "7B, 32,000, 2H": {"hidden": 4096, "vocabulary": 32_000, "exit": 8192},
    "7B, 32,000, H, 8,192": {"hidden": 4096, "vocabulary": 32_000, "exit": 4096, "draft": 8192},
    "7B, 128,256, H, 8,192": {"hidden": 4096, "vocabulary": 128_256, "exit": 4096, "draft": 8192},
    "7B, 128,256, H, 16,384": {"hidden": 4096, "vocabulary": 128_256, "exit": 4096, "draft": 16_384},
    "110M, 16,000, 2H": {"hidden": 768, "vocabulary": 16_000, "exit": 1536},
    "110M, 16,000, 2H, 4,000": {"hidden": 768, "vocabulary": 16_000, "exit": 1536, "draft": 4000},
    "110M, 16,000, 4H, 3 blocks, 4,000": {
        "hidden": 768, "vocabulary": 16_000, "exit": 3072, "draft": 4000, "blocks": 3,
    },
}  # fmt: skip
WAYS = ("plain", "fast")
"""In PyTorch, and with kernels."""


def timed(function: Callable[[], object], device: torch.device, replays: int) -> float:
    """Median microseconds of a replay; NaN if the function cannot be captured."""
    captured = Captured(function, device)
    for _ in range(4):
        captured()
    if captured.refused is not None:
        print("   not captured:", captured.refused)
        return float("nan")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, end in events:
        start.record()
        captured()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


def launches(function: Callable[[], object]) -> int:
    """Number of kernels, copies and fills that the GPU runs for one call."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    found = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("cuda", "Activity Buffer")) for event in found)


def drafter_of(shape: dict[str, Any], device: torch.device) -> tuple[RecurrentDrafter, torch.nn.Embedding]:
    """A drafter and the target's embedding."""
    hidden, vocabulary = shape["hidden"], shape["vocabulary"]
    config = DrafterConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        exit_dim=shape["exit"],
        num_draft_layers=shape.get("blocks", 2),
        draft_vocab_size=shape.get("draft"),
    )
    with torch.device(device):
        drafter = RecurrentDrafter(config).to(torch.bfloat16).eval()
        embed = torch.nn.Embedding(vocabulary, hidden, dtype=torch.bfloat16)
    return drafter, embed


def same_trees(one: Any, other: Any) -> bool:
    """Whether all fields are equal."""
    return all(getattr(one, name).equal(getattr(other, name)) for name in vars(one))


def agreement(pieces: dict[str, dict[str, Callable[[], Any]]]) -> dict[str, bool | float]:
    """Whether the kernels and PyTorch give the same results."""
    results = {}
    for name in WAYS:
        with kernels_enabled(name == "fast"):
            results[name] = {piece: call() for piece, call in pieces[name].items()}
    plain, fast_one = results["plain"], results["fast"]
    found: dict[str, bool | float] = {}
    one, other = plain["top"], fast_one["top"]
    close = torch.allclose(one.logsumexp, other.logsumexp, rtol=1e-4)
    found["top"] = bool(one.values.equal(other.values) and close)
    one, other = plain["extend"], fast_one["extend"]
    found["extend"] = bool(torch.allclose(one.scores, other.scores, rtol=1e-5) and one.parents.equal(other.parents))
    for piece in ("prefix_tree", "most probable"):
        found[piece] = same_trees(plain[piece], fast_one[piece])
    one, other = (set(map(tuple, result["search"].beams[0].tolist())) for result in (plain, fast_one))
    found["share of beams alike"] = len(one & other) / len(one)
    return found


def measure(shape: dict[str, Any], width: int, device: torch.device, replays: int) -> dict[str, Any]:
    """Microseconds of both ways by part, the number of launches of a draft, and whether the results agree."""
    drafter, embed = drafter_of(shape, device)
    hidden, head = shape["hidden"], drafter.config.head_size
    context = torch.randn(1, hidden, device=device, dtype=torch.bfloat16)
    root = torch.tensor([5], device=device)
    here = RowState(root, root, text=root[:, None], length=torch.zeros_like(root), alive=root)
    target: Any = SimpleNamespace(embed=embed)
    draft = DraftShape(beam_width=width, beam_length=LENGTH)
    plain = RecurrentProposer(drafter, target, draft)
    proposers = {"plain": plain, "fast": plain.prepare()}

    state = torch.randn(1, width, hidden, device=device, dtype=torch.bfloat16)
    rows = torch.stack([torch.randperm(head, device=device) for _ in range(width)])
    logits = rows.to(torch.bfloat16)
    best = TopK(*(part.contiguous() for part in topk(torch.randn(width, head, device=device), width)))
    begun = torch.randint(0, 9, (1, width, 2), device=device)
    scores = -torch.rand(1, width, device=device)
    above = torch.arange(width, device=device)[None]
    beams = torch.randint(0, 3, (1, width, LENGTH), device=device)
    levels, reached = [], torch.zeros(1, 1, device=device)
    for depth in range(LENGTH):
        parents = torch.arange(min(width, reached.shape[1]), device=device).repeat_interleave(width)[None]
        reached = reached.gather(1, parents) - torch.rand(parents.shape, device=device)
        levels.append(Level(torch.randint(0, 99, parents.shape, device=device) + depth, parents, reached))
    once = context[:, None]
    read = drafter.read(once)

    def searched(by: RecurrentProposer) -> Any:
        return beam_search(drafter, embed, context, root, draft, fused=by.fused)

    alike: dict[str, Callable[[], Any]] = {
        "top": lambda: topk(logits, width),
        "extend": lambda: extend_beams(best, drafter.draft_vocabulary, begun, scores, above),
        "prefix_tree": lambda: prefix_tree(root, beams),
        "most probable": lambda: most_probable(root, levels, size=BUDGET),
        "step": lambda: drafter.step(state, state),
        "head": lambda: drafter.logits(once.expand_as(state), state, read),
        "head without read": lambda: drafter.logits(once.expand_as(state), state),
    }
    pieces = {
        name: {
            "propose": lambda by=by: by.propose(None, here, context[:, None], SamplingNoise()),
            "search": lambda by=by: searched(by),
        }
        | alike
        for name, by in proposers.items()
    }
    out: dict[str, Any] = {"agreement": agreement(pieces)}
    for name in WAYS:
        with kernels_enabled(name == "fast"):
            out[name] = {piece: round(timed(call, device, replays), 1) for piece, call in pieces[name].items()}
            with contextlib.suppress(RuntimeError, AttributeError):  # profilers differ
                out[name]["launches"] = launches(pieces[name]["propose"])
    return out


def trials(device: torch.device, replays: int) -> dict[str, float]:
    """Microseconds of the top-k kernel by chunk size, at sizes of drafters."""
    from redrafter.kernels.triton import drafting

    found = {}
    for rows, columns in ((10, 8192), (50, 8192), (10, 32_000), (50, 32_000)):
        logits = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        for chunk in (256, 512, 1024, 2048):
            if rows == 50 and chunk * 64 < columns:
                continue
            name = f"{rows}x{columns} chunk {chunk}"
            try:
                found[name] = round(timed(lambda x=logits, c=chunk: drafting.topk(x, len(x), c), device, replays), 1)
            except Exception as error:
                print(name, type(error).__name__, str(error)[:300])
    return found


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="shapes whose names contain this")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=50, help="time after which no further shape is started")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("A CUDA device is needed.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    begun = time.monotonic()
    torch.manual_seed(0)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            if given.only and given.only not in name:
                continue
            for width in (10, 50):
                title = f"{name}, W {width}"
                if time.monotonic() - begun > given.seconds:
                    print(f"{title}: no time left")
                    continue
                try:
                    out[title] = found = measure(shape, width, device, given.replays)
                except Exception as error:
                    traceback.print_exc(limit=4)
                    out[title] = f"{type(error).__name__}: {str(error)[:300]}"
                    continue
                print(f"{title}  ({time.monotonic() - begun:.0f} s)  {found['agreement']}", flush=True)
                for piece in [name for name in found["plain"] if all(name in found[one] for one in WAYS)]:
                    print(f"  {piece:18s}" + "".join(f" {one} {found[one][piece]:8.1f}  " for one in WAYS))
        if time.monotonic() - begun < given.seconds:
            out["chunks"] = trials(device, given.replays)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
