"""Writes the model cards from the measurements of the stages."""

from __future__ import annotations

import json
from pathlib import Path

DATA = """\
| file | what | source | licence |
|---|---|---|---|
| sgd | task dialogues | Schema-Guided Dialogue (Rastogi et al., 2020), \
github.com/google-research-datasets/dstc8-schema-guided-dialogue | CC BY-SA 4.0 |
| gsm8k_train | grade-school maths | github.com/openai/grade-school-math (Cobbe et al., 2021) | MIT |
| gpteacher | instructions (without its tool-calling rows) | github.com/teknium1/GPTeacher | MIT |
| books | classic books | github.com/mlschmitt/classic-books-markdown | public domain |
| cpp_docs | technical English | github.com/MicrosoftDocs/cpp-docs (Microsoft and contributors) | CC BY 4.0 |
| python_stdlib | source code | CPython's standard library (Python Software Foundation) | PSF-2.0 |
"""

SHARE_ALIKE = """\
The weights are offered under CC BY-SA 4.0, the widest of their data's terms, with attribution as in the table; the
texts were cut into tokens and otherwise unchanged."""


def write(target: Path, drafter: Path) -> None:
    """Writes `README.md` into both folders."""
    made = json.loads((target / "training.json").read_text())
    losses = "\n".join(f"| {name} | {loss:.2f} |" for name, loss in made["held_out_loss"].items())
    (target / "README.md").write_text(
        f"""---
library_name: transformers
license: cc-by-sa-4.0
language: en
---

# {target.name}

A chat model of {made["parameters"]:,} parameters (Llama shape: 16 layers of width 256, a vocabulary of 4,096, a context
of 1,024) that books tables and buses, tries small sums and writes a few lines of code or prose. It exists to show
drafting at work on a CPU, and knows nothing worth relying on: names, prices and results are invented, and long prose
goes round in circles.

## Data and licences

{DATA}
{SHARE_ALIKE}

## Training

From scratch by `recipes/demo` of redrafter on one {made["device"]}: {made["steps"]:,} steps of {made["batch"]}
windows of 1,024 tokens ({made["tokens"]:,} tokens) in {made["minutes"]:g} minutes, AdamW with a cosine rate and
dropout, bfloat16 arithmetic, torch {made["torch"]}. Loss on held-out rows, in nats a token:

| file | loss |
|---|---|
{losses}

The weights are stored in bfloat16; the config asks for float32 arithmetic.
"""
    )
    trained = json.loads((drafter / "training.json").read_text())
    figures = ""
    for name, ways in trained["held_out"].items():
        for way, figure in ways.items():
            shares = ", ".join(f"{share:.0%}" for share in figure["accepted_by_position"])
            figures += f"| {name} | {way} | {figure['tokens_per_step']:.2f} | {shares} |\n"
    (drafter / "README.md").write_text(
        f"""---
library_name: redrafter
license: cc-by-sa-4.0
language: en
tags:
- speculative-decoding
- custom_generate
---

# Recurrent drafter for {target.name}

Trained by `recipes/demo` of redrafter on one {trained["device"]} on {trained["answers"]:,} answers
({trained["answer_tokens"]:,} tokens), half of them greedy and half sampled at temperature 1, that the target itself
wrote to prompts from sgd, gsm8k_train and gpteacher: {trained["epochs"]:g} epochs, {trained["seconds"]} seconds in all,
{trained["seconds_writing_answers"]} of them for the answers. It learns the target's distribution and its draws by known
noise, not the answers' tokens. Data and sources are those of the target:

{DATA}
{SHARE_ALIKE}

Tokens per step on prompts held out of training, greedy and sampled at temperature 1, the {trained["node_budget"]} most
probable nodes of {trained["beam_width"]} beams of {trained["beam_length"]} tokens, and share of drafts accepted at each
position:

| file | decoding | tokens per step | accepted |
|---|---|---|---|
{figures}"""
    )


NAMES = {"medusa": "Medusa heads", "eagle": "EAGLE head", "draft": "Small draft model"}


def write_rivals(target: Path, output: Path) -> None:
    """Writes `README.md` for the other drafting methods."""
    for name, title in NAMES.items():
        made = json.loads((output / name / "training.json").read_text())
        kind = made["kind"][0].upper() + made["kind"][1:]
        library, before = "redrafter", ""
        if "before" in made:
            library, text = "transformers", made["before"]
            seen = f"{text['tokens']:,} tokens in {text['minutes']:g} minutes"
            before = f"from scratch on the target's own data ({seen}), then\n"
        (output / name / "README.md").write_text(
            f"""---
library_name: {library}
license: cc-by-sa-4.0
language: en
tags:
- speculative-decoding
---

# {title} for {target.name}

{kind} of {made["parameters"]:,} parameters: {made["head"]}.
It is there to be compared with the recurrent drafter beside it, by `redrafter bench --demo`.

Trained by `recipes/demo` of redrafter {before}on answers that the target itself wrote, half of them greedy and half
sampled at temperature 1, for {made["seconds"]:g} seconds: {made["steps"]:,} steps, {made["tokens"]:,} tokens read. It
learnt the target's distribution at every place of those answers. Data and sources are those of the target:

{DATA}
{SHARE_ALIKE}
"""
        )
