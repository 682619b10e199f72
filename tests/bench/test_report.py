"""The report and the tables in pages: complete HTML, valid plots, and the figures of the results."""

from __future__ import annotations

import base64
import copy
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_bench_results import CALLS, RECORDS

from redrafter import RedrafterError
from redrafter.bench import charts, plots, readme, report, summary
from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.results import calls, parts, speeds

ROOT = Path(__file__).resolve().parents[2]
NAME = 'ours, <32> & $5$ | "q"'


def results(records=RECORDS):
    """A comparison with one drafting method, whose name needs escaping."""
    part = {"kind": "parts", "method": "ours", "category": "all", "temperature": 0.0, "batch": 1, "round": 0}
    part |= {"context": 30, "nodes": 21, "step_ms": 10.0, "draft_ms": 2.0, "verify_ms": 7.0}
    together = [one | {"kind": "together", "category": "all"} for one in records if one.get("category") == "a"]
    together = [one for one in together if "tokens" in one]
    found = {
        "about": {
            "model": "tiny", "parameters": 12_000_000, "dtype": "float32", "device": "a device", "system": "Linux",
            "cuda": None, "versions": {"redrafter": "0.1", "torch": "2", "transformers": "5"},
            "path": {"a step": "one CUDA graph", "attention": "kernels for trees"},
        },
        "asked": {"batch_size": 1, "max_new_tokens": 16, "temperatures": [0.0], "rounds": 3},
        "data": {"files": ["x.jsonl"], "too_long": 2,
                 "categories": {"a": {"prompts": 4, "of": 9}, "b": {"prompts": 2, "of": 2}}},
        "methods": [{"method": AUTOREGRESSIVE}, {"method": TRANSFORMERS},
                    {"method": "ours", "path": "drafter", "shape": "4 beams of 2 tokens", "parameters": 1_970_000,
                     "weights": "one recurrent step", "draft_vocabulary": "20 of 61 tokens"}],
        "speed": speeds(records), "batches": speeds(together, "together"), "parts": parts([part]), "failed": [],
    }  # fmt: skip
    return json.loads(json.dumps(found).replace('"ours"', json.dumps(NAME)))


def with_calls():
    """The same with complete calls of 9 and of 200 tokens."""
    found = calls(CALLS) + calls([one | {"new_tokens": 200} for one in CALLS])
    return results() | {"calls": json.loads(json.dumps(found).replace('"ours"', json.dumps(NAME)))}


def swept():
    """A sweep over two widths, two lengths, two budgets and two temperatures."""
    found = results()
    one = next(o for o in found["speed"] if o["method"] == NAME and o["category"] == "a")
    grid = [one | {"shape": {"width": w, "length": n, "budget": None}} for w in (1, 4) for n in (1, 2)]
    budgets = [one | {"shape": {"width": 4, "length": 2, "budget": budget}} for budget in (4, 8)]
    kinds = [one | {"temperature": t, "coupled": known} for t, known in ((0.0, True), (1.0, True), (1.0, False))]
    other = one | {"method": "other", "tokens_per_step": 2.75}
    folded = [one | {"batch": rows, "folded": True, "speed_up_over_unfolded": one["speed_up"]} for rows in (1, 2)]
    chains = [entry | {"folded": False, "nodes_per_draft": 16.0} for entry in folded]
    shaped = [entry | {"shape": {"width": 4, "length": 2, "budget": None}} for entry in (*folded, *chains)]
    found["sweep"] = {"grid": grid, "budgets": budgets, "temperatures": kinds, "all": [one, *grid]}
    found["sweep"] |= {"heads": [one, other], "folding": {"widths": shaped[::2], "batches": shaped}}
    methods = [found["methods"][0], found["methods"][2]]
    more = {
        "method": "other",
        "weights": "3 heads of 1 block",
        "draft_vocabulary": "all tokens",
        "parameters": 500_000,
    }
    found["parts"] += [found["parts"][0] | {"method": "other", "draft_ms": 0.5}]
    return found | {"speed": [], "methods": [*methods, methods[1] | more]}


class Page(HTMLParser):
    """Headings, texts and references of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.sources, self.headings, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.mark.parametrize(
    ("given", "headings"),
    [
        (
            results,
            ["Setup", "Decoding speed by category", "Acceptance by position", "Drafters",
             "Time of a step", "Batch size", "Terms"],
        ),
        (
            with_calls,
            ["Setup", "End to end", "Decoding speed by category", "Acceptance by position", "Drafters",
             "Time of a step", "Batch size", "Terms"],
        ),
        (
            swept,
            ["Setup", "Drafters", "Time of a step", "Width and length", "Nodes saved by shared prefixes",
             "Prefix tree and flat beams", "Node budget", "Temperature", "Batch size", "Terms"],
        ),
    ],
)  # fmt: skip
def test_the_page_is_complete_and_has_no_external_resources(given, headings):
    text = report.html(given())
    page = Page(text)
    assert page.open == []
    assert page.headings == headings
    one_drafter = given is not swept  # then there is no plot that compares drafters
    assert len(page.sources) == len(headings) - 2 - one_drafter  # a plot in every section but the first and the last
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        plot = ElementTree.fromstring(base64.b64decode(data))
        assert plot.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(plot.iter())) > 50
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", text)
    assert NAME in page.words, "names are shown unchanged"
    for cell in ("4 beams of 2 tokens", "1.97 M"):
        assert cell in page.words


def test_missing_figures_have_no_section_and_failures_are_listed():
    found = results() | {"parts": [], "batches": [], "failed": ["ours on a: No memory."]}
    page = Page(report.html(found))
    assert page.headings[-2:] == ["Not measured", "Terms"]
    assert "ours on a: No memory." in page.words
    assert "Not measured" in summary.lead(found)[-1]
    assert "Not measured" not in " ".join(summary.lead(results()))
    assert not {"Batch size", "Time of a step"} & set(page.headings)


def test_the_lead_names_the_fastest_method_and_compares_texts():
    lead = " ".join(summary.lead(results()))
    assert f"In greedy decoding, {NAME} is the fastest method: 20 tokens/s, a speed-up of 1.33" in lead
    assert "4 of 6 drafted texts" in lead
    assert "1 diverge beyond rounding, which is a bug" in lead
    explained = [one for one in RECORDS if one["category"] != "b"]
    lead = " ".join(summary.lead(results(explained)))
    assert "3.00 (2.00 to 3.00) over autoregressive decoding and 3.50 (3.00 to 4.00) over transformers" in lead
    assert "3 of 4 drafted texts" in lead
    assert "closer than the rounding error" in lead


def test_markdown_has_the_same_figures():
    text = report.markdown(results())
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    assert all(len(row) == len(cells[i - 1]) or set(cells[i + 1][0]) <= {"-", ":"} for i, row in enumerate(cells) if i)
    name = NAME.replace("|", r"\|")
    row = [
        "a",
        name,
        "20.0",
        "3.00 (2.00 to 3.00)",
        "3.50 (3.00 to 4.00)",
        "2.50",
        "8.0",
        "150.00",
        "30.0",
        "",
        "3 of 4",
    ]
    assert row in cells
    assert [name, "greedy", "2.50", "90%", "60%"] in cells
    assert [name, "greedy", "21", "2.000", "7.000", "1.000", "10.000", "20%"] in cells
    assert [name, "one recurrent step", "20 of 61 tokens", "1.97 M", "2.000", "2.50"] in [row[:6] for row in cells]
    assert "dialogue" not in text
    assert "2 prompts were excluded" in text
    assert "a 4 of 9; b 2 of 2" in text
    text = report.markdown(swept())
    assert "| width | length 1 | length 2 |" in text
    assert "| temperature 1 | uncoupled | 20.0 |" in text
    assert "| other | 3 heads of 1 block | all tokens | 0.50 M | 0.500 | 2.75 | 20.0 | 3.00 (2.00 to 3.00) |" in text
    assert "| batch size | nodes, prefix tree | nodes, flat beams | share |" in text
    assert "| 4 | 8.0 | 16.0 | 50% | 2.50 | 20 | 20 | 3.00 (2.00 to 3.00) |" in text


def test_plots_are_deterministic():
    assert plots.draw(results()) == plots.draw(results())


def test_a_report_begins_with_complete_calls():
    found = with_calls()
    first, second, *_ = summary.lead(found)
    assert first.startswith(f"In greedy decoding, {NAME} is the fastest method end to end: a call that generates 200")
    assert "2.25 s, a speed-up of 1.57 (1.00 to 2.14) over autoregressive decoding and 2.00 over transformers" in first
    assert second.startswith(f"In greedy decoding, {NAME} is the fastest method in decoding only: 20 tokens/s")
    text = report.markdown(found)
    assert "end tokens are disabled for all methods" in text
    name = NAME.replace("|", r"\|")
    row = f"| 9 | {name} | 2.250 (1.750 to 2.750) | 1.57 (1.00 to 2.14) | 2.00 | 500.0 | 250.0 | 3.0 | 2.00 (1.00"
    assert row in text
    assert row.replace("| 9 |", "| 200 |") in text
    assert "End to end" not in report.markdown(results())


def test_a_missing_figure_is_an_empty_cell():
    found = results() | {"notes": ["The first token of ours on a is missing."]}
    for one in found["speed"]:
        if (one["method"], one["category"]) == (NAME, "a"):
            del one["first_token_ms"]
    text = report.markdown(found)
    assert "The first token of ours on a is missing" in text
    assert "| 150.00 |  |  | 3 of 4 |" in text
    assert "The first token of ours" in report.html(found)


def many(folders: int, each: int):
    """Results of several folders, each in several shapes."""
    found = results()
    names = [(f"method {folder}.{shape}", f"folder {folder}") for folder in range(folders) for shape in range(each)]
    entries = [one for one in found["speed"] if one["method"] == NAME]
    found["speed"] += [one | {"method": name} for name, _ in names for one in entries]
    found["methods"] += [found["methods"][2] | {"method": name, "path": path} for name, path in names]
    found["parts"] += [found["parts"][0] | {"method": name} for name, _ in names]
    return found, [name for name, _ in names]


def test_each_method_has_its_own_style_and_each_folder_one_colour():
    found, names = many(9, 4)
    styles = charts.styles(found)
    assert len(set(styles.values())) == len(styles) == 9 * 4 + 3
    assert styles[NAME].colour == charts.COLOURS[0]
    assert {styles[name].colour for name in names[:4]} == {charts.COLOURS[1]}


def named(axis) -> list[str]:
    """The methods that label an axis."""
    return [text.get_text() for text in axis.get_yticklabels()]


@pytest.mark.parametrize("draw", [plots.speed, plots.calls])
def test_bars_are_labelled(draw):
    found, names = many(5, 3)
    calls = [one for one in with_calls()["calls"] if one["method"] == NAME]
    found["calls"] = [one | {"method": name} for name in names for one in calls]
    found["speed"] += [one | {"temperature": 1.0} for one in found["speed"] if one["method"] == names[0]]
    figure = draw(found)
    assert set(names) <= set(named(figure.axes[0]))
    for axis in figure.axes[1:]:
        assert named(axis) == [names[0]], "only the methods that it shows"
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == ({"all prompts", "a", "b"} if draw is plots.speed else
                     {"end to end, 200 tokens", "9 tokens", "decoding only, 200 tokens"})  # fmt: skip


def test_many_methods_have_a_panel_per_folder():
    found, names = many(5, 3)
    figure = plots.acceptance(found)
    assert not figure.legends
    shown = []
    for axis in figure.axes:
        own = {text.get_text(): handle for text, handle in
               zip(axis.get_legend().get_texts(), axis.get_legend().legend_handles, strict=True)}  # fmt: skip
        shown += own
        styles = charts.styles(found)
        for name, handle in own.items():
            assert (handle.get_color(), handle.get_linestyle()) == (styles[name].colour, styles[name].line)
        assert len({charts.styles(found)[name].colour for name in own}) == 1, "one folder per panel"
    assert sorted(shown) == sorted([NAME, *names])
    few, names = many(2, 2)
    (legend,) = plots.acceptance(few).legends
    assert [text.get_text() for text in legend.get_texts()] == [NAME, *names]


def test_labels_of_points_do_not_overlap():
    found, names = many(5, 3)
    (axis,) = plots.drafter_costs(found).axes
    texts = axis.texts
    assert {text.get_text().split(" (")[0] for text in texts} == {NAME, *names}
    heights = sorted(text.xyann[1] for text in texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.03
    assert heights[-1] <= 1


def test_a_method_has_the_same_marker_in_all_panels():
    found = swept()
    warm = [one | {"temperature": 1.0} for one in found["parts"] if one["method"] == "other"]
    heads = [one | {"temperature": 1.0} for one in found["sweep"]["heads"] if one["method"] == "other"]
    found["parts"] += warm
    found["sweep"]["heads"] += heads
    marks = {}
    for axis in plots.drafter_costs(found).axes:
        for line in axis.get_lines():
            marks.setdefault(line.get_label().split(" (")[0], set()).add(line.get_marker())
    assert len(marks["other"]) == len(marks[NAME]) == 1
    styles = charts.styles(found)
    assert styles["other"] != styles[NAME]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_one_sentence_with_the_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RedrafterError, match=rf"{package}.*pip install 'redrafter\[bench\]'"):
        report.check_packages()


def test_all_files_are_written(tmp_path):
    found = results()
    files = report.write(found, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]
    assert json.loads(files[0].read_text()) == found
    assert files[1].read_text() == report.markdown(found)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(file.name for file in files)


def test_a_page_shows_the_results_of_its_markers(tmp_path):
    slower = copy.deepcopy(results())
    slower["speed"][-1]["tokens_per_second"]["median"] = 7.0
    for name, found in (("one.json", results()), ("two.json", slower)):
        (tmp_path / name).write_text(json.dumps(found))
    page = "before\n<!-- results {} -->\nold\n<!-- /results -->\nafter\n"
    new = readme.fill(page.format("one.json"), tmp_path)
    assert new.startswith(
        "before\n<!-- results one.json -->\n\ntiny (12 M, float32) on a device, torch 2, transformers 5: 6 prompts"
    )
    assert new.endswith("\n\n<!-- /results -->\nafter\n")
    assert "old" not in new
    assert "| 4 beams of 2 tokens | greedy | 2.50 | 20 | 1.33 | 4 of 6, 1 unexplained |" in new
    assert readme.fill(new, tmp_path) == new
    other = readme.fill(page.format("two.json"), tmp_path)
    assert other != new.replace("one.json", "two.json")
    assert readme.fill(new + other, tmp_path) == new + other, "each marker has its own table"


def test_complete_calls_come_first_in_a_page(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(with_calls()))
    (tmp_path / "old.json").write_text(json.dumps(results()))
    new = readme.fill("<!-- results one.json -->\n<!-- /results -->", tmp_path)
    assert (
        "| method | drafts | decoding | end to end, 9 tokens | end to end, 200 tokens | tokens per step | tokens/s | "
        "decoding speed-up | equal texts |"
    ) in new
    both = "1.57 (1.00 to 2.14) | 1.57 (1.00 to 2.14)"
    assert f"| 4 beams of 2 tokens | greedy | {both} | 2.50 | 20 | 1.33 | 4 of 6, 1 unexplained |" in new
    assert "complete calls of `generate` over undrafted calls (2 prompts, one per call" in " ".join(new.split())
    new = readme.fill("<!-- results one.json old.json -->\n<!-- /results -->", tmp_path)
    assert "| method | 1: greedy, end to end, 200 tokens | 1: greedy, decoding | 2: greedy |" in new
    assert " | 1.57 | 1.33 (2.50) | 1.33 (2.50) |" in new


def test_several_results_are_compared_in_one_table(tmp_path):
    larger = copy.deepcopy(results())
    larger["about"]["parameters"] = 7_000_000_000
    for one in larger["speed"]:
        if "speed_up" in one:
            one["speed_up"]["median"] = 2.5
    for name, found in (("one.json", results()), ("two.json", larger)):
        (tmp_path / name).write_text(json.dumps(found))
    new = readme.fill("<!-- results one.json two.json -->\n<!-- /results -->", tmp_path)
    assert "\n1. tiny (12 M, float32) on a device" in new
    assert "\n2. tiny (7,000 M, float32) on a device" in new
    assert "| method | 1: greedy | 2: greedy |" in new
    assert " | 1.33 (2.50) | 2.50 (2.50) |" in new
    assert "autoregressive" not in new
    assert readme.fill(new, tmp_path) == new


def test_a_page_without_markers_is_an_error(tmp_path):
    with pytest.raises(RedrafterError, match="There is no <!-- results FILE -->"):
        readme.fill("<!-- /results -->\n<!-- results one.json -->\n", tmp_path)
    with pytest.raises(RedrafterError, match=r"one\.json cannot be read: .*No such file"):
        readme.fill("<!-- results one.json -->\n<!-- /results -->", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "one Markdown page"),
        (["none.md"], "none.md cannot be read or written: No such"),
        (["page.md"], "page.md: There"),
    ],
)
def test_errors_of_the_command_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").touch()
    with pytest.raises(SystemExit) as end:
        readme.main(arguments)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["docs/results.md", "docs/comparison.md"])
def test_pages_show_the_committed_results(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    assert readme.fill(text, page.parent) == text
