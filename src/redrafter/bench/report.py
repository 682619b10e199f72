"""The report: one page of sentences, tables and pictures, as Markdown and as HTML that refers to nothing outside it.

Promises that a reader who does not know the package can tell what was measured on what, and what a figure means.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from redrafter.bench import plots, tables
from redrafter.bench.contenders import ALONE, THEIRS
from redrafter.bench.tables import Results, Table, law, overall, temperatures, times
from redrafter.bench.variants import NO_NOISE
from redrafter.core.shapes import counted
from redrafter.utils import hub

FILES = ("results.json", "report.md", "report.html")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.lead { font-size: 1.08rem; background: #f3f6f9; border-left: 4px solid #0072b2; padding: .6rem 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0 1.2rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
.name { text-align: left; white-space: normal; } figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; } figcaption, footer { color: #555; font-size: .88rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, sentences, a picture by its name with what it shows, tables, and terms with what they mean."""

    title: str
    sentences: Sequence[str] = ()
    picture: tuple[str, str] | None = None
    tables: Sequence[Table | None] = ()
    terms: dict[str, str] = field(default_factory=dict)


def title(results: Results) -> str:
    """Of the page."""
    model = results["about"]["model"] or "the model"
    if "sweep" in results:
        return f"Which drafts pay for {model}: shapes of {results['methods'][1]['method']}"
    return f"How fast {model} writes, by way of drafting"


def lead(results: Results) -> list[str]:
    """What came of it, in sentences; complete calls first."""
    found = [_fastest_call(results, one) for one in temperatures(results.get("calls", []))]
    alone = " in decoding alone" if found else ""
    entries = results["sweep"]["all"] if "sweep" in results else overall(results["speed"])
    for temperature in temperatures(entries):
        own = [one for one in entries if one["temperature"] == temperature and "speed_up" in one]
        own = [one for one in own if one["method"] != THEIRS and one.get("folded", True)]
        if not own:
            continue
        best = max(own, key=lambda one: one["speed_up"]["median"])
        beside = best.get("speed_up_over_transformers")
        found.append(
            f"{_chosen(temperature)} {best['method']} is the fastest{alone}: "
            f"{best['tokens_per_second']['median']:,.0f} tokens a second, "
            f"{times(best['speed_up'])} times as fast as without a drafter"
            + (f" and {times(beside)} times as fast as transformers' own generate" if beside else "")
            + f"; a step writes {best['tokens_per_step']:.2f} tokens."
        )
    held = [one for one in entries if "texts" in one]
    if held:
        texts, same = (sum(one[name] for one in held) for name in ("texts", "texts_equal"))
        odd = sum(one["texts_parted_without_reason"] for one in held)
        rest = "."
        if texts > same:
            rest = "; the others part where the two best logits are nearer than rounding reaches."
        if odd:
            rest = f"; {odd} part where rounding does not explain it, which is a fault of the drafting."
        found.append(
            f"{same:,} of {texts:,} drafted texts are, token for token, what is written without a drafter{rest}"
        )
    if results["failed"]:
        found.append("Not all that was asked for could be measured: under Not measured this page says what is missing.")
    return found


def _chosen(temperature: float) -> str:
    return "In greedy decoding" if not temperature else f"At temperature {temperature:g}"


def _fastest_call(results: Results, temperature: float) -> str:
    """The fastest method's complete calls; why there is none where nothing was drafted."""
    calls = tables.headline(results, temperature)
    drafted = [one for one in calls if "speed_up" in one and one["method"] != THEIRS]
    if not drafted:
        return f"{_chosen(temperature)} no drafted calls could be compared end to end."
    best = max(drafted, key=lambda one: one["speed_up"]["median"])
    beside = best.get("speed_up_over_transformers")
    return (
        f"{_chosen(temperature)} {best['method']} is the fastest end to end: a call that writes {best['new_tokens']} "
        f"tokens takes {best['seconds']['median']:.3g} s, {times(best['speed_up'])} times as fast as without a drafter"
        + (f" and {times(beside)} times as fast as transformers' own generate." if beside else ".")
    )


def sections(results: Results) -> list[Section]:
    """The page in order; what was not measured has no section."""
    found = [_measured(results)]
    if results.get("calls"):
        found.append(_calls(results))
    if "sweep" not in results:
        found += _compared(results)
    compared = tables.drafters(results)
    if compared:
        told = (
            "What each method is and costs beside what it brings, over all prompts: a larger head, fewer tokens to "
            "draft among and other training show here what they are worth. In the picture up and to the left is better."
        )
        several = len({one["method"] for one in compared}) > 1
        picture = ("heads", "Tokens per step against milliseconds of a draft, by method, with its parameters.")
        pages = [tables.heads(results, one) for one in temperatures(compared)]
        found.append(Section("Drafters side by side", [told], picture if several else None, pages))
    if results["parts"]:
        told = (
            f"A step of {counted(results['asked']['batch_size'], 'row')} at {results['parts'][0]['context']} tokens, "
            "timed piece by piece: making the draft, the model's run over all its nodes, and the rest of the step, "
            "which chooses and keeps tokens."
        )
        picture = ("parts", "Milliseconds of a step: draft, verify and the rest, by method.")
        found.append(Section("Where the time of a step goes", [told], picture, [tables.parts(results)]))
    if "sweep" in results:
        found += _swept(results)
    if results["batches"]:
        told = (
            "Each point is a number of rows decoded together, which stands beside it. No row ends before the others: "
            "some write on where their text would have ended. To the left a row waits less for each of its tokens, "
            "upwards more is written in all."
        )
        picture = ("batches", "Tokens a second of all rows against milliseconds that one row waits for a token.")
        found.append(Section("Rows together", [told], picture, [tables.batches(results)]))
    if results["failed"]:
        found.append(Section("Not measured", [f"{one.rstrip('.')}." for one in results["failed"]]))
    return [*found, _terms(results)]


def _measured(results: Results) -> Section:
    about, data, asked = results["about"], results["data"], results["asked"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    kinds = "; ".join(f"{name} {one['prompts']} of {one['of']}" for name, one in data["categories"].items())
    whole = sum(one["prompts"] for one in data["categories"].values())
    sentences = [
        f"Model: {about['model']}, {about['parameters'] / 1e6:,.1f} million parameters, in {about['dtype']}. Machine: "
        f"{about['device']}, {about['system']}. Versions: {versions}. A step is {about['path']['a step']}; attention: "
        f"{about['path']['attention']}.",
        f"Prompts: {whole} of {', '.join(data['files'])} ({kinds}; of a chat its first turn), to each of which up to "
        f"{asked['max_new_tokens']} tokens are written, {counted(asked['batch_size'], 'prompt')} at a time, "
        f"{', '.join(law(one) for one in asked['temperatures'])}. Measured in {counted(asked['rounds'], 'round')}, in "
        "each of which all ways take their turn on the same prompts; figures are medians of the rounds, in brackets "
        "the least and the most. Where tokens are drawn, a text is a function of its seed: the same with any drafter "
        "or none.",
    ]
    sentences += results.get("notes", [])
    if data["too_long"]:
        sentences.append(f"{data['too_long']} prompts were left out: the model has no room for them and an answer.")
    rows = []
    for one in results["methods"]:
        drafts = one.get("shape", "no drafts") + (f"; greedily as {one['greedily']}" if "greedily" in one else "")
        rows.append([one["method"], one.get("path", ""), drafts, tables.millions(one.get("parameters"))])
    table = Table(["method", "from", "drafts", "parameters beside the model's"], rows, names=3)
    return Section("What was measured", sentences, tables=[table])


def _calls(results: Results) -> Section:
    requests = max(one["requests"] for one in results["calls"])
    on_cuda = any(one["first_steps_ms"] for one in results["calls"])
    told = [
        f"What a user's clock shows: complete calls of generate, one prompt a call, {counted(requests, 'prompt')}. A "
        "call's time includes the checks of its arguments, the prompt, "
        + ("the first steps, in which a CUDA graph is captured, " if on_cuda else "")
        + "decoding, and everything between them. Each figure is a round's mean over its calls.",
        "Every answer has exactly the length that is named: end tokens are switched off for all methods, so some texts "
        "run on where they would have ended. Calls before the first timed one build what is built on first use. "
        "Decoding alone leaves out the prompt" + (" and the first steps." if on_cuda else "."),
    ]
    picture = ("calls", "Times as fast as without a drafter, end to end by length of answer, and decoding alone.")
    pages = [tables.calls(results, one) for one in temperatures(results["calls"])]
    return Section("End to end", told, picture, pages)


def _compared(results: Results) -> list[Section]:
    told = (
        "Speed-up is the ratio of two runs in one round. Bars are medians, lines on them reach from the least to the "
        "most; the dashed line is decoding without a drafter, by the same engine."
    )
    picture = ("speed", "Times as fast as without a drafter, by category of prompts and method.")
    pages = [tables.speed(results, one) for one in temperatures(results["speed"])]
    found = [Section("Speed by task", [told], picture, pages)]
    table = tables.acceptance(results)
    if table is not None:
        told = (
            "How often the first, second, … token of a draft, and all before it, is what the model writes itself, over "
            "all prompts."
        )
        picture = ("acceptance", "Share of drafts accepted up to each position, by method.")
        found.append(Section("Acceptance by position", [told], picture, [table]))
    return found


def _swept(results: Results) -> list[Section]:
    found, sweep = [], results["sweep"]
    if sweep["grid"]:
        told = (
            "Whole beams of every width and length. The largest figure of each map is in bold: the shape that is "
            "accepted most is seldom the fastest, for wide and long drafts take time to make and to verify."
        )
        picture = ("grid", "Two heat maps of width by length: tokens a second, and tokens per step.")
        pair = [("Tokens/s", "tokens_per_second", ",.0f"), ("Tokens per step", "tokens_per_step", ".2f")]
        maps = [tables.grid(results, *one) for one in pair]
        found.append(Section("Width and length", [told], picture, maps))
        told = (
            "Beams that begin alike are folded into one tree, so that fewer nodes are verified than width x length; "
            "the curves say what share of them is left."
        )
        picture = (
            "folding",
            "Nodes after folding in per cent of width times length, by width, a line for each length.",
        )
        nodes = tables.grid(results, "Nodes of a draft", "nodes_per_draft", ".1f")
        wide = any(one["shape"]["width"] > 1 for one in sweep["grid"])
        found.append(Section("What folding saves", [told], picture if wide else None, [nodes]))
    pages = [tables.folding(results, axis) for axis in ("widths", "batches")]
    if any(pages):
        told = (
            "The same beams, verified as one tree and as chains of their own below one root: what is accepted and "
            "written is the same. First by beams, one row at a time; then by rows that are decoded together, with the "
            "method's own beams."
        )
        device = (
            "On a CPU a tree is cut to the nodes that the fullest row has. On CUDA, where a step has one shape, a tree "
            "of whole beams has room for all their nodes, so folding saves no time by itself: a number of nodes does."
        )
        picture = ("unfolded", "Nodes and tokens a second, folded and unfolded, by beams and by rows together.")
        found.append(Section("Folded and unfolded", [told, device], picture, pages))
    if sweep["budgets"]:
        told = "Of all nodes that the search weighed, the so many most probable are verified, the root counted."
        picture = ("budgets", "Speed-up and tokens per step by the number of nodes.")
        found.append(Section("Nodes", [told], picture, [tables.points(results, "budgets")]))
    if sweep["temperatures"]:
        told = (
            "Drafts are accepted less often where the model's draws are spread wider. A method that ranks by the noise "
            f"that the model is about to draw with is also shown {NO_NOISE}; others draft the same both ways."
        )
        picture = ("temperatures", "Speed-up and tokens per step by temperature.")
        found.append(Section("Temperature", [told], picture, [tables.points(results, "temperatures")]))
    return found


def _terms(results: Results) -> Section:
    terms = {
        ALONE: "Decoding without a drafter, one token a step, by the same engine: what speed-ups are measured against.",
        "tokens/s": "Tokens written by decoding steps over the time of those steps. The prompts' own runs are "
        "left out, and on CUDA the first steps of a call, in which a graph is captured.",
        "tokens per step": "Also mean acceptance length: the drafted tokens that are kept and one that the model adds.",
        "nodes a draft": "Drafted tokens that the model verifies in one step, without the root.",
        "parameters": "Weights that drafting reads beside the model's own.",
        "drafts among": "The draft vocabulary: how many of the model's tokens may be drafted.",
        "step, ms": "All that decoding does from one step to the next.",
        "first token, ms": "From a prompt's entry to its first token, the median.",
        "equal texts": "Texts that are token for token those without a drafter. In low precision two right ways to "
        "compute may round differently; a text that parts where that does not explain it is called unexplained.",
    }
    if any(one["method"] == THEIRS for one in results["methods"]):
        terms[THEIRS] = "transformers' own generate without a drafter, with a static cache and compiled steps on CUDA."
    if results.get("calls"):
        terms["a call, s"] = "Seconds of a complete call of generate, as its caller measures them."
        if any(one["first_steps_ms"] for one in results["calls"]):
            terms["first steps, ms"] = "The first three steps, in which a CUDA graph is captured or code is compiled."
    if any("peak_memory_bytes" in one for one in results["speed"]):
        terms["peak memory"] = "Weights of the model and of the method, and the most that a run needed beside them."
    return Section("What the words mean", terms=terms)


def markdown(results: Results) -> str:
    """The page without its pictures."""
    lines = [f"# {title(results)}", "", *_lines(lead(results))]
    for one in sections(results):
        lines += [f"## {one.title}", "", *_lines(one.sentences)]
        for table in one.tables:
            if table is not None:
                lines += [f"**{table.title}**", ""] if table.title else []
                lines += [table.markdown, ""]
        lines += [f"- **{name}**: {meaning}" for name, meaning in one.terms.items()]
    return "\n".join(lines).rstrip() + "\n"


def _lines(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in (sentence, "")]


def page(results: Results) -> str:
    """The whole page as HTML.  Raises RedrafterError where the pictures cannot be drawn."""
    pictures = plots.drawn(results)
    heading = html.escape(title(results))
    lines = ['<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">', f"<title>{heading}</title>"]
    lines += ['<meta name="viewport" content="width=device-width">', f"<style>{STYLE}</style>\n</head>\n<body>"]
    lines += [f"<h1>{heading}</h1>", f'<p class="lead">{"<br>".join(map(html.escape, lead(results)))}</p>']
    for one in sections(results):
        lines.append(f"<h2>{html.escape(one.title)}</h2>")
        lines += [f"<p>{html.escape(sentence)}</p>" for sentence in one.sentences]
        if one.picture is not None and one.picture[0] in pictures:
            name, shows = one.picture
            data = base64.b64encode(pictures[name].encode()).decode()
            image = f'<img alt="{html.escape(shows)}" src="data:image/svg+xml;base64,{data}">'
            lines.append(f"<figure>{image}<figcaption>{html.escape(shows)}</figcaption></figure>")
        lines += [_table(table) for table in one.tables if table is not None]
        if one.terms:
            terms = [f"<dt>{html.escape(n)}</dt><dd>{html.escape(meaning)}</dd>" for n, meaning in one.terms.items()]
            lines.append(f"<dl>{''.join(terms)}</dl>")
    told = html.escape(json.dumps(results["asked"], ensure_ascii=False))
    lines.append(f"<footer><p>redrafter {results['about']['versions']['redrafter']}; asked for: {told}</p></footer>")
    return "\n".join([*lines, "</body>\n</html>\n"])


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        told = [
            f"<{tag}{' class=' + chr(34) + 'name' + chr(34) if place < table.names else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(told)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    heading = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
    return (
        f'{heading}<div class="wide"><table><thead>{row(table.head, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Writes all three files, each whole or not at all.  Raises RedrafterError where that fails."""
    texts = (json.dumps(results, indent=1, ensure_ascii=False) + "\n", markdown(results), page(results))
    hub.write_files(folder, {name: text.encode() for name, text in zip(FILES, texts, strict=True)})
    return [folder / name for name in FILES]
