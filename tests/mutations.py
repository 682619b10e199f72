"""Breaks exactness in one place at a time and sees the tests fail each time.

    python tests/mutations.py

Copies the sources to a temporary folder, changes one expression of the copy and runs the tests of the decode step
against it: first as it is, which must pass, then broken, which must not.  Exit status 1 where a run ends otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("verify", "tree", "cache", "target", "noise", "sampling", "decoding")]
TESTS += ["tests/proposers"]

MUTATIONS = {
    "walk: a node is held against the choice at itself": (
        "verify.py", "choice.gather(1, parents)", "choice",
    ),
    "walk: a node is kept whatever lies above it": (
        "verify.py", "(matches[:, None] | ~tree.ancestors).all(dim=2) & matches", "matches",
    ),
    "walk: padding is kept": (
        "tree.py", "inside = (self.parents == parents) & self.valid", "inside = self.parents == parents",
    ),
    "walk: the last drafted token is not counted": (
        "verify.py", "tree.depth.gather(1, last)[:, 0], -1)", "tree.depth.gather(1, last)[:, 0] // 2, -1)",
    ),
    "walk: nodes of another depth or other ancestors are kept": (
        "verify.py", "matches = tree.consistent()", "matches = tree.valid",
    ),
    "walk: equal siblings are counted twice": (
        "verify.py", "torch.where(accepted[:, 0], tree.depth.gather(1, last)[:, 0], -1)", "accepted.sum(dim=1) - 1",
    ),
    "noise: by the node's number, not its depth": (
        "sampling.py",
        "draw.gumbel[rows, tree.depth]",
        "draw.gumbel[rows, torch.arange(tree.size) % draw.gumbel.shape[1]]",
    ),
    "noise: drafts have that of the position before": (
        "sampling.py", "self.noise[:, position]", "self.noise[:, position - 1]",
    ),
    "noise: by the row's place in the batch": (
        "sampling.py", "gumbel(place.seed, pos", "gumbel(place.seed + torch.arange(len(place.seed)), pos",
    ),
    "noise: the same at every position": (
        "noise.py", "_splitmix(seed)[:, None] + position)", "_splitmix(seed)[:, None] + 0 * position)",
    ),
    "noise: the same for every seed": (
        "noise.py", "_splitmix(_splitmix(seed)[:, None]", "_splitmix(_splitmix(0 * seed)[:, None]",
    ),
    "noise: one position late after a step": (
        "sampling.py", "+ 1 + torch.arange(depths", "+ 1 + (depths > 1) + torch.arange(depths",
    ),
    "ahead: a row that has ended writes on": (
        "decoding.py", "if taken.get(one.slot) is not one:", "if one.slot not in taken:",
    ),
    "ahead: what is not yet read is not seen": (
        "decoding.py", "unread = len(flying) * (asked.length + 1)", "unread = 0 * len(flying) * (asked.length + 1)",
    ),
    "mask: nodes see their siblings": (
        "tree.py", "mask = own | (index < 0)[:, None]", "mask = (own | in_tree[:, None]) | (index < 0)[:, None]",
    ),
    "mask: nodes do not see the slot before the root": (
        "tree.py", "mask = own | (index < 0)[:, None]", "mask = own | (index < -1)[:, None]",
    ),
    "mask: the window is one slot longer": (
        "tree.py", "distance[:, None] < window", "distance[:, None] <= window",
    ),
    "mask: positions by the node's number, not its depth": (
        "target.py", "position = length[:, None] + tree.depth", "position = slots",
    ),
    "tree: a node's parent is no ancestor": (
        "tree.py", "for _ in range(max_depth):\n        node", "for _ in range(max_depth - 1):\n        node",
    ),
    "eagle: a feature goes with its own token, not the one after it": (
        "proposers/eagle.py", "(index + 1).minimum", "index.minimum",
    ),
    "eagle: the last step's last token is not taken in again": (
        "proposers/eagle.py", "begin = first.clamp(min=0)", "begin = (first + 1).clamp(min=0)",
    ),
    "eagle: beams keep the features of others": (
        "proposers/eagle.py", "given.gather(1, parents[", "given.gather(1, 0 * parents[",
    ),
    "cache: nothing is moved": (
        "step.py", "if length:  #", "if False:  #",
    ),
    "cache: moved one slot too far": (
        "cache.py", "target = (length[:, None] + torch", "target = (1 + length[:, None] + torch",
    ),
    "cache: keys are moved, values are not": (
        "cache.py", "for pool in self.pools:\n            source", "for pool in self.pools[::2]:\n            source",
    ),
    "cache: all rows move what the first row moves": (
        "cache.py", "source = (length[:, None] + path)", "source = (length[:, None] + path[:1])",
    ),
    "keep: a row that has ended goes on": (
        "step.py", "place.length.add_(place.alive * (accepted + 1))", "place.length.add_(accepted + 1)",
    ),
    "keep: the drafter is given the root's state, not the last node's": (
        "step.py", "_latest(state.context, along, accepted)", "_latest(state.context, along, 0 * accepted)",
    ),
    "keep: the drafter is given positions of which one is missing": (
        "step.py", "index = end[:, None] + 1 +", "index = end[:, None] +",
    ),
    "memory: the tokens that the last step wrote are not taken in": (
        "proposers/two_model.py", "begin = (place.length - self.length).clamp(min=0)", "begin = place.length",
    ),
    "memory: the first token that the last step wrote is not taken in": (
        "proposers/two_model.py", "(place.length - self.length).clamp", "(place.length - self.length + 1).clamp",
    ),
    "memory: prompts are not taken in": (
        "step.py", "if proposer is not None:\n            proposer.read", "if False:\n            proposer.read",
    ),
    "memory: a row that enters brings none": (
        "step.py", "if self.memory is not None and other", "if False and other",
    ),
    "memory: attention does not reach as far as the beams": (
        "step.py", "visible = slots + self.memory.slots - self.cache.slots", "visible = slots",
    ),
    "draft: beams see their neighbours": (
        "tree.py", "((node[:, None] - node) % width == 0)", "((node[:, None] - node) % width >= 0)",
    ),
    "draft: the root is looked up where it stands itself": (
        "proposers/prompt_lookup.py", "alike = (position < end)", "alike = (position <= end)",
    ),
    "draft: what follows the text is drafted": (
        "proposers/prompt_lookup.py", "(after > 0) & (index <= end)", "(after > 0) & (index <= end + 1)",
    ),
}  # fmt: skip
"""What is broken: file, expression, and what stands there instead."""


def run(mutation: tuple[str, str, str] | None, processes: int = 0) -> tuple[bool, str]:
    """Whether the tests pass, and the one that did not."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "pyproject.toml"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(folder) / name)
        if mutation is not None:
            name, old, new = mutation
            file = Path(folder) / "src" / "redrafter" / name
            text = file.read_text()
            assert text.count(old) == 1, f"{name} holds {text.count(old)} times {old}"
            file.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"-n{processes}", "-W", "ignore"]
        command += TESTS
        environment = os.environ | {"PYTHONPATH": str(Path(folder) / "src")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0 or failed, done.stdout + done.stderr
    return done.returncode == 0, failed[1] if failed else ""


def main(names: Sequence[str]) -> None:
    """Runs the tests as they are and under each mutation, or under those whose name contains one of the words given."""
    if not run(None, processes=2)[0]:
        raise SystemExit("The tests fail without any mutation.")
    chosen = {name: how for name, how in MUTATIONS.items() if not names or any(word in name for word in names)}
    with ThreadPoolExecutor(2) as pool:
        ends = dict(zip(chosen, pool.map(run, chosen.values()), strict=True))
    for name, (passed, test) in ends.items():
        print(f"{'NOT SEEN' if passed else 'seen':8s} {name:64s} {test}")
    survived = sum(passed for passed, _ in ends.values())
    print(f"{len(ends) - survived} of {len(ends)} mutations make a test fail")
    raise SystemExit(bool(survived))


if __name__ == "__main__":
    main(sys.argv[1:])
