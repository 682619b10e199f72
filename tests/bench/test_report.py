"""A page that stands alone: parsed as a browser would, its pictures as XML, its figures as they were given."""

from __future__ import annotations

import base64
import builtins
import copy
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_bench_results import CALLS, RECORDS

from redrafter import RedrafterError
from redrafter.bench import charts, plots, readme, report
from redrafter.bench.contenders import ALONE, THEIRS
from redrafter.bench.results import calls, parts, speeds

ROOT = Path(__file__).resolve().parents[2]
NAME = 'ours, <32> & $5$ | "q"'


def results(records=RECORDS):
    """A comparison of one method, whose name is as awkward as a user may make it."""
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
        "methods": [{"method": ALONE}, {"method": THEIRS},
                    {"method": "ours", "path": "drafter", "shape": "4 beams of 2 tokens", "parameters": 1_970_000,
                     "weights": "one recurrent step", "draft_vocabulary": "20 of 61 tokens"}],
        "speed": speeds(records), "batches": speeds(together, "together"), "parts": parts([part]), "failed": [],
    }  # fmt: skip
    return json.loads(json.dumps(found).replace('"ours"', json.dumps(NAME)))


def with_calls():
    """The same with complete calls of 9 tokens and of 200."""
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
    """What is on a page: headings, images, words, tables' rows, and whatever it refers to."""

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
            ["What was measured", "Speed by task", "Acceptance by position", "Drafters side by side",
             "Where the time of a step goes", "Rows together", "What the words mean"],
        ),
        (
            with_calls,
            ["What was measured", "End to end", "Speed by task", "Acceptance by position", "Drafters side by side",
             "Where the time of a step goes", "Rows together", "What the words mean"],
        ),
        (
            swept,
            ["What was measured", "Drafters side by side", "Where the time of a step goes", "Width and length",
             "What folding saves", "Folded and unfolded", "Nodes", "Temperature", "Rows together",
             "What the words mean"],
        ),
    ],
)  # fmt: skip
def test_the_page_is_whole_in_itself(given, headings):
    text = report.page(given())
    page = Page(text)
    assert page.open == []
    assert page.headings == headings
    alone = given is not swept  # of one drafter there is no picture beside others
    assert len(page.sources) == len(headings) - 2 - alone  # a picture in every section but the first and the last
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        picture = ElementTree.fromstring(base64.b64decode(data))
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(picture.iter())) > 50
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", text)
    assert NAME in page.words, "a name is shown as it was given"
    for cell in ("4 beams of 2 tokens", "1.97 M"):
        assert cell in page.words


def test_what_was_not_measured_has_no_section_and_what_failed_is_told():
    found = results() | {"parts": [], "batches": [], "failed": ["ours on a: No memory."]}
    page = Page(report.page(found))
    assert page.headings[-2:] == ["Not measured", "What the words mean"]
    assert "ours on a: No memory." in page.words
    assert "Not all that was asked for could be measured" in report.lead(found)[-1]
    assert "Not all that was asked for" not in " ".join(report.lead(results()))
    assert not {"Rows together", "Where the time of a step goes"} & set(page.headings)


def test_the_lead_says_what_is_fastest_and_whether_texts_are_equal():
    told = " ".join(report.lead(results()))
    assert f"In greedy decoding {NAME} is the fastest: 20 tokens a second, 1.33 times as fast" in told
    assert "4 of 6 drafted texts" in told
    assert "1 part where rounding does not explain it, which is a fault" in told
    honest = [one for one in RECORDS if one["category"] != "b"]
    told = " ".join(report.lead(results(honest)))
    assert "3.00 (2.00 to 3.00) times as fast as without a drafter and 3.50 (3.00 to 4.00) times as fast as" in told
    assert "3 of 4 drafted texts are, token for token, what is written without a drafter; the others part where" in told


def test_markdown_holds_the_same_figures():
    text = report.markdown(results())
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    assert all(len(row) == len(cells[i - 1]) or set(cells[i + 1][0]) <= {"-", ":"} for i, row in enumerate(cells) if i)
    name = NAME.replace("|", r"\|")
    told = [
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
    assert told in cells
    assert [name, "greedy", "2.50", "90%", "60%"] in cells
    assert [name, "greedy", "21", "2.000", "7.000", "1.000", "10.000", "20%"] in cells
    assert [name, "one recurrent step", "20 of 61 tokens", "1.97 M", "2.000", "2.50"] in [row[:6] for row in cells]
    assert "dialogue" not in text
    assert "2 prompts were left out" in text
    assert "a 4 of 9; b 2 of 2" in text
    text = report.markdown(swept())
    assert "| width | length 1 | length 2 |" in text
    assert "| temperature 1 | without the draws' noise | 20.0 |" in text
    assert "| other | 3 heads of 1 block | all tokens | 0.50 M | 0.500 | 2.75 | 20.0 | 3.00 (2.00 to 3.00) |" in text
    assert "| rows together | nodes, folded | unfolded | left |" in text
    assert "| 4 | 8.0 | 16.0 | 50% | 2.50 | 20 | 20 | 3.00 (2.00 to 3.00) |" in text


def test_pictures_are_the_same_for_the_same_results():
    assert plots.drawn(results()) == plots.drawn(results())


def test_a_report_begins_with_what_a_user_waits_for():
    found = with_calls()
    first, second, *_ = report.lead(found)
    assert first == (
        f"In greedy decoding {NAME} is the fastest end to end: a call that writes 200 tokens takes 2.25 s, 1.57 (1.00 "
        "to 2.14) times as fast as without a drafter and 2.00 times as fast as transformers' own generate."
    )
    assert second.startswith(f"In greedy decoding {NAME} is the fastest in decoding alone: 20 tokens a second")
    text = report.markdown(found)
    assert "end tokens are switched off for all methods" in text
    name = NAME.replace("|", r"\|")
    row = f"| 9 | {name} | 2.250 (1.750 to 2.750) | 1.57 (1.00 to 2.14) | 2.00 | 500.0 | 250.0 | 3.0 | 2.00 (1.00"
    assert row in text
    assert row.replace("| 9 |", "| 200 |") in text
    assert "End to end" not in report.markdown(results())


def test_what_a_report_leaves_out_has_an_empty_cell_and_a_note():
    found = results() | {"notes": ["The first token of ours on a is left out: it was warm-up."]}
    for one in found["speed"]:
        if (one["method"], one["category"]) == (NAME, "a"):
            del one["first_token_ms"]
    text = report.markdown(found)
    assert "The first token of ours on a is left out" in text
    assert "| 150.00 |  |  | 3 of 4 |" in text
    assert "The first token of ours" in report.page(found)


def many(folders: int, each: int):
    """Results of so many folders, each in so many shapes."""
    found = results()
    names = [(f"method {folder}.{shape}", f"folder {folder}") for folder in range(folders) for shape in range(each)]
    entries = [one for one in found["speed"] if one["method"] == NAME]
    found["speed"] += [one | {"method": name} for name, _ in names for one in entries]
    found["methods"] += [found["methods"][2] | {"method": name, "path": path} for name, path in names]
    found["parts"] += [found["parts"][0] | {"method": name} for name, _ in names]
    return found, [name for name, _ in names]


def test_no_two_methods_look_alike_and_a_folder_has_one_colour():
    found, names = many(9, 4)
    looks = charts.looks(found)
    assert len(set(looks.values())) == len(looks) == 9 * 4 + 3
    assert looks[NAME].colour == charts.COLOURS[0]
    assert {looks[name].colour for name in names[:4]} == {charts.COLOURS[1]}


def named(axis) -> list[str]:
    """The methods that an axis names beside what it shows."""
    return [text.get_text() for text in axis.get_yticklabels()]


@pytest.mark.parametrize("draw", [plots._speed, plots._calls])
def test_every_bar_has_its_name_beside_it(draw):
    found, names = many(5, 3)
    calls = [one for one in with_calls()["calls"] if one["method"] == NAME]
    found["calls"] = [one | {"method": name} for name in names for one in calls]
    found["speed"] += [one | {"temperature": 1.0} for one in found["speed"] if one["method"] == names[0]]
    figure = draw(found)
    assert set(names) <= set(named(figure.axes[0]))
    for axis in figure.axes[1:]:
        assert named(axis) == [names[0]], "a panel names what it shows"
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == ({"all prompts", "a", "b"} if draw is plots._speed else
                     {"end to end, 200 tokens", "9 tokens", "decoding alone, 200 tokens"})  # fmt: skip


def test_no_legend_holds_more_methods_than_there_are_colours():
    found, names = many(5, 3)
    figure = plots._acceptance(found)
    assert not figure.legends
    shown = []
    for axis in figure.axes:
        own = {text.get_text(): handle for text, handle in
               zip(axis.get_legend().get_texts(), axis.get_legend().legend_handles, strict=True)}  # fmt: skip
        shown += own
        looks = charts.looks(found)
        for name, handle in own.items():
            assert (handle.get_color(), handle.get_linestyle()) == (looks[name].colour, looks[name].line)
        assert len({charts.looks(found)[name].colour for name in own}) == 1, "a panel a folder"
    assert sorted(shown) == sorted([NAME, *names])
    few, names = many(2, 2)
    (legend,) = plots._acceptance(few).legends
    assert [text.get_text() for text in legend.get_texts()] == [NAME, *names]


def test_names_beside_points_do_not_cover_each_other():
    found, names = many(5, 3)
    (axis,) = plots._heads(found).axes
    texts = axis.texts
    assert {text.get_text().split(" (")[0] for text in texts} == {NAME, *names}
    heights = sorted(text.xyann[1] for text in texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.03
    assert heights[-1] <= 1


def test_a_mark_belongs_to_a_method():
    found = swept()
    warm = [one | {"temperature": 1.0} for one in found["parts"] if one["method"] == "other"]
    heads = [one | {"temperature": 1.0} for one in found["sweep"]["heads"] if one["method"] == "other"]
    found["parts"] += warm
    found["sweep"]["heads"] += heads
    marks = {}
    for axis in plots._heads(found).axes:
        for line in axis.get_lines():
            marks.setdefault(line.get_label().split(" (")[0], set()).add(line.get_marker())
    assert len(marks["other"]) == len(marks[NAME]) == 1
    looks = charts.looks(found)
    assert looks["other"] != looks[NAME]


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RedrafterError, match="pip install matplotlib"):
        plots.required()


def test_all_files_are_written(tmp_path):
    found = results()
    files = report.write(found, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]
    assert json.loads(files[0].read_text()) == found
    assert files[1].read_text() == report.markdown(found)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(file.name for file in files)


def test_a_page_shows_the_results_that_its_markers_name(tmp_path):
    slower = copy.deepcopy(results())
    slower["speed"][-1]["tokens_per_second"]["median"] = 7.0
    for name, found in (("one.json", results()), ("two.json", slower)):
        (tmp_path / name).write_text(json.dumps(found))
    page = "before\n<!-- results {} -->\nold\n<!-- /results -->\nafter\n"
    new = readme.put(page.format("one.json"), tmp_path)
    assert new.startswith(
        "before\n<!-- results one.json -->\n\ntiny (12 M, float32) on a device, torch 2, transformers 5: 6 prompts"
    )
    assert new.endswith("\n\n<!-- /results -->\nafter\n")
    assert "old" not in new
    assert "| 4 beams of 2 tokens | greedy | 2.50 | 20 | 1.33 | 4 of 6, 1 unexplained |" in new
    assert readme.put(new, tmp_path) == new
    other = readme.put(page.format("two.json"), tmp_path)
    assert other != new.replace("one.json", "two.json")
    assert readme.put(new + other, tmp_path) == new + other, "each has its own"


def test_the_first_figures_of_a_page_are_end_to_end(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(with_calls()))
    (tmp_path / "old.json").write_text(json.dumps(results()))
    new = readme.put("<!-- results one.json -->\n<!-- /results -->", tmp_path)
    assert (
        "| method | drafts | decoding | end to end, 9 tokens | end to end, 200 tokens | tokens per step | tokens/s | "
        "decoding alone | equal texts |"
    ) in new
    both = "1.57 (1.00 to 2.14) | 1.57 (1.00 to 2.14)"
    assert f"| 4 beams of 2 tokens | greedy | {both} | 2.50 | 20 | 1.33 | 4 of 6, 1 unexplained |" in new
    assert "End to end: complete calls of `generate` (2 prompts, one a call, end tokens off" in " ".join(new.split())
    new = readme.put("<!-- results one.json old.json -->\n<!-- /results -->", tmp_path)
    assert "| method | 1: greedy, end to end, 200 tokens | 1: greedy, decoding alone | 2: greedy |" in new
    assert " | 1.57 | 1.33 (2.50) | 1.33 (2.50) |" in new


def test_several_results_stand_side_by_side(tmp_path):
    larger = copy.deepcopy(results())
    larger["about"]["parameters"] = 7_000_000_000
    for one in larger["speed"]:
        if "speed_up" in one:
            one["speed_up"]["median"] = 2.5
    for name, found in (("one.json", results()), ("two.json", larger)):
        (tmp_path / name).write_text(json.dumps(found))
    new = readme.put("<!-- results one.json two.json -->\n<!-- /results -->", tmp_path)
    assert "\n1. tiny (12 M, float32) on a device" in new
    assert "\n2. tiny (7,000 M, float32) on a device" in new
    assert "| method | 1: greedy | 2: greedy |" in new
    assert " | 1.33 (2.50) | 2.50 (2.50) |" in new
    assert "autoregressive" not in new
    assert readme.put(new, tmp_path) == new


def test_a_page_without_results_is_refused(tmp_path):
    with pytest.raises(RedrafterError, match="There is no <!-- results FILE --> with <!-- /results --> after it"):
        readme.put("<!-- /results -->\n<!-- results one.json -->\n", tmp_path)
    with pytest.raises(RedrafterError, match=r"one\.json cannot be read: .*No such file"):
        readme.put("<!-- results one.json -->\n<!-- /results -->", tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name one page"),
        (["none.md"], "none.md cannot be read or written: No such"),
        (["page.md"], "page.md: There"),
    ],
)
def test_a_page_that_cannot_be_filled_is_told_in_a_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").touch()
    with pytest.raises(SystemExit) as end:
        readme.main(words)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["docs/results.md", "docs/comparison.md"])
def test_pages_show_the_committed_results(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    assert readme.put(text, page.parent) == text
