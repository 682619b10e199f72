"""Trains drafters of one target with different recipes on the same prompts and for the same number of steps.

Guarantees figures on held-out prompts by category, greedy and sampled, written after each drafter, and that processes
with a common folder share the work.  Does not know how the target was trained.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recipes.common.answers import answers, contexts, prompt_of, put, restored, stored
from recipes.common.corpus import Corpus
from recipes.target.measure import WAYS, Texts, counts, decoded, draft_ms, quality, written
from recipes.target.stages import awaited, say, survived
from recipes.target.variants import Variant, variants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redrafter import RecurrentDrafter
from redrafter.data.examples import Row
from redrafter.targets.target import Target
from redrafter.training.continuations import continued
from redrafter.training.recipe import Recipe
from redrafter.training.trainer import run

LENGTH = 4

Record = dict[str, Any]
"""What goes into a results file."""


@dataclass(frozen=True)
class Plan:
    """The amount of training and measurement, and the share of this process."""

    steps: int
    batch: int
    """Packed rows of 1,024 tokens in a step."""
    prompts: int
    """Of each training file, times its share."""
    held_out: int
    """Prompts of each category."""
    new_tokens: int
    widths: list[int]
    part: int
    parts: int
    seconds: float | None
    """After so many from the beginning of the run, no drafter more is begun."""
    only: list[str]
    """The name of a drafter must hold one of these."""

    def takes(self, number: int, variant: Variant) -> bool:
        """Whether this process trains the variant."""
        return number % self.parts == self.part and self.wants(variant)

    def wants(self, variant: Variant) -> bool:
        """Whether any process trains the variant."""
        return any(part in variant.name for part in self.only)


def compare(
    corpus: Corpus,
    categories: dict[str, str],
    shares: dict[str, float],
    target: Path,
    output: Path,
    plan: Plan,
    begin: float,
) -> bool:
    """Trains the drafters of this part that its results lack; False if one of them failed.

    `begin` is the start time of the run, from `time.monotonic`.
    """
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(target).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    file = output / f"results-{plan.part}.json"
    found = _begun(file, plan)
    training = target / "training.json"
    found["training"] = json.loads(training.read_text()) if training.exists() else None
    found["config"] = model.config.to_dict() | {"name": target.name, "parameters": model.num_parameters()}

    def save() -> None:
        file.write_text(json.dumps(found, indent=1) + "\n")

    asked = prompts_of(corpus, tokenizer, shares, plan.prompts, output)
    say(begin, f"{len(asked):,} prompts to learn from")
    held_out = measured_on(corpus, categories, tokenizer, plan.held_out)
    own, texts = written_by(model, asked, held_out, output, plan.new_tokens, (plan.part, plan.parts), begin)
    data: dict[str, list[Row]] = {"text": asked, **own}
    data["both"] = own["greedy"] + own["sampled"]
    found["data"] = {name: {"rows": len(r), "tokens": sum(one.learnt for one in r)} for name, r in data.items()}
    listed = variants(model.config)
    if plan.part == 0:
        if "target" not in found:
            found["target"] = {
                way: {category: quality(model, tokenizer, rows) for category, rows in texts[way].items()}
                for way in WAYS
            }
        _time(model, list(filter(plan.wants, listed)), plan.widths, found.setdefault("drafts", {}))
        save()
        say(begin, "measured the target and the time of drafts")

    def trained(variant: Variant) -> Record:
        if variant.data == "continuations" and "continuations" not in data:
            ends = frozenset([tokenizer.eos_token_id])
            made = dict(continued(Target(model), asked, depth=LENGTH + 1, ends=ends, batch_size=64))
            data["continuations"] = [made[index] for index in range(len(asked))]
        return _variant(variant, model, data[variant.data], texts, output, plan)

    for number, variant in enumerate(listed):
        if not plan.takes(number, variant) or variant.name in found["variants"]:
            continue
        if plan.seconds is not None and time.monotonic() - begin > plan.seconds:
            say(begin, "no time left for more")
            break
        result = survived(partial(trained, variant))
        if isinstance(result, str):
            found["failed"][variant.name] = result
        else:
            found["variants"][variant.name] = {"number": number} | result
        save()
        say(begin, f"{variant.name}: {result if isinstance(result, str) else json.dumps(result['counts'])}")
    if found["variants"]:
        best = max(found["variants"], key=lambda name: _tokens_per_step(found["variants"][name]["counts"]))
        if found.get("check", {}).get("variant") != best:
            counted = found["variants"][best]["counts"]
            found["check"] = {"variant": best} | _checked(model, _folder(output, best), counted, texts, plan)
            save()
    return not found["failed"]


def _begun(file: Path, plan: Plan) -> Record:
    """The results so far; results of another plan are discarded."""
    sizes = {name: value for name, value in asdict(plan).items() if name not in ("part", "seconds", "only")}
    found = json.loads(file.read_text()) if file.exists() else {"variants": {}}
    if found.get("plan", sizes) != sizes:
        raise SystemExit(f"{file} was begun with {found['plan']}: go on with those, or take another output.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found | {"plan": sizes, "length": LENGTH, "torch": torch.__version__, "device": device, "failed": {}}


def prompts_of(corpus: Corpus, tokenizer, shares: dict[str, float], count: int, output: Path) -> list[Row]:
    """Conversations of the training files that end in an answer, sorted by prompt length; cached in a file.

    `count` times its share of each file.
    """
    file = output / "answers" / "asked.json"
    if file.exists():
        return restored(json.loads(file.read_text()))
    found = [
        row
        for name in corpus.chat
        for row in contexts(corpus, name, tokenizer, held_out=False, count=round(count * shares.get(name, 1.0)))
        if row.learnt
    ]
    found.sort(key=lambda row: len(prompt_of(row)))
    put(file, stored(found))
    return found


def measured_on(corpus: Corpus, categories: dict[str, str], tokenizer, count: int) -> Texts:
    """Held-out prompts, a number per category."""
    return {
        category: contexts(corpus, name, tokenizer, held_out=True if name in corpus.chat else None, count=count)
        for category, name in categories.items()  # a file that nothing is learnt from is there to be evaluated on
    }


def written_by(
    model: PreTrainedModel,
    asked: list[Row],
    held_out: Texts,
    output: Path,
    new_tokens: int,
    part: tuple[int, int],
    begin: float,
    until: float = math.inf,
) -> tuple[dict[str, list[Row]], dict[str, Texts]]:
    """The target's answers to `asked` and its texts for the held-out prompts, greedy and sampled; one process each."""
    folder = output / "answers"
    for number, way in enumerate(WAYS):
        file = folder / f"{way}.json"
        if number % part[1] != part[0] or file.exists():
            continue
        learnt = answers(model, asked, sampled=way == "sampled")
        new = written(model, held_out, way, new_tokens)
        put(file, {"answers": stored(learnt), "texts": {name: stored(rows) for name, rows in new.items()}})
        say(begin, f"wrote {sum(row.learnt for row in learnt):,} tokens of answers, {way}")
    own, texts = {}, {}
    for way in WAYS:
        record = json.loads(awaited(folder / f"{way}.json", until).read_text())
        own[way] = restored(record["answers"])
        texts[way] = {name: restored(rows) for name, rows in record["texts"].items()}
    say(begin, "all answers are there")
    return own, texts


def drafter_of(variant: Variant, model: PreTrainedModel, vocabulary: torch.Tensor | None) -> RecurrentDrafter:
    """A new, untrained drafter."""
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(model, beam_length=LENGTH, draft_vocabulary=vocabulary, **variant.head)


def _time(model: PreTrainedModel, listed: list[Variant], widths: list[int], found: dict[str, dict[str, float]]) -> None:
    """Draft time in milliseconds by width, once for each head shape, since the weights do not matter."""

    def measured(variant: Variant) -> dict[str, float]:
        ids = torch.arange(model.config.vocab_size // variant.vocabulary)
        drafter = drafter_of(variant, model, None if variant.vocabulary == 1 else ids).to(model.dtype).eval()
        return {str(width): round(draft_ms(model, drafter, width), 4) for width in widths}

    for variant in listed:
        if shape_of(variant) not in found:
            times = survived(partial(measured, variant))
            if not isinstance(times, str):
                found[shape_of(variant)] = times


def shape_of(variant: Variant) -> str:
    """A key that is equal for variants with the same head shape."""
    return json.dumps([variant.head, variant.vocabulary])


def _variant(
    variant: Variant, model: PreTrainedModel, rows: list[Row], texts: dict[str, Texts], output: Path, plan: Plan
) -> Record:
    begin = time.monotonic()
    vocabulary, covered = variant.scored(rows, model.config.vocab_size), None
    if vocabulary is not None:
        covered = {way: _coverage(texts[way], set(vocabulary.tolist())) for way in WAYS}
    drafter = drafter_of(variant, model, vocabulary)
    recipe = Recipe(
        max_steps=plan.steps, batch_size=plan.batch, packing=1024, save_steps=10**6, objective=variant.objective
    )
    folder = _folder(output, variant.name)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
    loss = run(model, drafter, rows, folder, recipe, resume=False).loss
    trained = time.monotonic()
    return {
        **asdict(variant),
        "shape": shape_of(variant),
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "draft_vocabulary": drafter.config.draft_vocab_size,
        "coverage": covered,
        "loss": round(loss, 3),
        "counts": {f"{way} {w}": counts(model, drafter, texts[way], way, w) for way in WAYS for w in plan.widths},
        "seconds": [round(trained - begin), round(time.monotonic() - trained)],
    }


def _folder(output: Path, name: str) -> Path:
    return output / "drafters" / re.sub(r"\W+", "-", name)


def _coverage(texts: Texts, vocabulary: set[int]) -> dict[str, float]:
    """The share of each category's tokens that are in the draft vocabulary."""
    found = {}
    for name, rows in texts.items():
        new = [token for row in rows for token in row.input_ids[len(prompt_of(row)) :]]
        found[name] = round(sum(token in vocabulary for token in new) / len(new), 4)
    return found


def _tokens_per_step(counted: dict[str, dict[str, list[int]]]) -> float:
    """Tokens per step for all settings, widths and categories."""
    pairs = [pair for categories in counted.values() for pair in categories.values()]
    return sum(tokens for tokens, _ in pairs) / sum(steps for _, steps in pairs)


def _checked(
    model: PreTrainedModel, folder: Path, counted: dict[str, dict[str, list[int]]], texts: dict[str, Texts], plan: Plan
) -> Record:
    """Tokens and steps of actual decoding with one drafter, next to those counted on the texts."""
    width = plan.widths[0]
    drafter = RecurrentDrafter.from_pretrained(folder, target=model)
    check: Record = {"width": width}
    for way in WAYS:
        by_texts = [sum(pair) for pair in zip(*counted[f"{way} {width}"].values(), strict=True)]
        check[way] = {"counted": by_texts, "decoded": decoded(model, drafter, texts[way], way, width, plan.new_tokens)}
    return check
