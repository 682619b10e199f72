"""Distilled rows hold what the target generates, mark what it generated, and survive interruptions."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tenacity
import torch
import transformers

from conftest import greedy
from redrafter import RedrafterError, generate
from redrafter.core.noise import row_seeds
from redrafter.data.examples import read_rows
from redrafter.data.prompts import prompt_ids
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.training import endpoint as endpoint_module
from redrafter.training.answers import ModelAnswers
from redrafter.training.continuations import continue_rows
from redrafter.training.dialogues import Dialogue, SamplingConfig, check_prompt, plan_answers
from redrafter.training.distillation import CompletedPrompt, DistillProgress, PartialPrompt, distil, read, survey
from redrafter.training.endpoint import Endpoint
from redrafter.training.endpoint_answers import EndpointAnswers
from redrafter.utils.journal import Journal

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}
RECORDS = [
    {"prompt": "Once upon", "id": "p"},
    {"turns": ["a", "and then?", "so"]},
    {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, {"role": "user", "content": "more"}, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "known"}], "id": 7},
    {"prompt": "T"},
]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def model(model_folder):
    """A model that sometimes ends its answers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model.generation_config.eos_token_id = 2
    written = [greedy(model, [1, token], 12) for token in range(60, 70)]
    common = max(range(3, 259), key=lambda token: sum(token in tokens[2:] for tokens in written))
    with torch.no_grad():
        model.lm_head.weight[[2, common]] = model.lm_head.weight[[common, 2]]
    return model


@pytest.fixture(scope="module")
def drafter(model, drafter_folder):
    return RecurrentDrafter.from_pretrained(drafter_folder, target=model)


@pytest.fixture
def sources(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return [path]


def answers(
    model, tokenizer, drafter=None, sampling=None, *, chunk=9, limit=None, skip=None, progress=None, **settings
):
    """Work that answers the prompts of RECORDS."""
    sampling = sampling or SamplingConfig(max_new_tokens=9)
    seeds, progress = sampling.seeds(len(RECORDS)), progress or DistillProgress()
    more = {"settings": settings, "progress": progress, "skip": skip}
    return ModelAnswers(model, tokenizer, drafter, sampling, seeds, chunk, limit, **more)


def answered(sources, *arguments, **options):
    return in_order(answers(*arguments, **options)(read(sources)))


def in_order(work):
    """The rows of all prompts, in the order of the prompts."""
    done = [one for one in work if isinstance(one, CompletedPrompt)]
    return [row for one in sorted(done, key=lambda one: one.prompt.number) for row in one.rows]


def prompt_of(row):
    return row["input_ids"][: row["loss_mask"].index(1)]


def chosen(row):
    return [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]


def test_answers_equal_generate(sources, model, tokenizer):
    rows = answered(sources, model, tokenizer)
    prompts = [prompt_ids(record, tokenizer, "here") for record in (RECORDS[0], RECORDS[3], RECORDS[4])]
    out = generate(model, None, prompts, max_new_tokens=9)
    for row, prompt, tokens, reason in zip(
        (rows[0], rows[3], rows[4]), prompts, out.new_tokens, out.finish_reasons, strict=True
    ):
        assert prompt_of(row) == prompt
        assert chosen(row) == tokens
        assert row["finish_reasons"] == [reason]
    text = tokenizer.decode(out.new_tokens[0], skip_special_tokens=True)
    assert (rows[0]["row"], rows[0]["id"], rows[0]["prompt"], rows[0]["text"]) == (1, "p", "Once upon", text)
    assert rows[3]["messages"][1] == {
        "role": "assistant", "content": tokenizer.decode(out.new_tokens[1], skip_special_tokens=True)
    }  # fmt: skip


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.9), (1.3, 1.3)])
def test_answers_do_not_depend_on_drafter_batch_or_chunk(sources, model, tokenizer, drafter, temperatures):
    sampling = SamplingConfig(temperatures, top_p=0.95 if temperatures[-1] else None, max_new_tokens=9)
    rows = answered(sources, model, tokenizer, sampling=sampling)
    assert len(rows) >= len(RECORDS) * len(temperatures)
    for settings in ({"batch_size": 2, "chunk": 2}, {"drafter": drafter, "batch_size": 3}):
        assert answered(sources, model, tokenizer, sampling=sampling, **settings) == rows
    if len(temperatures) > 1:
        assert chosen(rows[0]) != chosen(rows[1])


def test_sampled_answers_use_the_seeds_of_their_rows(sources, model, tokenizer):
    sampling = SamplingConfig((0.0, 0.8), top_k=50, seed=5, max_new_tokens=9)
    rows = [row for row in answered(sources, model, tokenizer, sampling=sampling) if row["temperature"] == 0.8]
    seeds = row_seeds(5, 2 * len(RECORDS))
    for number in (0, 3, 4):
        prompt = prompt_ids(RECORDS[number], tokenizer, "here")
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": [seeds[2 * number + 1]]}
        alone = generate(model, None, [prompt], max_new_tokens=9, **settings)
        row = next(row for row in rows if row["row"] == number + 1)
        assert chosen(row) == alone.new_tokens[0]


@torch.no_grad()
def is_greedy(model, row) -> bool:
    best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
    ids, mask = row["input_ids"], row["loss_mask"]
    return all(best[i - 1] == ids[i] for i in range(1, len(ids)) if mask[i])


def test_marked_tokens_are_generated_and_later_turns_follow_the_answers(sources, model, tokenizer):
    rows = answered(sources, model, tokenizer)
    assert all(is_greedy(model, row) for row in rows)
    for number in (2, 3):
        for row in (row for row in rows if row["row"] == number):
            spoken = row["messages"]
            given = [m for m in spoken if m["role"] != "assistant"]
            assert given == plan_of(number)[: len(given)]
            assert ASSISTANT not in spoken
    assert sum(len(row["finish_reasons"]) for row in rows if row["row"] == 2) == 3
    ended = [row for row in rows if "eos" in row["finish_reasons"]]
    assert ended, "otherwise no end token is tested"
    assert all(2 in chosen(row) for row in ended)


def plan_of(number):
    return [m for given in plan_answers(RECORDS[number - 1], "here").given for m in given]


def test_turns_share_a_row_if_the_template_keeps_earlier_turns(sources, model, tokenizer):
    """Even if the answer's tokens differ from those of its text: the target generated the former."""
    letters = tokenizer("yes").input_ids
    sampling = SamplingConfig((2.0,), max_new_tokens=6)
    words = {"bad_words_ids": [[i] for i in range(259) if i not in (*letters, 2)], "batch_size": 2}
    (row,) = [row for row in answered(sources, model, tokenizer, sampling=sampling, **words) if row["row"] == 2]
    assert len(row["finish_reasons"]) == 3
    assert {*chosen(row)} <= {*letters, 2}
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert text.removesuffix("</s>") == tokenizer.decode(row["input_ids"]).removesuffix("</s>")
    answers = [
        m["content"] + "</s>" * (reason == "eos")
        for m, reason in zip(row["messages"][1::2], row["finish_reasons"], strict=True)
    ]
    assert tokenizer.decode(chosen(row)) == "".join(answers)
    assert "eos" in row["finish_reasons"]


def test_an_answers_tokens_are_kept_although_its_text_has_others(tmp_path, model_folder):
    """The tokenizer has a merge that the target did not use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:-1]
    tokens = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters, "aa"])}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    merging = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    merging.chat_template = transformers.AutoTokenizer.from_pretrained(model_folder).chat_template
    prompt = next(read([_lines(tmp_path, {"turns": ["hi", "and?"]})]))
    dialogue = Dialogue(prompt, 0.0, 0)
    assert dialogue.next_turn(merging, None)
    generated = [tokens["a"]] * 2 + [2]
    dialogue.add_answer(generated, "eos", merging, None)
    assert dialogue.messages[-1]["content"] == "aa"
    assert dialogue.next_turn(merging, None)
    dialogue.add_answer([tokens["a"], 2], "eos", merging, None)
    (row,) = dialogue.training_rows()
    assert chosen(row) == [*generated, tokens["a"], 2]
    assert row["input_ids"] != merging.apply_chat_template(row["messages"])["input_ids"]
    assert merging.decode(row["input_ids"]) == merging.apply_chat_template(row["messages"], tokenize=False)


def _lines(tmp_path, *records):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_template_that_drops_earlier_turns_gets_a_row_for_each_turn(sources, model, model_folder):
    forgetful = transformers.AutoTokenizer.from_pretrained(model_folder)
    forgetful.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role[0] + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}"
        "{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
    )
    sampling = SamplingConfig((0.0, 1.0), max_new_tokens=5)
    rows = [row for row in answered(sources, model, forgetful, sampling=sampling, eos_token_id=[]) if row["row"] == 2]
    assert [len(row["messages"]) for row in rows] == [2, 4, 6] * 2
    assert all(is_greedy(model, row) for row in rows[:3])
    for row in rows:
        assert len(row["finish_reasons"]) == 1
        rendered = forgetful.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        assert prompt_of(row) == rendered
        assert 0 not in row["loss_mask"][len(rendered) :]
    own = row_seeds(row_seeds(0, 2 * len(RECORDS))[3], 3)  # seeds of the second prompt's sampled rows
    for row, seed in zip(rows[4:], own[1:], strict=True):
        settings = {"do_sample": True, "temperature": 1.0, "seed": [seed], "eos_token_id": []}
        assert chosen(row) == generate(model, None, [prompt_of(row)], max_new_tokens=5, **settings).new_tokens[0]


def test_a_conversation_ends_when_it_no_longer_fits(sources, model, tokenizer):
    complete = answered(sources, model, tokenizer)
    rows = answered(sources, model, tokenizer, limit=30)
    assert all(len(row["input_ids"]) <= 30 for row in rows)
    assert any(len(row["input_ids"]) > 30 for row in complete)
    for row in rows:
        same = next(
            one for one in complete if one["row"] == row["row"] and one["input_ids"][:5] == row["input_ids"][:5]
        )
        assert same["input_ids"][: len(row["input_ids"])] == row["input_ids"]
        assert same["loss_mask"][: len(row["input_ids"])] == row["loss_mask"]
        if len(row["input_ids"]) == 30 and row["loss_mask"][-1]:
            assert row["finish_reasons"][-1] in ("length", same["finish_reasons"][len(row["finish_reasons"]) - 1])
    skipped = []
    rows = answered(sources, model, tokenizer, limit=9, skip=skipped.append)
    assert {row["row"] for row in rows} == {2, 5}
    assert len(skipped) == 3
    assert "prompts.jsonl line 1: the prompt has 9 tokens" in skipped[0]
    with pytest.raises(RedrafterError, match="no room in 9"):
        answered(sources, model, tokenizer, limit=9)


def test_the_answers_that_a_row_requests():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "3"}

    def given(messages):
        return [len(each) for each in plan_answers({"messages": messages}, "here").given]

    assert given([USER]) == given([USER, ASSISTANT]) == [1]
    assert given([ASSISTANT, USER, ASSISTANT, USER]) == [2, 1]
    assert given([USER, call, tool, ASSISTANT, USER]) == [3, 1]
    assert plan_answers({"prompt": "x"}, "here").prompt == "x"
    assert plan_answers({"prompt": "hi", "messages": [USER, ASSISTANT]}, "here").given == [[USER]]
    assert plan_answers({"prompt": "x"}, "here", chat=True).given == [[{"role": "user", "content": "x"}]]
    assert plan_answers({"prompt": [USER], "completion": [ASSISTANT]}, "here").given == [[USER]]
    for messages, words in (([ASSISTANT], "no message"), ([USER, ASSISTANT, {"role": "user", "content": ""}], "empty")):
        with pytest.raises(RedrafterError, match=f"here: .*{words}"):
            given(messages)


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        ({"temperatures": (-1.0,)}, "temperature"),
        ({"temperatures": (0.0, 0.0)}, "once"),
        ({"top_p": 0.9}, "top_p"),
        ({"seed": 0}, "seed"),
    ],
)
def test_a_sampling_config_without_meaning_is_refused(sampling, word):
    with pytest.raises(RedrafterError, match=word):
        SamplingConfig(**sampling)


def test_a_template_that_refuses_a_later_turn_is_reported_before_any_work(tokenizer, model_folder, sources):
    strict = transformers.AutoTokenizer.from_pretrained(model_folder)
    strict.chat_template = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}x"
    prompts = list(read(sources))
    check_prompt(prompts[3], strict, None, chat=False)
    with pytest.raises(RedrafterError, match=r"line 2: .*one turn only"):
        check_prompt(prompts[1], strict, None, chat=False)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuations_equal_greedy_generation_from_every_position(tmp_path, model, tokenizer, batch_size):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one, two"}\n{"text": "a"}\n{"prompt": "q", "completion": " and so on and on"}\n')
    rows = in_order(continue_rows(read([path]), model, tokenizer, depth=3, chunk=2, batch_size=batch_size, limit=14))
    for row, own in zip(rows, read_rows([path], tokenizer, max_length=14), strict=True):
        assert row["input_ids"] == own.input_ids
        assert row["loss_mask"] == own.trained
        for position, more in enumerate(row["continuations"]):
            expected = greedy(model, row["input_ids"][: position + 1], 3)
            assert [token for token in more if token >= 0] == expected, position
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.continuations for row in read_rows([out], tokenizer)] == [row["continuations"] for row in rows]


class CopyRows:
    """Work that needs no model: the result of a row is the row."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def __call__(self, prompts):
        for prompt in prompts:
            if prompt.number == self.stop_at:
                raise RedrafterError("It broke.")
            self.seen.append(prompt.number)
            yield CompletedPrompt(prompt, [{"row": prompt.number, **prompt.record}], Counter(rows=1))


def run_saved(sources, path, work, options=None, *, overwrite=False, limit=None, **saving):
    journal = Journal(path, options or {"a": 1}, overwrite=overwrite)
    found = survey(sources, lambda prompt: None, journal, limit=limit)
    return list(distil(sources, found, journal, work, limit=limit, **saving)), journal


def test_work_resumes_where_it_failed(sources, tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    with pytest.raises(RedrafterError, match=r"It broke\. .* 3 of 5 rows"):
        run_saved(sources, path, CopyRows(stop_at=3))
    with path.open("ab") as file:
        file.write(b'{"row": 3, "half a li')
    work = CopyRows()
    steps, journal = run_saved(sources, path, work)
    assert (work.seen, steps, journal.counts["rows"]) == ([3, 4], [4, 5], 5)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert Journal(path, {"a": 1}).done == 5
    sources[0].write_text(sources[0].read_text() + '{"prompt": "added"}\n')
    work = CopyRows()
    run_saved(sources, path, work)
    assert work.seen == [5]
    work = CopyRows()
    run_saved(sources, path, work, {"a": 2}, overwrite=True, limit=2)
    assert work.seen == [0, 1]
    assert path.read_text().count("\n") == 2


class Backwards(CopyRows):
    """Completes all prompts but the first, calls `then`, and completes the first."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def __call__(self, prompts):
        first, *others = prompts
        yield from super().__call__(reversed(others))
        self.then()
        yield from super().__call__([first])


def interrupt():
    raise KeyboardInterrupt


def test_results_that_wait_for_an_earlier_one_are_saved(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_saved(sources, path, Backwards(interrupt))
    assert path.read_text() == ""
    with pytest.raises(RedrafterError, match="other options"):
        Journal(path, {"a": 2})
    again = CopyRows()
    steps, journal = run_saved(sources, path, again)
    assert again.seen == [0]
    assert (steps, journal.done, journal.ahead, journal.counts["rows"]) == ([1, 5], 5, {}, 5)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_saved_results_of_changed_rows_are_computed_again(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_saved(sources, path, Backwards(interrupt))
    lines = sources[0].read_text().splitlines(keepends=True)
    sources[0].write_text("".join([*lines[:3], '{"prompt": "another"}\n', lines[4]]))
    again = CopyRows()
    run_saved(sources, path, again)
    assert sorted(again.seen) == [0, 3, 4]
    assert json.loads(path.read_text().splitlines()[3])["prompt"] == "another"


@pytest.mark.parametrize("saving", [{"save_seconds": 0.0}, {"save_rows": 2}, {}])
def test_results_are_saved_by_time_and_by_number(sources, tmp_path, saving):
    path, on_disk = tmp_path / "out.jsonl", []

    def look():
        note = json.loads((tmp_path / "out.jsonl.state").read_text())
        on_disk.append(len(note["ahead"]))

    run_saved(sources, path, Backwards(look), **saving)
    assert on_disk == [4 if saving else 0], "two or four of them, or none within 30 s"


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.9)])
def test_every_finished_answer_of_a_conversation_is_saved(sources, model, tokenizer, tmp_path, temperatures):
    """A run that is interrupted after some answers generates only the others and writes the same rows."""
    sampling = SamplingConfig(temperatures, max_new_tokens=9)
    total = 8 * len(temperatures)

    def run(path, progress, stop=None):
        journal = Journal(path, {})
        found = survey(sources, lambda prompt: None, journal)
        work = answers(model, tokenizer, None, sampling, progress=progress, batch_size=2)
        for number, _ in enumerate(distil(sources, found, journal, work, progress=progress), start=1):
            if number == stop:
                raise KeyboardInterrupt

    run(tmp_path / "complete.jsonl", DistillProgress())
    for stop in (1, 4, total - 1):
        path = tmp_path / f"{stop}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(path, DistillProgress(), stop)
        counting = CountingProgress()
        run(path, counting)
        assert counting.answers == total - stop
        assert path.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()
        assert Journal(path, {}).counts == Journal(tmp_path / "complete.jsonl", {}).counts


class CountingProgress(DistillProgress):
    """Counts the answers that finish."""

    answers = 0

    def watch(self, events):
        for event in super().watch(events):
            self.answers += event.finish_reason is not None
            yield event


def test_the_note_of_an_older_version_is_read(sources, tmp_path):
    """It calls the options "told"."""
    path, note = tmp_path / "out.jsonl", tmp_path / "out.jsonl.state"
    with pytest.raises(RedrafterError):
        run_saved(sources, path, CopyRows(stop_at=3))
    note.write_text(note.read_text().replace('"options"', '"told"'))
    with pytest.raises(RedrafterError, match="other options"):
        Journal(path, {"a": 2})
    work = CopyRows()
    run_saved(sources, path, work)
    assert work.seen == [3, 4]
    assert "told" not in note.read_text()


def test_the_share_of_a_prompt_grows_with_its_answers(sources, model, tokenizer):
    sampling = SamplingConfig(max_new_tokens=4)
    work = answers(model, tokenizer, None, sampling)
    shares = [one.share for one in work(read(sources)) if isinstance(one, PartialPrompt) and one.prompt.number == 1]
    assert shares == pytest.approx([1 / 3, 2 / 3])


def test_a_file_of_another_run_is_refused(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    run_saved(sources, path, CopyRows(), {"temperature": 0, "gone": 1})
    before = path.read_bytes()
    with pytest.raises(RedrafterError, match=r"other options \(temperature 0, now 1; gone 1, now null\)"):
        run_saved(sources, path, CopyRows(), {"temperature": 1})
    sources[0].write_text('{"prompt": "others"}\n' * 9)
    with pytest.raises(RedrafterError, match="5 other rows"):
        run_saved(sources, path, CopyRows(), {"temperature": 0, "gone": 1})
    assert path.read_bytes() == before
    path.write_bytes(before[:-3])
    with pytest.raises(RedrafterError, match="has lost lines"):
        run_saved(sources, path, CopyRows(), {"temperature": 0, "gone": 1})
    (tmp_path / "out.jsonl.state").write_text("{}")
    with pytest.raises(RedrafterError, match="not written by this command"):
        run_saved(sources, path, CopyRows())
    (tmp_path / "out.jsonl.state").unlink()
    with pytest.raises(RedrafterError, match=r"out\.jsonl\.state"):
        run_saved(sources, path, CopyRows())
    with pytest.raises(RedrafterError, match=r"\.jsonl"):
        Journal(tmp_path / "out.jsonl.gz", {})
    with pytest.raises(RedrafterError, match="is a folder"):
        Journal(tmp_path, {})


def test_two_processes_do_not_mix_their_lines(sources, tmp_path):
    def work(prompts):
        for number, done in enumerate(CopyRows()(prompts)):
            if number == 2:
                with (tmp_path / "out.jsonl").open("a") as other:
                    other.write("{}\n")
            yield done

    with pytest.raises(RedrafterError, match="Another process"):
        run_saved(sources, tmp_path / "out.jsonl", work, save_rows=1)


@pytest.mark.parametrize("full", ["file", "note"])
def test_a_full_disk_keeps_the_saved_rows(sources, tmp_path, monkeypatch, full):
    path = tmp_path / "out.jsonl"

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(prompts):
        for number, done in enumerate(CopyRows()(prompts)):
            if number == 2:
                monkeypatch.setattr(os, "fsync" if full == "file" else "replace", no_space)
            yield done

    with pytest.raises(RedrafterError, match=r"no space is left .* 2 of 5"):
        run_saved(sources, path, work, save_rows=1)
    assert path.read_text().count("\n") == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.state", "prompts.jsonl"]
    monkeypatch.undo()
    run_saved(sources, path, CopyRows())
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_bad_rows_are_reported_before_any_work(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\nnonsense\n{"prompt": "b"}\n{"prompt": ""}\n')
    skipped, work = [], CopyRows()

    def check(prompt):
        if not prompt.record["prompt"]:
            raise RedrafterError(f"{prompt.where} is empty.")

    journal = Journal(tmp_path / "out.jsonl", {})
    with pytest.raises(RedrafterError, match="line 2 is empty"):
        survey([path], check, journal)
    assert not journal.path.exists()
    found = survey([path], check, journal, skip=skipped.append)
    list(distil([path], found, journal, work))
    assert [sentence.split("jsonl ")[1][:6] for sentence in skipped] == ["line 2", "line 3", "line 5"]
    assert work.seen == [0, 2]
    assert journal.done == found.total == 4
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(RedrafterError, match="holds no row to work on"):
        survey([path], check, Journal(tmp_path / "new.jsonl", {}), skip=skipped.append)


class Server(ThreadingHTTPServer):
    """Answers in upper case; each of `trouble` goes wrong once, first of all."""

    daemon_threads = True

    def __init__(self, *trouble):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.requests, self.keys = list(trouble), [], set()
        self.now = self.most = 0
        self.retry_after = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, body))
            server.keys.add(self.headers["Authorization"])
            server.now += 1
            server.most = max(server.most, server.now)
            trouble = server.trouble.pop(0) if server.trouble else None
        time.sleep(0.4 if trouble == "slow" else 0.02)
        with server.lock:
            server.now -= 1
        said = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        choice = {"text": said.upper()} if "prompt" in body else {"message": {"content": said.upper()}}
        choice["finish_reason"] = "length" if said == "T" else "stop"
        answer = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})
        status = 200
        if isinstance(trouble, int):
            status, answer = trouble, "a reason\nin two lines"
        elif trouble and trouble != "slow":
            answer = trouble
        if said == "refused" or len(body.get("messages", [])) > 4:
            status, answer = 400, '{"error": "too long"}'
        self.send_response(status)
        if status in server.retry_after:
            self.send_header("Retry-After", server.retry_after[status])
        self.send_header("Content-Length", str(len(answer) + (7 if trouble == "{" else 0)))
        self.end_headers()
        self.wfile.write(answer.encode())


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint_module, "PAUSE", 0.001)
    servers = []

    def start(*trouble):
        servers.append(Server(*trouble))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def hasty(server):
    """An endpoint that gives up quickly on slow answers only, however busy the machine is."""
    patient = Endpoint(f"{server.url}/v1/", "m")

    class Hasty(Endpoint):
        def post(self, path, body):
            one = replace(patient, timeout=0.05) if server.trouble[:1] == ["slow"] else patient
            return one.post(path, body)

    return Hasty(patient.url, patient.model)


def from_server(sources, server, sampling=None, *, concurrency=1, skip=None, endpoint=None):
    sampling, progress = sampling or SamplingConfig(max_new_tokens=9), DistillProgress()
    endpoint = endpoint or Endpoint(server.url, "m")
    work = EndpointAnswers(endpoint, sampling, sampling.seeds(99), concurrency, progress=progress, skip=skip)
    done = list(work(read(sources)))
    assert progress.tokens == sum(one.counts["tokens"] for one in done)
    return in_order(done)


def test_a_server_answers_turn_by_turn(sources, served, tokenizer):
    server = served()
    rows = from_server(sources, server, endpoint=Endpoint(server.url, "m", "secret"))
    assert server.keys == {"Bearer secret"}
    assert rows[0] == {
        "row": 1, "id": "p", "temperature": 0.0, "prompt": "Once upon", "completion": "ONCE UPON",
        "finish_reasons": ["stop"],
    }  # fmt: skip
    assert rows[4]["text"] == "T"
    assert [m["content"] for m in rows[1]["messages"]] == ["a", "A", "and then?", "AND THEN?"], "the third is refused"
    assert [m["content"] for m in rows[2]["messages"]] == ["s", "hi", "HI", "more", "MORE"]
    paths = [path for path, _ in server.requests]
    assert paths.count("/v1/completions") == 2
    assert paths.count("/v1/chat/completions") == 3 + 2 + 1
    assert server.requests[0][1] == {"model": "m", "prompt": "Once upon", "max_tokens": 9, "temperature": 0.0}
    sources[0].with_name("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    learnt = read_rows([sources[0].with_name("own.jsonl")], tokenizer)
    assert tokenizer.decode([i for i, t in zip(learnt[0].input_ids, learnt[0].trained, strict=True) if t]) == (
        "ONCE UPON</s>"
    )
    assert learnt[4].input_ids[-1] != 2


def test_concurrent_requests_at_every_temperature_keep_their_order(sources, served):
    sources[0].write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(20)))
    server = served("slow")
    rows = from_server(sources, server, SamplingConfig((0.0, 0.7), top_p=0.9, seed=3), concurrency=4)
    assert [(row["row"], row["temperature"]) for row in rows] == [(i, t) for i in range(1, 21) for t in (0.0, 0.7)]
    assert [row["completion"] for row in rows[::2]] == [f"ROW {i}" for i in range(20)]
    assert 2 <= server.most <= 4
    sampled = [body for _, body in server.requests if body["temperature"]]
    assert all(body["top_p"] == 0.9 for body in sampled)
    assert len({body["seed"] for body in sampled}) == 20
    assert all("seed" not in body for _, body in server.requests if not body["temperature"])


@pytest.mark.parametrize("trouble", [500, 429, "slow", "garbage", "{", '{"choices": []}', "[]", '{"choices": [null]}'])
def test_temporary_failures_are_retried(sources, served, trouble):
    sources[0].write_text('{"prompt": "a"}\n')
    server = served(trouble, trouble)
    assert [row["completion"] for row in from_server(sources, server, endpoint=hasty(server))] == ["A"]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (500, "500 Internal Server Error (a reason in two lines)."),
        ("slow", "within 0.05 s."),
        ("garbage", "not JSON."),
        ("{}", "no text."),
        ("{", "closed in the middle of an answer."),
    ],
)
def test_permanent_failures_are_one_sentence_and_finished_rows_are_saved(sources, served, tmp_path, trouble, words):
    sources[0].write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    server = served(None, *[trouble] * 6)
    work = EndpointAnswers(hasty(server), SamplingConfig(), [0, 1], 1)
    path = tmp_path / "out.jsonl"
    with pytest.raises(RedrafterError) as raised:
        run_saved(sources, path, work)
    assert "failed 6 times" in str(raised.value)
    assert words in str(raised.value)
    assert "1 of 2 rows" in str(raised.value)
    run_saved(sources, path, work)
    assert [json.loads(line)["completion"] for line in path.read_text().splitlines()] == ["A", "B"]
    assert len(server.requests) == 8


def test_a_server_chooses_the_pause_before_the_next_attempt(sources, served, monkeypatch):
    """Retry-After replaces the usual pause, up to a maximum."""
    pauses = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", pauses.append)
    sources[0].write_text('{"prompt": "a"}\n')
    server = served(429, 500, 503)
    server.retry_after = {429: "7", 503: "1000"}
    assert [row["completion"] for row in from_server(sources, server)] == ["A"]
    assert [pause for pause in pauses if pause > 0.5 or pause == 0.002] == [7.0, 0.002, 60.0]


def test_answers_that_wait_for_an_earlier_one_are_yielded_at_once(sources, served):
    sources[0].write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(6)))
    server = served("slow")
    work = EndpointAnswers(Endpoint(server.url, "m"), SamplingConfig(), list(range(6)), 6)
    numbers = [one.prompt.number for one in work(read(sources))]
    assert sorted(numbers) == list(range(6))
    assert numbers != list(range(6)) or server.most < 2, "one of them was slow"


def test_requests_that_a_server_rejects_are_not_retried(sources, served):
    for status, times in ((401, 1), (404, 1), (302, 1)):
        server = served(status)
        with pytest.raises(RedrafterError, match=f"it answers {status}"):
            from_server(sources, server)
        assert len(server.requests) >= times
    sources[0].write_text('{"prompt": "a"}\n{"prompt": "refused"}\n{"prompt": "b"}\n')
    skipped = []
    assert [row["completion"] for row in from_server(sources, served(), skip=skipped.append)] == ["A", "B"]
    assert len(skipped) == 1
    assert "line 2" in skipped[0]
    with pytest.raises(RedrafterError, match=r"line 2: .*it answers 400"):
        from_server(sources, served())
    with pytest.raises(RedrafterError, match="must be a URL"):
        Endpoint("localhost:8000", "m")
    gone = served()
    gone.server_close()
    with pytest.raises(RedrafterError, match="Connection refused"):
        from_server(sources, gone)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.8.7", "[::1]"])
def test_a_key_may_be_sent_unencrypted_to_this_machine(host):
    Endpoint(f"http://{host}:8000/v1", "m", "secret")


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "10.0.0.1",
        "localhost.example.com",
        "localhost@example.com",
        "0.0.0.0",
        "[::]",
        "127.0.0.1.a.com",
    ],
)
def test_a_key_is_not_sent_unencrypted_to_another_machine_without_permission(host):
    with pytest.raises(RedrafterError, match="unencrypted"):
        Endpoint(f"http://{host}:8000/v1", "m", "secret")
    Endpoint(f"https://{host}:8000/v1", "m", "secret")
    Endpoint(f"http://{host}:8000/v1", "m")
    Endpoint(f"http://{host}:8000/v1", "m", "secret", insecure=True)


def test_requests_to_this_machine_use_no_proxy(sources, served, monkeypatch):
    server, proxy = served(), served()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    from_server(sources, server, endpoint=Endpoint(server.url, "m", "secret"))
    assert server.keys == {"Bearer secret"}
    assert not proxy.requests


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_and_template_variables_of_a_row_are_used(tmp_path, served, model, model_folder):
    template = "{% if tools %}T{{ tools | tojson }}{% endif %}{{ style }}"
    reading = transformers.AutoTokenizer.from_pretrained(model_folder)
    reading.chat_template = template + reading.chat_template
    path = _lines(tmp_path, {"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"style": "dry"}})
    (row,) = answered([path], model, reading)
    expected = reading.apply_chat_template([USER], tools=TOOLS, style="dry", add_generation_prompt=True)["input_ids"]
    assert prompt_of(row) == expected
    assert (row["tools"], row["chat_template_kwargs"]) == (TOOLS, {"style": "dry"})
    server = served()
    (row,) = from_server([path], server)
    assert server.requests[0][1]["tools"] == row["tools"] == TOOLS
    assert server.requests[0][1]["chat_template_kwargs"] == row["chat_template_kwargs"] == {"style": "dry"}


def test_a_servers_reasoning_and_tool_calls_are_kept(tmp_path, served):
    path = _lines(tmp_path, {"messages": [USER, ASSISTANT, USER]})
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [{"content": "yes", "reasoning_content": "hm"}, {"content": None, "tool_calls": [call]}]
    answers = [json.dumps({"choices": [{"message": one, "finish_reason": "stop"}]}) for one in messages]
    (row,) = from_server([path], served(*answers))
    parsed = {**call, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert row["messages"] == [
        USER,
        {"role": "assistant", "reasoning_content": "hm", "content": "yes"},
        USER,
        {"role": "assistant", "tool_calls": [parsed]},
    ]


def test_continuations_of_a_chat_that_becomes_several_rows(tmp_path, model, model_folder):
    forgetful = transformers.AutoTokenizer.from_pretrained(model_folder)
    forgetful.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role[0] + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}"
        "{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
    )
    path = _lines(tmp_path, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, {"text": "end"})
    done = list(continue_rows(read([path]), model, forgetful, depth=2, chunk=2, batch_size=2))
    assert sorted(row["row"] for one in done for row in one.rows) == [1, 1, 2]
    assert [len(one.rows) for one in sorted(done, key=lambda one: one.prompt.number)] == [2, 1]
