"""The report: one page of sentences, tables and plots, as Markdown and as HTML without external resources.

Guarantees that the page explains what was measured, on what, and what each figure means.  Needs jinja2 and matplotlib.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from redrafter.bench import plots, tables
from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.results import Results
from redrafter.bench.summary import lead, title
from redrafter.bench.tables import Table, sampling_name, temperatures
from redrafter.bench.units import FLAT, UNCOUPLED
from redrafter.core.shapes import counted
from redrafter.errors import RedrafterError
from redrafter.utils import hub

FILES = ("results.json", "report.md", "report.html")


def check_packages() -> None:
    """Raises RedrafterError if a package of the extra `bench` is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = f"The benchmark report needs {error.name or 'more packages'}: run pip install 'redrafter[bench]'."
        raise RedrafterError(message) from None


@dataclass(frozen=True)
class Section:
    """A heading with sentences, a plot by its name, tables, and terms with their meaning."""

    title: str
    sentences: Sequence[str] = ()
    plot: str = ""
    caption: str = ""
    tables: Sequence[Table] = ()
    terms: dict[str, str] = field(default_factory=dict)


def sections(results: Results) -> list[Section]:
    """The sections of the page, in order.  Sections without figures are omitted."""
    found = [_conditions(results)]
    if results.get("calls"):
        found.append(_calls(results))
    if "sweep" not in results:
        found += _decoding(results)
    drafters = tables.drafters(results)
    if drafters:
        text = (
            "Cost and benefit of each method over all prompts: its weights, draft vocabulary, draft time and tokens "
            "per step. In the plot, methods further up and to the left are better."
        )
        several = len({one["method"] for one in drafters}) > 1
        plot = ("drafter_costs", "Tokens per step against draft time, with the number of parameters.")
        pages = [tables.drafter_costs(results, one) for one in temperatures(drafters)]
        found.append(Section("Drafters", [text], *(plot if several else ("", "")), pages))
    if parts := tables.parts(results):
        text = (
            f"A step of {counted(results['asked']['batch_size'], 'row')} at {results['parts'][0]['context']} tokens of "
            "context: drafting, the model's forward pass over all nodes, and the rest, which selects tokens and "
            "updates the cache. Milliseconds."
        )
        caption = "Milliseconds of a step: draft, verification and the rest, by method."
        found.append(Section("Time of a step", [text], "parts", caption, [parts]))
    if "sweep" in results:
        found += _sweep(results)
    if batches := tables.batches(results):
        text = (
            "Each point is a batch size, shown next to it. No row finishes early: some texts continue beyond their "
            "end. Points further left have a lower latency per token, points further up a higher total throughput."
        )
        caption = "Tokens per second over all rows against milliseconds per token of one row."
        found.append(Section("Batch size", [text], "batches", caption, [batches]))
    if results["failed"]:
        found.append(Section("Not measured", [f"{one.rstrip('.')}." for one in results["failed"]]))
    return [*found, _terms(results)]


def _conditions(results: Results) -> Section:
    about, data, options = results["about"], results["data"], results["asked"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    categories = "; ".join(f"{name} {one['prompts']} of {one['of']}" for name, one in data["categories"].items())
    prompts = sum(one["prompts"] for one in data["categories"].values())
    sentences = [
        f"Model: {about['model']}, {about['parameters'] / 1e6:,.1f} million parameters, {about['dtype']}. Machine: "
        f"{about['device']}, {about['system']}. Versions: {versions}. A step is {about['path']['a step']}; attention: "
        f"{about['path']['attention']}.",
        f"Prompts: {prompts} of {', '.join(data['files'])} ({categories}; of a chat, the first turn). Up to "
        f"{options['max_new_tokens']} new tokens per prompt, batch size {options['batch_size']}, "
        f"{', '.join(sampling_name(one) for one in options['temperatures'])}. In each of "
        f"{counted(options['rounds'], 'round')}, all methods run on the same prompts one after the other; figures are "
        "medians over the rounds, with the range in brackets. Sampled texts depend only on the seed: they are the same "
        "with any drafter and without one.",
        *results.get("notes", []),
    ]
    if data["too_long"]:
        sentences.append(f"{data['too_long']} prompts were excluded: they do not fit into the model's context.")
    rows = []
    for one in results["methods"]:
        drafts = one.get("shape", "no drafts") + (f"; greedy: as {one['greedily']}" if "greedily" in one else "")
        rows.append([one["method"], one.get("path", ""), drafts, tables.millions(one.get("parameters"))])
    table = Table(["method", "path", "drafts", "additional parameters"], rows, names=3)
    return Section("Setup", sentences, tables=[table])


def _calls(results: Results) -> Section:
    requests = max(one["requests"] for one in results["calls"])
    on_cuda = any(one["first_steps_ms"] for one in results["calls"])
    sentences = [
        f"Complete calls of generate with one prompt each ({counted(requests, 'prompt')}), as a user experiences them. "
        "The time includes argument checks, the prompt, "
        + ("the first steps, in which a CUDA graph is captured, " if on_cuda else "")
        + "decoding, and everything in between. Each figure is the mean of a round's calls.",
        "Every answer has the given length: end tokens are disabled for all methods, so some texts continue beyond "
        "their end. Calls before the first timed one build what is built on first use. Decoding figures exclude the "
        "prompt" + (" and the first steps." if on_cuda else "."),
    ]
    pages = [tables.calls(results, one) for one in temperatures(results["calls"])]
    caption = "Speed-up over autoregressive decoding, end to end by answer length, and in decoding only."
    return Section("End to end", sentences, "calls", caption, pages)


def _decoding(results: Results) -> list[Section]:
    text = (
        "The speed-up is the ratio of two runs of one round. Bars are medians, lines on them show the range; the "
        "dashed line is decoding without a drafter by the same engine."
    )
    pages = [tables.speed(results, one) for one in temperatures(results["speed"])]
    caption = "Speed-up over autoregressive decoding, by method and category of prompts."
    found = [Section("Decoding speed by category", [text], "speed", caption, pages)]
    if table := tables.acceptance(results):
        text = (
            "Acceptance rate by position: how often the model itself generates the first, second, … token of a draft "
            "and all tokens before it, over all prompts."
        )
        caption = "Acceptance rate up to each position, by method."
        found.append(Section("Acceptance by position", [text], "acceptance", caption, [table]))
    return found


def _sweep(results: Results) -> list[Section]:
    found, sweep = [], results["sweep"]
    if sweep["grid"]:
        text = (
            "Whole beams of each width and length. The largest figure of each map is bold. The shape with the most "
            "tokens per step is seldom the fastest, because wide and long drafts take time to make and to verify."
        )
        caption = "Two heat maps by beam width and length: tokens per second, and tokens per step."
        pair = [("Tokens/s", "tokens_per_second", ",.0f"), ("Tokens per step", "tokens_per_step", ".2f")]
        found.append(Section("Width and length", [text], "grid", caption, [tables.grid(results, *one) for one in pair]))
        text = (
            "Beams with a common prefix share nodes in a prefix tree, so fewer than width x length nodes are verified. "
            "The curves show the remaining share."
        )
        caption = "Nodes of the prefix tree in percent of width x length, by width, one line per length."
        nodes = tables.grid(results, "Nodes per draft", "nodes_per_draft", ".1f")
        found.append(Section("Nodes saved by shared prefixes", [text], "prefix_sharing", caption, [nodes]))
    if pages := [table for axis in ("widths", "batches") if (table := tables.prefix_trees(results, axis))]:
        sentences = [
            "The same beams, verified as one prefix tree and as flat beams, which are separate chains below one root. "
            "Accepted tokens and texts are the same. First by beam width at batch size 1, then by batch size with the "
            "method's default beams.",
            "On a CPU, a tree is trimmed to the nodes of the fullest row. On CUDA, a step has a fixed shape with room "
            "for all nodes of the beams, so sharing prefixes saves no time by itself; a node budget does.",
        ]
        caption = f"Nodes and tokens per second of prefix trees and {FLAT}, by beam width and by batch size."
        found.append(Section("Prefix tree and flat beams", sentences, "prefix_trees", caption, pages))
    if table := tables.budgets(results):
        text = "The most probable candidates of the search are verified, as many as the budget, including the root."
        caption = "Speed-up and tokens per step by node budget."
        found.append(Section("Node budget", [text], "budgets", caption, [table]))
    if table := tables.by_temperature(results):
        text = (
            "Drafts are accepted less often if the model's distribution is wider. Coupled methods rank drafts with the "
            f"noise that the model samples with; they are also shown {UNCOUPLED}. Other methods draft the same both "
            "ways."
        )
        caption = "Speed-up and tokens per step by temperature."
        found.append(Section("Temperature", [text], "by_temperature", caption, [table]))
    return found


def _terms(results: Results) -> Section:
    terms = {
        AUTOREGRESSIVE: "Decoding without a drafter, one token per step, by the same engine: the baseline of all "
        "speed-ups.",
        "tokens/s": "Tokens generated by decoding steps, divided by the time of those steps. Prompts and, on CUDA, the "
        "first steps of a call, in which a graph is captured, are excluded.",
        "tokens per step": "Mean acceptance length: accepted draft tokens plus the token that the model adds.",
        "nodes per draft": "Draft tokens that the model verifies in one step, without the root.",
        "parameters": "Weights that drafting reads in addition to the model's.",
        "draft vocabulary": "Number of the model's tokens that can be drafted.",
        "step, ms": "Time from one decoding step to the next.",
        "first token, ms": "Median time from the start of a prompt to its first token.",
        "equal texts": "Texts that equal those without a drafter token for token. In low precision, two correct "
        "computations may round differently; a text that diverges for another reason is counted as unexplained.",
    }
    if any(one["method"] == TRANSFORMERS for one in results["methods"]):
        terms[TRANSFORMERS] = (
            "transformers' generate without a drafter; on CUDA with a static cache and compiled steps."
        )
    if results.get("calls"):
        terms["call, s"] = "Seconds of a complete call of generate, measured by its caller."
        if any(one["first_steps_ms"] for one in results["calls"]):
            terms["first steps, ms"] = "The first three steps, in which a CUDA graph is captured or code is compiled."
    if any("peak_memory_bytes" in one for one in results["speed"]):
        terms["peak memory"] = "Weights of the model and the method, plus the largest additional memory of a run."
    return Section("Terms", terms=terms)


def markdown(results: Results) -> str:
    """The page as Markdown, without plots."""
    blocks = [f"# {title(results)}", *lead(results)]
    for section in sections(results):
        blocks += [f"## {section.title}", *section.sentences]
        for table in section.tables:
            blocks += [f"**{table.title}**"] if table.title else []
            blocks.append(table.markdown)
        if section.terms:
            blocks.append("\n".join(f"- **{name}**: {meaning}" for name, meaning in section.terms.items()))
    return "\n\n".join(blocks) + "\n"


def html(results: Results) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["b64"] = lambda text: base64.b64encode(text.encode()).decode()
    template = resources.files("redrafter.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title(results),
        lead=lead(results),
        sections=sections(results),
        plots=plots.draw(results),
        version=results["about"]["versions"]["redrafter"],
        options=json.dumps(results["asked"], ensure_ascii=False),
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Writes the three files atomically.  Raises RedrafterError if that fails."""
    texts = (json.dumps(results, indent=1, ensure_ascii=False) + "\n", markdown(results), html(results))
    hub.write_files(folder, {name: text.encode() for name, text in zip(FILES, texts, strict=True)})
    return [folder / name for name in FILES]
