"""What the recipes promise, at a size that a CPU trains in a second, on other data; a step takes a second here."""

from __future__ import annotations

import json
import lzma
import random
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from redrafter import RecurrentDrafter, generate
from redrafter.bench import plots, runner
from redrafter.proposers.loading import load_drafter
from redrafter.training import clock

sys.path.append(str(Path(__file__).parent.parent))
from recipes.common import methods, pretrain
from recipes.common.answers import answers, contexts
from recipes.common.corpus import Corpus, is_held_out, train_tokenizer
from recipes.demo import cards, drafter, rivals
from recipes.demo import run as demo_run
from recipes.demo import shape as demo
from recipes.target import commands, compare, costs, shape
from recipes.target import run as drafters_run

WORDS = "table hotel seven tonight please book the a in at for two good cheap rating bus from to".split()


@pytest.fixture(scope="module", autouse=True)
def steps_of_a_second():
    """Every look at the clock finds one second more, so that a time is a number of steps."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (pretrain, clock):
            patched.setattr(module, "time", SimpleNamespace(perf_counter=map(float, count()).__next__))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with one file of short dialogues."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def said() -> str:
        return " ".join(draw.choices(WORDS, k=8))

    rows = []
    for number in range(600):
        messages = [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
        rows.append({"id": f"row {number}", "messages": messages})
    assert sum(map(is_held_out, rows)) > 5
    with lzma.open(folder / "sgd.jsonl.xz", "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="module")
def corpus(data) -> Corpus:
    return Corpus(data, {"sgd": 1.0}, {}, vocabulary=320, context=48)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus)


@pytest.fixture
def quick(monkeypatch):
    """`bench` measures once, after a warm-up of one token, and draws nothing."""
    monkeypatch.setattr(runner, "REPEATS", 1)
    monkeypatch.setattr(runner, "WARM_UP_TOKENS", 1)
    monkeypatch.setattr(plots, "draw", lambda results: {})


def trained(corpus: Corpus, tokenizer, folder: Path, family: str = "llama", layers: int = 2) -> Path:
    """A model of width 64, after 59 steps."""
    pretrain.train(
        corpus,
        tokenizer,
        shape.configuration(corpus, family, width=64, layers=layers),
        folder,
        peak_rate=1e-2,
        chat_share=1.0,
        minutes=1,
        batch=4,
        device=torch.device("cpu"),
        dtype="float32",
    )
    return folder


@pytest.fixture(scope="module")
def target(corpus, tokenizer, tmp_path_factory) -> Path:
    return trained(corpus, tokenizer, tmp_path_factory.mktemp("models") / "target")


@pytest.mark.parametrize("family", shape.FAMILIES)
def test_every_family_is_trained_drafted_for_and_measured(corpus, tokenizer, family, tmp_path, say, quick):
    folder = trained(corpus, tokenizer, tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.model_type, model.dtype) == (family, torch.float32)
    made = json.loads((folder / "training.json").read_text())
    assert made["held_out_loss"]["sgd"] < 4, "chance is 5.8"
    assert made["steps"] == 59
    head = RecurrentDrafter.for_target(model, beam_width=3, beam_length=2)
    head.save_pretrained(tmp_path / "head")
    prompts = [[3, 40, 50, 60], [3, 41], [3, 80, 90, 100, 110, 120]]
    alone = generate(model, None, prompts, max_new_tokens=12).new_tokens
    assert generate(model, head, prompts, max_new_tokens=12).new_tokens == alone
    (tmp_path / "rows.jsonl").write_text('{"turns": ["book a table"]}\n{"turns": ["a bus to"]}\n')
    words = ["--model", folder, "--prompts", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--rounds", 1]
    words += ["--method", f"ours={tmp_path / 'head'}", "--max-new-tokens", 8, "--temperatures", 1, "--device", "cpu"]
    status, told, err = say("bench", *words)
    assert status == 0, err
    assert "2 of 2 drafted texts equal" in told


@pytest.mark.parametrize("family", shape.FAMILIES)
def test_what_layers_add_is_dropped_out_in_training_alone(corpus, family):
    model = AutoModelForCausalLM.from_config(shape.configuration(corpus, family, width=64, layers=2))
    pretrain.drop_out(model)
    ids = torch.arange(5, 25)[None]  # of the pad token, 0, all is zero
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
        model.train()
        drawn = []
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.register_forward_hook(lambda _, __, output: drawn.append((output == 0).float().mean().item()))
        model(ids)
    assert len(drawn) == 4
    assert all(0.02 < share < 0.25 for share in drawn)


def test_a_draft_model_learns_what_its_target_answers(corpus, tokenizer, target, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    asked = contexts(corpus, "sgd", tokenizer, held_out=False, count=24)
    rows = answers(model, asked[:12]) + answers(model, asked[12:], sampled=True)
    before = trained(corpus, tokenizer, tmp_path / "before", layers=1)
    effort = methods.Effort(seconds=52.0, batch=2, rate=3e-3)
    record = methods.train_draft_model(before, model, tokenizer, rows, tmp_path / "draft", effort)
    assert record["steps"] == 51
    assert record["curve"][0][1] > 2 * record["curve"][-1][1] > 0
    assert record["tokens"] > 51 * 2 * 10
    assert record["before"]["minutes"] == 1
    draft = load_drafter(tmp_path / "draft", model)
    prompts = [row.input_ids[:12] for row in rows[:4]]
    out = generate(model, draft, prompts, max_new_tokens=16)
    assert out.new_tokens == generate(model, None, prompts, max_new_tokens=16).new_tokens
    assert out.stats.accepted > 0


def test_the_rivals_of_the_demo_are_bundled_with_their_cards(corpus, target, tmp_path, monkeypatch):
    config = shape.configuration(corpus, "llama", width=64, layers=1)
    monkeypatch.setattr(demo, "draft_configuration", lambda _: config)
    how = {"seconds": 3.0, "minutes": 1 / 20, "batch": 2, "device": torch.device("cpu"), "limit": 16}
    rivals.train(corpus, target, tmp_path, **how)
    cards.write_rivals(target, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target)
    prompts = [[3, 40, 50, 60], [3, 41]]
    alone = generate(model, None, prompts, max_new_tokens=12).new_tokens
    for name in ("medusa", "eagle", "draft"):
        method = load_drafter(tmp_path / name, model)
        assert generate(model, method, prompts, max_new_tokens=12).new_tokens == alone
        made = json.loads((tmp_path / name / "training.json").read_text())
        card = (tmp_path / name / "README.md").read_text()
        assert f"of {made['parameters']:,} parameters" in card
        assert f"{made['steps']:,} steps, {made['tokens']:,} tokens read" in card
        assert ("from scratch on the target's own data" in card) == (name == "draft")
    written = (tmp_path / "answers.json").read_text()
    assert len(json.loads(written)) == 16

    def never(*args, **kwargs):
        raise AssertionError("all is done")

    monkeypatch.setattr(rivals, "train_head", never)
    monkeypatch.setattr(rivals, "train_draft_model", never)
    monkeypatch.setattr(drafter, "answers", never)
    rivals.train(corpus, target, tmp_path, **how)


def test_the_rivals_of_the_demo_are_small_enough_to_ship(data):
    from redrafter import EagleHead, MedusaHeads

    full = demo.corpus(data)
    model = AutoModelForCausalLM.from_config(demo.configuration(full))
    rows = [methods.Row([5, *range(2048)], [False] + [True] * 2048)]
    made = [way.make(model, rows) for way in rivals.WAYS.values()]
    made.append(AutoModelForCausalLM.from_config(demo.draft_configuration(full)))
    assert [type(one) for one in made[:2]] == [MedusaHeads, EagleHead]
    assert all(2 * sum(weight.numel() for weight in one.parameters()) < 4.9e6 for one in made)


def test_a_comparison_goes_from_data_to_a_table_and_does_nothing_twice(
    corpus, tmp_path, monkeypatch, say, capsys, quick
):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    monkeypatch.setattr(shape, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(compare.prompts, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(shape, "PEAK_RATE", 1e-2)
    monkeypatch.setattr(costs, "PUBLISHED", {"hidden": 96, "layers": 2, "heads": 2, "inner": 200})
    first = {name: dict([next(iter(shapes.items()))]) for name, shapes in compare.SHAPES.items()}
    monkeypatch.setattr(compare, "SHAPES", first)
    ran = []

    def command(words, until):
        status, _, err = say(*words, *(["--temperatures", 0] if words[0] == "bench" else []))
        ran.append((words[0], status, "not measured" in err, err))
        return status

    monkeypatch.setattr(commands, "command", command)
    spec = tmp_path / "spec.jsonl"
    spec.write_text(json.dumps({"category": "coding", "turns": ["book a bus", "no"]}) + "\n")
    words = f"compare --data {corpus.folder} --output {tmp_path} --width 64 --layers 2 --minutes 1 --batch 4"
    words += " --prompts 8 --held-out 2 --new-tokens 8 --each 3 --draft-minutes 0.05 --method-batch 1 --rounds 1"
    words += " --bench-prompts 1 --grown-prompts 1 --hidden 128 --grown-layers 3 --heads 2 --inner 180"
    words += f" --small-width 64 --small-layers 1 --spec-bench {spec}"
    words += " --methods recurrent draft medusa draft-small eagle"
    monkeypatch.setattr(sys, "argv", words.split())
    compare.main()
    told = capsys.readouterr().out
    assert [one[1:3] for one in ran] == [(0, False)] * 5, ran
    assert [one[0] for one in ran] == ["bench"] * 5  # the first is a rehearsal
    page = (tmp_path / "compare-0.md").read_text()
    assert told.endswith(page)
    names = [line.split(" | ")[0] for line in page.splitlines()[4:9]]
    assert names == ["| recurrent", "| draft", "| medusa", "| draft-small", "| eagle"]
    for name in ("own-held-out", "grown-held-out", "own-spec", "grown-spec"):
        found = json.loads((tmp_path / "bench" / name / "results.json").read_text())
        speed = found["speed"]
        assert len(found["methods"]) == 2 + 6
        assert all(one["texts_equal"] == one["texts"] > 0 for one in speed if "texts" in one)
        assert set(found["data"]["categories"]) == {"dialogue" if "held-out" in name else "multi-turn"}
        assert f"{name.replace('-', ' cost, ', 1)} prompts, on " in page
    parameters = [
        {one["method"]: one.get("parameters") for one in json.loads(file.read_text())["methods"]}
        for file in (tmp_path / "bench" / f"{cost}-spec" / "results.json" for cost in ("own", "grown"))
    ]
    for name in (label for ways in first.values() for label in ways if label in parameters[0]):
        assert parameters[1][name] > parameters[0][name]
    assert len(parameters[0]) == 2 + 6
    small = json.loads((tmp_path / "grown" / "draft-small" / "config.json").read_text())
    assert (small["hidden_size"], small["num_hidden_layers"], small["head_dim"]) == (96, 2, 64)
    assert len((tmp_path / "prompts" / "held-out.jsonl").read_text().splitlines()) == 2

    file = tmp_path / "bench" / "own-spec" / "results.json"
    found = json.loads(file.read_text())
    lines = file.with_name("measurements.jsonl").read_text()
    file.write_text(json.dumps(found | {"failed": ["3 measurements, for which no time was left; …"]}))
    compare.main()
    assert len(ran) == 6, "what there was no time for is measured by the same command"
    assert json.loads(file.read_text()) == found
    assert file.with_name("measurements.jsonl").read_text() == lines

    def never(*args, **kwargs):
        raise AssertionError("all is done")

    for module, name in (
        (compare, "train_head"),
        (compare, "train_draft_model"),
        (costs, "grown_target"),
        (commands, "command"),
        (pretrain, "train"),
    ):
        monkeypatch.setattr(module, name, never)
    compare.main()
    assert (tmp_path / "compare-0.md").read_text() == page


def test_a_sweep_has_what_was_not_distilled_beside_the_first(corpus, tokenizer, target, tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    monkeypatch.setattr(shape, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(compare.prompts, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(commands, "rehearse", lambda *_: None)
    taught, asked = {}, []

    def train_head(way, model, rows, folder, effort):
        taught[folder.name] = [row.input_ids for row in rows]
        return dict.fromkeys(("parameters", "seconds", "steps", "tokens", "loss"), 1)

    def command(words, until):
        asked.append([str(word) for word in words])
        return 2 if len(asked) == 2 else 0

    monkeypatch.setattr(compare, "train_head", train_head)
    monkeypatch.setattr(commands, "command", command)
    words = f"compare --data {corpus.folder} --output {tmp_path} --target {target} --tokenizer {target} --prompts 6"
    words += " --held-out 1 --new-tokens 2 --each 1 --methods medusa recurrent-text recurrent --no-grown"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--sweep"])
    compare.main()
    prompts = round(6 * shape.SHARES["sgd"])
    written = [row.input_ids for row in contexts(corpus, "sgd", tokenizer, held_out=False, count=prompts)]
    assert sorted(taught["recurrent-text"]) == sorted(written), "what people wrote"
    assert taught["recurrent"] == taught["medusa"]
    assert not [row for row in taught["recurrent"] if row in written], "what the target answered itself"
    assert [one[0] for one in asked] == ["bench", "sweep", "sweep"]
    assert asked[2] == [*asked[1], "--overwrite"], "one that was begun with others is begun anew"
    methods = [asked[1][place + 1] for place, word in enumerate(asked[1]) if word == "--method"]
    folder = tmp_path / "methods"
    assert methods == [f"recurrent={folder / 'recurrent'}", f"recurrent, not distilled={folder / 'recurrent-text'}"]


def test_what_fails_is_named_and_nothing_is_begun_without_time(
    corpus, tokenizer, target, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    monkeypatch.setattr(shape, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(compare.prompts, "CATEGORIES", {"dialogue": "sgd"})

    def fails(*args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr(compare, "train_head", fails)
    monkeypatch.setattr(commands, "rehearse", lambda *_: None)
    monkeypatch.setattr(compare, "LEAST", 10**9)
    words = f"compare --data {corpus.folder} --output {tmp_path} --target {target} --tokenizer {target} --prompts 4"
    words += " --held-out 1 --new-tokens 2 --each 1 --methods medusa eagle --seconds 1000"
    monkeypatch.setattr(sys, "argv", words.split())
    compare.main()
    told = capsys.readouterr().out
    assert "medusa is not there: ValueError: no such luck" in told
    assert "no time was left to measure at own cost on held-out prompts" in told
    assert json.loads((tmp_path / "own.json").read_text()) == {"failed": "no time was left"}  # for who waits for it
    assert "| eagle | ValueError: no such luck |" in told
    monkeypatch.setattr(sys, "argv", words.replace("--each 1", "--each 2000").split())
    compare.main()
    assert "eagle is not there: no time was left to train it" in capsys.readouterr().out


def test_where_nothing_can_be_measured_no_process_waits_for_it(corpus, target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    monkeypatch.setattr(shape, "CATEGORIES", {"dialogue": "sgd"})
    monkeypatch.setattr(compare.prompts, "CATEGORIES", {"dialogue": "sgd"})
    asked = []

    def fails(*args):
        raise MemoryError("too large")

    def train_head(way, model, rows, folder, effort):
        return dict.fromkeys(("parameters", "seconds", "steps", "tokens", "loss"), 1)

    def awaited(file, until=0.0):
        assert file.exists(), "nobody will write it"
        return file

    def command(words, until):
        asked.append((words[0], Path(words[words.index("--output") + 1]).name))
        return 0

    monkeypatch.setattr(compare, "train_head", train_head)
    monkeypatch.setattr(compare, "awaited", awaited)
    monkeypatch.setattr(costs, "grown", fails)
    monkeypatch.setattr(commands, "command", command)
    monkeypatch.setattr(commands, "rehearse", lambda *_: None)
    spec = tmp_path / "spec.jsonl"
    spec.write_text(json.dumps({"category": "coding", "turns": ["book a bus", "no"]}) + "\n")
    words = f"compare --data {corpus.folder} --output {tmp_path} --target {target} --tokenizer {target} --prompts 4"
    words += f" --held-out 1 --new-tokens 2 --each 1 --methods medusa --spec-bench {spec}"
    monkeypatch.setattr(sys, "argv", words.split())
    compare.main()
    assert capsys.readouterr().out.count("nothing can be measured at grown cost: MemoryError: too large") == 2
    assert asked == [("bench", "own-held-out"), ("bench", "own-spec")]
    assert (tmp_path / "compare-0.md").exists()

    monkeypatch.setattr(costs, "grown", lambda given, target, there, begin: {"target": target} | there)
    compare.main()
    assert asked[2:] == [("bench", f"{cost}-{data}") for data in ("held-out", "spec") for cost in ("own", "grown")]


def test_a_process_that_goes_on_forgets_its_own_failures_before_others_read_them(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    monkeypatch.setattr(commands, "rehearse", lambda *_: None)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "methods").mkdir()
    records = [tmp_path / "methods" / f"{name}.json" for name in ("medusa", "eagle", "recurrent", "recurrent-text")]
    files = [tmp_path / "own.json", tmp_path / "grown.json", *records]
    left = []

    def target(*args):
        left.append({file.stem for file in files if file.exists()})
        raise SystemExit

    monkeypatch.setattr(compare.stages, "target", target)
    words = f"compare --data {corpus.folder} --output {tmp_path} --methods medusa eagle recurrent recurrent-text --part"
    for part in ("1/2", "0/2"):
        for file in files:
            file.write_text(json.dumps({"steps": 1} if file.stem == "recurrent-text" else {"failed": "no time"}))
        monkeypatch.setattr(sys, "argv", [*words.split(), part])
        with pytest.raises(SystemExit):
            compare.main()
    assert left == [{"own", "medusa", "recurrent", "recurrent-text"}, {"grown", "eagle", "recurrent-text"}]


def test_a_command_finds_the_memory_that_this_process_does_not_use(monkeypatch):
    did = []

    def run(line, **more):
        did.append(line[-1])
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("emptied"))
    monkeypatch.setattr(commands.subprocess, "run", run)
    assert commands.command(["info"], float("inf")) == 3
    assert did == ["emptied", "info"]


def test_nothing_is_trained_for_a_command_that_does_not_run(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "corpus", lambda folder: corpus)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked = []

    def command(words, until):
        asked.append(words[0])
        return 2 if words[0] == "bench" else 0

    monkeypatch.setattr(commands, "command", command)
    monkeypatch.setattr(sys, "argv", f"compare --data {corpus.folder} --output {tmp_path}".split())
    with pytest.raises(SystemExit, match=r"^redrafter bench was tried and ended with status 2: nothing is trained\.$"):
        compare.main()
    assert asked == ["bench", "bench"]
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("recipe", [compare, compare.prompts, drafters_run, demo_run])
def test_data_that_is_not_there_is_said_in_a_sentence(recipe, tmp_path, monkeypatch, capsys):
    words = f"recipe --data {tmp_path}/none --output {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        recipe.main()
    assert end.value.code == 2
    assert f"argument --data: there is no folder {tmp_path}/none\n" in capsys.readouterr().err


def test_draft_models_grow_to_the_proportions_of_published_pairs(data):
    full = shape.corpus(data)
    larger = {"hidden": 4096, "layers": 32, "heads": 64, "inner": 11008}
    before = [shape.configuration(full, "llama", *sizes) for sizes in ((384, 3), (768, 12))]
    assert costs.grown_draft("draft", larger, *before) == {"hidden": 2048, "layers": 8, "heads": 32, "inner": 5504}
    small = costs.grown_draft("draft-small", larger, shape.configuration(full, "llama", 128, 2), before[1])
    assert small["hidden"] == small["heads"] * shape.HEAD
    assert all(size <= larger[name] for name, size in small.items())
