"""Compares all drafting methods under equal conditions: one target, its answers, and the same training time.

    python -m recipes.target.compare --data DATA --output OUT [--spec-bench spec_bench.jsonl.xz] [--seconds 1600]

Guarantees that a finished stage is skipped, that a failed one is reported while the others continue, and that nothing
is started for which `--seconds` do not suffice.  Several processes, each with one GPU, share the work with `--part`.
All measurements are made by `redrafter bench`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recipes.common.answers import put
from recipes.common.corpus import Corpus
from recipes.common.methods import EAGLE, KL, Effort, Record, Way, train_draft_model, train_head
from recipes.target import commands, costs, prompts, shape, stages
from recipes.target.costs import DRAFT, SMALL
from recipes.target.drafters import LENGTH, drafter_of, measured_on, prompts_of, written_by
from recipes.target.stages import awaited, say, survived
from recipes.target.variants import Variant, variants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redrafter import EagleHead, MedusaHeads, RecurrentDrafter
from redrafter.bench.tables import Table, equal_texts, overall, sampling_name, spread, temperatures
from redrafter.data.examples import Row

NOT_DISTILLED = "recurrent-text"
"""Learns what people wrote, as the target did, where all others learn what the target writes."""

SHAPES = {
    "recurrent": {
        "recurrent": "@16x5:64",
        "recurrent, without the noise": "@16x5:64,uncoupled",
        "recurrent, 10 beams of 4, 32 nodes": "@10x4:32",
        "recurrent, 10 whole beams": "@10x4",
    },
    DRAFT: {
        "two models, chain of 3": "@1x3,uncoupled",
        "two models, tree": "@4x4:16,uncoupled",
        "two models, tree by the noise": "@4x4:16",
    },
    "medusa": {"Medusa": "", "Medusa, without the noise": "@uncoupled"},
    SMALL: {
        "small draft model, chain of 5": "@1x5,uncoupled",
        "small draft model, tree by the noise": "@4x4:16",
    },
    "eagle": {
        "EAGLE": "@10x5:64,uncoupled",
        "EAGLE, by the noise": "@10x5:64",
        "EAGLE, 10 beams of 4, 32 nodes": "@10x4:32,uncoupled",
    },
    "recurrent-whole": {"recurrent, the whole vocabulary": "@10x4:32"},
    "recurrent-released": {"recurrent, released": "@10x4:32"},
    NOT_DISTILLED: {"recurrent, not distilled": "@10x4:32"},
}
"""What is trained, by folder, and in which shapes it is measured under which name; in the order of the training.

Medusa heads draft their fitted tree; forms of the recurrent drafter are compared in one shape.  When sampling, EAGLE
and two models rank by their own probabilities alone, and once more by the noise of the target's draws, as the recurrent
drafter and Medusa do.
"""

RECURRENT = {
    "recurrent": "answers, KL and coupled, decay 0.8, V/4",
    "recurrent-whole": "answers, KL and coupled, decay 0.8",
    "recurrent-released": "answers, tokens",
    NOT_DISTILLED: "released: the text's own tokens",
}
"""The recurrent drafters, each as one of `variants.py`; a sweep goes through the first and has the others beside it."""

MULTI_TURN = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""Categories of MT-bench, which are one task of Spec-Bench."""

COSTS = ("own", "grown")
"""At which all is measured, first of all on held-out prompts: so each is prepared by the part of its number here."""

SWEEP = "sweep"

LEAST = 120  # seconds for which a measurement is begun
SETTLED = 75  # of those in which it loads, ends its last unit and writes the report


def main() -> None:
    """Parses the command line and runs the stages."""
    begin = time.monotonic()
    given = _arguments()
    until = math.inf if given.seconds is None else begin + given.seconds
    corpus = shape.corpus(given.data)
    part, parts = given.part
    if part == 0:
        stages.tokenizer(given, corpus)
    if given.only_tokenizer:
        return
    mine = [name for number, name in enumerate(given.methods) if number % parts == part]
    _forget_failures(given, mine)
    if not all(_record(given.output, name).exists() for name in given.methods):
        tokenizer = awaited(stages.tokenizer(given, corpus), until)
        commands.rehearse(given.output / f"rehearsal-{part}", corpus, tokenizer, until)
        say(begin, "bench does what is needed later")
    for name in (DRAFT, SMALL):
        if name in mine and part:  # while part 0 trains the target
            _pretrain_draft_model(given, corpus, name)
            say(begin, f"{name}: trained on text")
    target = stages.target(given, corpus, until)
    say(begin, "the target is there")
    _train(given, corpus, target, mine, begin, until)
    _write_prompts(given, corpus, target)
    there = {}
    for name in given.methods:
        record = json.loads(awaited(_record(given.output, name), until).read_text())
        if "failed" in record:
            say(begin, f"{name} is not there: {record['failed']}")
        else:
            there[name] = given.output / "methods" / name
    can_grow = given.grown and AutoConfig.from_pretrained(target).model_type == "llama"
    costs_there = COSTS if can_grow else COSTS[:1]
    jobs = [(cost, data) for data in ("held-out", *(["spec"] if given.spec_bench else [])) for cost in costs_there]
    jobs += [("own", SWEEP)] if given.sweep else []
    for number, (cost, data) in enumerate(jobs):
        if number % parts == part:
            result = survived(partial(_measure, given, cost, data, target, there, begin, until))
            say(begin, result or f"measured at {cost} cost on {data} prompts")
    table = page(given.output)
    (given.output / f"compare-{part}.md").write_text(table)
    print(table, end="")


def _arguments() -> argparse.Namespace:
    parser = stages.options(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="from the start, in which all must be done")
    parser.add_argument("--methods", nargs="+", choices=SHAPES, default=list(SHAPES), help="to train and to measure")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of training each method")
    parser.add_argument("--method-batch", type=int, default=8, help="packed rows of 1,024 tokens in a step")
    parser.add_argument("--method-rate", type=float, default=1e-3, help="learning rate at its peak")
    parser.add_argument("--draft-minutes", type=float, default=0.5, help="of training a draft model on text before")
    parser.add_argument("--draft-width", type=int, help="by default half of the target's")
    parser.add_argument("--draft-layers", type=int, help="by default a quarter of the target's")
    parser.add_argument("--small-width", type=int, default=128, help="of the small draft model")
    parser.add_argument("--small-layers", type=int, default=2, help="of the small draft model")
    parser.add_argument("--sweep", action="store_true", help="also sweep the recurrent drafter, others of it beside")
    parser.add_argument("--spec-bench", type=Path, help="Spec-Bench's questions, JSON lines, perhaps under xz")
    parser.add_argument("--spec-prompts", type=int, default=4, help="of each of its tasks, at grown cost half as many")
    parser.add_argument("--bench-prompts", type=int, default=12, help="held-out prompts of each category")
    parser.add_argument("--grown-prompts", type=int, default=4, help="of each category, at grown cost")
    parser.add_argument("--rounds", type=int, default=2, help="of every measurement at own cost; at grown cost one")
    parser.add_argument("--grown", action=argparse.BooleanOptionalAction, default=True, help="a Llama alone can be")
    parser.add_argument("--hidden", type=int, default=4096, help="of the grown target")
    parser.add_argument("--grown-layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=64, help="of the grown target, of the size that they have")
    parser.add_argument("--inner", type=int, default=11008, help="columns of the grown target's MLP")
    return parser.parse_args()


def heads(target: Any) -> dict[str, Way]:
    """The heads to train for a target of this config (draft models are trained elsewhere)."""
    known = {variant.name: variant for variant in variants(target)}

    def recurrent(variant: Variant) -> Way:
        def make(model: PreTrainedModel, rows: list[Row]) -> RecurrentDrafter:
            return drafter_of(variant, model, variant.scored(rows, model.config.vocab_size))

        return Way(make, variant.objective)

    return {name: recurrent(known[variant]) for name, variant in RECURRENT.items()} | {
        "medusa": Way(lambda model, _: MedusaHeads.fresh(model, heads=LENGTH), KL),
        "eagle": Way(lambda model, _: EagleHead.fresh(model, beam_length=LENGTH), EAGLE),
    }


def _record(output: Path, name: str) -> Path:
    return output / "methods" / f"{name}.json"


def _folders_file(output: Path, cost: str) -> Path:
    return output / f"{cost}.json"


def _forget_failures(given: argparse.Namespace, methods: list[str]) -> None:
    """Removes the failures of an earlier run of this process, so that they are tried again and other processes wait."""
    part, parts = given.part
    costs_here = [cost for number, cost in enumerate(COSTS) if number % parts == part]
    records = [_record(given.output, name) for name in methods]
    for file in records + [_folders_file(given.output, cost) for cost in costs_here]:
        if file.exists() and "failed" in json.loads(file.read_text()):
            file.unlink()


def _pretrain_draft_model(given: argparse.Namespace, corpus: Corpus, name: str) -> Path:
    folder: Path = given.output / "methods" / f"{name}-before"
    width, layers = given.small_width, given.small_layers
    if name == DRAFT:
        width = given.draft_width or max(1, given.width // 2 // shape.HEAD) * shape.HEAD
        layers = given.draft_layers or max(1, given.layers // 4)
    stages.pretrained(given, corpus, folder, width=width, layers=layers, minutes=given.draft_minutes)
    return folder


def _train(
    given: argparse.Namespace, corpus: Corpus, target: Path, names: list[str], begin: float, until: float
) -> None:
    """Trains the named methods that are missing; writes a record of each, also of failures."""
    torch.set_float32_matmul_precision("high")
    output, rows = given.output, None
    model = AutoModelForCausalLM.from_pretrained(target).to(stages.device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    asked = prompts_of(corpus, tokenizer, shape.SHARES, given.prompts, output)
    held_out = measured_on(corpus, shape.CATEGORIES, tokenizer, given.held_out)
    own, _ = written_by(model, asked, held_out, output, given.new_tokens, given.part, begin, until)
    rows = own["greedy"] + own["sampled"]
    effort = Effort(given.each, given.method_batch, given.method_rate)
    made = heads(model.config)

    def train(name: str) -> Record:
        folder = output / "methods" / name
        if time.monotonic() + given.each > until:
            return {"failed": "no time was left to train it"}
        if name in made:
            return train_head(made[name], model, asked if name == NOT_DISTILLED else rows, folder, effort)
        before = _pretrain_draft_model(given, corpus, name)
        return train_draft_model(before, model, tokenizer, rows, folder, effort)

    for name in names:
        file = _record(output, name)
        if file.exists():
            continue
        result = survived(partial(train, name))
        record = {"failed": result} if isinstance(result, str) else result
        put(file, record)
        shown = ("failed", "parameters", "seconds", "steps", "tokens", "loss")
        say(begin, f"{name}: {', '.join(f'{key} {record[key]}' for key in shown if key in record)}")


def _write_prompts(given: argparse.Namespace, corpus: Corpus, target: Path) -> None:
    """Writes the prompts for `redrafter bench` atomically; all processes write the same."""
    (given.output / "prompts").mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    asked = {"held-out": prompts.rows(corpus, tokenizer, given.held_out)}
    if given.spec_bench:
        opened = lzma.open if given.spec_bench.suffix == ".xz" else open
        with opened(given.spec_bench, "rt", encoding="utf-8") as lines:
            asked["spec"] = [by_task(json.loads(line)) for line in lines]
    for name, rows in asked.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = _prompts(given, name)
        part = file.with_suffix(f".{given.part[0]}")
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def _prompts(given: argparse.Namespace, name: str) -> Path:
    file: Path = given.output / "prompts" / f"{name}.jsonl"
    return file


def by_task(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Spec-Bench with its task as category."""
    many = row["category"] in MULTI_TURN
    return {"category": "multi-turn" if many else row["category"].replace("_", " "), "turns": row["turns"]}


def _measure(
    given: argparse.Namespace, cost: str, data: str, target: Path, there: dict[str, Path], begin: float, until: float
) -> str | None:
    """Runs `redrafter bench` or `sweep` unless its results exist; returns a sentence if it failed."""
    folder = given.output / "bench" / f"{cost}-{data}"
    if _is_whole(folder):
        return None
    drafting = _folders_file(given.output, cost)
    if time.monotonic() + LEAST > until:
        if data == "held-out":
            put(drafting, {"failed": "no time was left"})
        return f"no time was left to measure at {cost} cost on {data} prompts"
    if data == "held-out":
        found = survived(partial(_prepared, given, cost, target, there, begin, until))
        put(drafting, {"failed": found} if isinstance(found, str) else found)
    told = json.loads(awaited(drafting, until).read_text())
    if "failed" in told:
        return f"nothing can be measured at {cost} cost: {told['failed']}"
    model = told.pop("target")
    minutes = None if until == math.inf else max(0.0, until - time.monotonic() - SETTLED) / 60
    if data == SWEEP:
        methods = [f"{next(iter(SHAPES[name]))}={told[name]}" for name in RECURRENT if name in told]
        status = commands.sweep(model, _prompts(given, "held-out"), folder, methods, until, minutes=minutes)
    else:
        asked = {
            "held-out": {"own": given.bench_prompts, "grown": given.grown_prompts},
            "spec": {"own": given.spec_prompts, "grown": math.ceil(given.spec_prompts / 2)},
        }
        status = commands.bench(
            model,
            _prompts(given, data),
            folder,
            [f"{label}={path}{way}" for name, path in told.items() for label, way in SHAPES[name].items()],
            until,
            new_tokens=given.new_tokens,
            prompts=asked[data][cost],
            rounds=1 if cost == "grown" else given.rounds,
            minutes=minutes,
        )
    if status:
        return f"redrafter at {cost} cost on {data} prompts ended with status {status}"
    return None if _is_whole(folder) else f"not everything could be measured at {cost} cost on {data} prompts in time"


def _prepared(
    given: argparse.Namespace, cost: str, target: Path, there: dict[str, Path], begin: float, until: float
) -> dict[str, str]:
    """Folders of the target and its drafters at a compute cost."""
    folders = costs.grown(given, target, there, begin) if cost == "grown" else {"target": target} | there
    return {name: str(path) for name, path in folders.items()}


def _is_whole(folder: Path) -> bool:
    """Whether all measurements of a folder are complete."""
    file = folder / "results.json"
    return file.exists() and not any("no time was left" in one for one in json.loads(file.read_text())["failed"])


def page(output: Path) -> str:
    """The results so far, as Markdown."""
    head = ["method", "parameters", "seconds", "steps", "tokens", "loss"]
    rows = []
    for name in SHAPES:
        if _record(output, name).exists():
            record = json.loads(_record(output, name).read_text())
            failed = [record.get("failed", ""), *[""] * (len(head) - 2)]
            rows.append([name, *(failed if "failed" in record else (f"{record[key]:,}" for key in head[1:]))])
    lines = ["Trained on the target's answers:", "", Table(head, rows).markdown]
    for folder in sorted((output / "bench").glob("*")):
        if folder.name != f"own-{SWEEP}" and (folder / "results.json").exists():
            found = json.loads((folder / "results.json").read_text())
            lines += ["", f"{folder.name.replace('-', ' cost, ', 1)} prompts, on {found['about']['device']}:", ""]
            lines += [_measured(found).markdown]
    return "\n".join([*lines, ""])


def _measured(found: Record) -> Table:
    """A row per method over all categories: tokens per step, speed-up and draft time."""
    speed = {(one["method"], one["temperature"]): one for one in overall(found["speed"])}
    drafts = {one["method"]: one["draft_ms"] for one in reversed(found["parts"])}
    kinds = temperatures(found["speed"])
    titles = ("tokens per step", "speed-up", "speed-up over transformers", "equal texts")
    rows = []
    for one in found["methods"]:
        name = one["method"]
        row = [
            name,
            one.get("shape", ""),
            f"{one['parameters']:,}" if "parameters" in one else "",
            f"{drafts.get(name, 0.0):.2f}",
        ]
        for kind in kinds:
            cell = speed.get((name, kind), {})
            row += [f"{cell['tokens_per_step']:.2f}" if "tokens_per_step" in cell else ""]
            row += [spread(cell.get(key)) for key in ("speed_up", "speed_up_over_transformers")]
            row += [equal_texts(cell)]
        rows.append(row)
    columns = [f"{title}, {sampling_name(kind)}" for kind in kinds for title in titles]
    return Table(["method", "drafts", "parameters", "draft, ms", *columns], rows)


if __name__ == "__main__":
    main()
