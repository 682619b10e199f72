"""Rows of the target's own making: what they hold is what it writes, and what they mark is what it chose."""

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
import torch
import transformers

from conftest import greedy
from redrafter import RedrafterError, generate
from redrafter.core.noise import row_seeds
from redrafter.data.examples import read_rows
from redrafter.data.prompts import prompt_ids
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.training import endpoint as endpoint_module
from redrafter.training.answers import Dialogue, Law, by_target, check_prompt, plan
from redrafter.training.distillation import Done, Part, Tally, by_continuation, distil, read, survey
from redrafter.training.endpoint import Endpoint, by_endpoint
from redrafter.training.journal import Journal

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
    """Ends its answers now and then."""
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


def answered(sources, model, tokenizer, drafter=None, law=None, *, chunk=9, skip=None, **settings):
    law = law or Law(max_new_tokens=9)
    seeds = law.seeds(len(RECORDS))
    work = by_target(read(sources), model, tokenizer, drafter, law, seeds=seeds, chunk=chunk, skip=skip, **settings)
    return in_order(work)


def in_order(work):
    """The rows of all prompts, in the order of the prompts."""
    done = [one for one in work if isinstance(one, Done)]
    return [row for one in sorted(done, key=lambda one: one.prompt.number) for row in one.rows]


def prompt_of(row):
    return row["input_ids"][: row["loss_mask"].index(1)]


def chosen(row):
    return [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]


def test_answers_are_what_generate_writes(sources, model, tokenizer):
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
def test_nothing_depends_on_drafter_batch_or_chunk(sources, model, tokenizer, drafter, temperatures):
    law = Law(temperatures, top_p=0.95 if temperatures[-1] else None, max_new_tokens=9)
    rows = answered(sources, model, tokenizer, law=law)
    assert len(rows) >= len(RECORDS) * len(temperatures)
    for settings in ({"batch_size": 2, "chunk": 2}, {"drafter": drafter, "batch_size": 3}):
        assert answered(sources, model, tokenizer, law=law, **settings) == rows
    if len(temperatures) > 1:
        assert chosen(rows[0]) != chosen(rows[1])


def test_sampled_answers_come_of_the_rows_own_seeds(sources, model, tokenizer):
    law = Law((0.0, 0.8), top_k=50, seed=5, max_new_tokens=9)
    rows = [row for row in answered(sources, model, tokenizer, law=law) if row["temperature"] == 0.8]
    seeds = row_seeds(5, 2 * len(RECORDS))
    for number in (0, 3, 4):
        prompt = prompt_ids(RECORDS[number], tokenizer, "here")
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": [seeds[2 * number + 1]]}
        alone = generate(model, None, [prompt], max_new_tokens=9, **settings)
        row = next(row for row in rows if row["row"] == number + 1)
        assert chosen(row) == alone.new_tokens[0]


@torch.no_grad()
def is_the_models_own(model, row) -> bool:
    best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
    ids, mask = row["input_ids"], row["loss_mask"]
    return all(best[i - 1] == ids[i] for i in range(1, len(ids)) if mask[i])


def test_every_marked_token_is_the_models_own_and_turns_follow_its_answers(sources, model, tokenizer):
    rows = answered(sources, model, tokenizer)
    assert all(is_the_models_own(model, row) for row in rows)
    for number in (2, 3):
        for row in (row for row in rows if row["row"] == number):
            spoken = row["messages"]
            given = [m for m in spoken if m["role"] != "assistant"]
            assert given == plan_of(number)[: len(given)]
            assert ASSISTANT not in spoken
    assert sum(len(row["finish_reasons"]) for row in rows if row["row"] == 2) == 3
    ended = [row for row in rows if "eos" in row["finish_reasons"]]
    assert ended, "an end token that no row holds could not be marked"
    assert all(2 in chosen(row) for row in ended)


def plan_of(number):
    return [m for stretch in plan(RECORDS[number - 1], "here").stretches for m in stretch]


def test_turns_share_a_row_while_the_template_leaves_them_as_they_were(sources, model, tokenizer):
    """Even where the answer's tokens are not those that its text would have: the target chose the former."""
    letters = tokenizer("yes").input_ids
    law = Law((2.0,), max_new_tokens=6)
    words = {"bad_words_ids": [[i] for i in range(259) if i not in (*letters, 2)], "batch_size": 2}
    (row,) = [row for row in answered(sources, model, tokenizer, law=law, **words) if row["row"] == 2]
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


def test_an_answers_own_tokens_are_kept_where_its_text_has_others(tmp_path, model_folder):
    """A merge that the target did not use."""
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
    dialogue = Dialogue(prompt, Law(), 0, 0)
    assert dialogue.ask(merging, None)
    said = [tokens["a"]] * 2 + [2]
    dialogue.answer(said, "eos", merging, None)
    assert dialogue.messages[-1]["content"] == "aa"
    assert dialogue.ask(merging, None)
    dialogue.answer([tokens["a"], 2], "eos", merging, None)
    (row,) = dialogue.rows()
    assert chosen(row) == [*said, tokens["a"], 2]
    assert row["input_ids"] != merging.apply_chat_template(row["messages"])["input_ids"]
    assert merging.decode(row["input_ids"]) == merging.apply_chat_template(row["messages"], tokenize=False)


def _lines(tmp_path, *records):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_template_that_forgets_what_was_said_gets_a_row_for_each_turn(sources, model, model_folder):
    forgetful = transformers.AutoTokenizer.from_pretrained(model_folder)
    forgetful.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role[0] + ':' }}{% if m.role == 'user' or loop.last %}{{ m.content }}"
        "{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
    )
    law = Law((0.0, 1.0), max_new_tokens=5)
    rows = [row for row in answered(sources, model, forgetful, law=law, eos_token_id=[]) if row["row"] == 2]
    assert [len(row["messages"]) for row in rows] == [2, 4, 6] * 2
    assert all(is_the_models_own(model, row) for row in rows[:3])
    for row in rows:
        assert len(row["finish_reasons"]) == 1
        rendered = forgetful.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        assert prompt_of(row) == rendered
        assert 0 not in row["loss_mask"][len(rendered) :]
    own = row_seeds(row_seeds(0, 2 * len(RECORDS))[3], 3)  # of the second row's sampled texts
    for row, seed in zip(rows[4:], own[1:], strict=True):
        settings = {"do_sample": True, "temperature": 1.0, "seed": [seed], "eos_token_id": []}
        assert chosen(row) == generate(model, None, [prompt_of(row)], max_new_tokens=5, **settings).new_tokens[0]


def test_a_conversation_that_no_longer_fits_ends_there(sources, model, tokenizer):
    whole = answered(sources, model, tokenizer)
    rows = answered(sources, model, tokenizer, limit=30)
    assert all(len(row["input_ids"]) <= 30 for row in rows)
    assert any(len(row["input_ids"]) > 30 for row in whole)
    for row in rows:
        same = next(one for one in whole if one["row"] == row["row"] and one["input_ids"][:5] == row["input_ids"][:5])
        assert same["input_ids"][: len(row["input_ids"])] == row["input_ids"]
        assert same["loss_mask"][: len(row["input_ids"])] == row["loss_mask"]
        if len(row["input_ids"]) == 30 and row["loss_mask"][-1]:
            assert row["finish_reasons"][-1] in ("length", same["finish_reasons"][len(row["finish_reasons"]) - 1])
    told = []
    rows = answered(sources, model, tokenizer, limit=9, skip=told.append)
    assert {row["row"] for row in rows} == {2, 5}
    assert len(told) == 3
    assert "prompts.jsonl line 1: the prompt has 9 tokens, which leaves no room in 9" in told[0]
    with pytest.raises(RedrafterError, match="leaves no room in 9"):
        answered(sources, model, tokenizer, limit=9)


def test_what_a_row_asks_for():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "3"}

    def stretches(messages):
        return [len(stretch) for stretch in plan({"messages": messages}, "here").stretches]

    assert stretches([USER]) == stretches([USER, ASSISTANT]) == [1]
    assert stretches([ASSISTANT, USER, ASSISTANT, USER]) == [2, 1]
    assert stretches([USER, call, tool, ASSISTANT, USER]) == [3, 1]
    assert plan({"prompt": "x"}, "here").prompt == "x"
    assert plan({"prompt": "hi", "messages": [USER, ASSISTANT]}, "here").stretches == [[USER]]
    assert plan({"prompt": "x"}, "here", chat=True).stretches == [[{"role": "user", "content": "x"}]]
    assert plan({"prompt": [USER], "completion": [ASSISTANT]}, "here").stretches == [[USER]]
    for messages, sentence in (
        ([ASSISTANT], "no turn to answer"),
        ([USER, ASSISTANT, {"role": "user", "content": ""}], "the prompt is empty"),
    ):
        with pytest.raises(RedrafterError, match=f"here: .*{sentence}"):
            stretches(messages)


@pytest.mark.parametrize(
    ("law", "sentence"),
    [
        ({"temperatures": (-1.0,)}, "must be 0"),
        ({"temperatures": (0.0, 0.0)}, "give temperature 0 once"),
        ({"top_p": 0.9}, "top_p has no effect in greedy"),
        ({"seed": 0}, "seed means nothing in greedy"),
    ],
)
def test_a_law_that_means_nothing_is_refused(law, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        Law(**law)


def test_a_template_that_refuses_a_later_turn_is_heard_before_any_work(tokenizer, model_folder, sources):
    strict = transformers.AutoTokenizer.from_pretrained(model_folder)
    strict.chat_template = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}x"
    prompts = list(read(sources))
    check_prompt(prompts[3], strict, None, chat=False)
    with pytest.raises(RedrafterError, match=r"line 2: the chat template refuses the messages \(one turn only\)"):
        check_prompt(prompts[1], strict, None, chat=False)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuations_are_greedy_generation_from_every_place(tmp_path, model, tokenizer, batch_size):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one, two"}\n{"text": "a"}\n{"prompt": "q", "completion": " and so on and on"}\n')
    rows = in_order(by_continuation(read([path]), model, tokenizer, depth=3, chunk=2, batch_size=batch_size, limit=14))
    for row, own in zip(rows, read_rows([path], tokenizer, max_length=14), strict=True):
        assert row["input_ids"] == own.input_ids
        assert row["loss_mask"] == own.trained
        for place, more in enumerate(row["continuations"]):
            expected = greedy(model, row["input_ids"][: place + 1], 3)
            assert [token for token in more if token >= 0] == expected, place
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.continuations for row in read_rows([out], tokenizer)] == [row["continuations"] for row in rows]


class Worked:
    """Work that needs no model: what it makes of a row is the row."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def __call__(self, prompts):
        for prompt in prompts:
            if prompt.number == self.stop_at:
                raise RedrafterError("It broke.")
            self.seen.append(prompt.number)
            yield Done(prompt, [{"row": prompt.number, **prompt.record}], Counter(rows=1))


def kept(sources, path, work, told=None, *, overwrite=False, limit=None, **saving):
    journal = Journal(path, told or {"a": 1}, overwrite=overwrite)
    found = survey(sources, lambda prompt: None, journal, limit=limit)
    return list(distil(sources, found, journal, work, limit=limit, **saving)), journal


def test_work_goes_on_where_it_broke(sources, tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    with pytest.raises(RedrafterError, match=r"It broke\. What came of 3 of 5 rows is kept, and the same command"):
        kept(sources, path, Worked(stop_at=3))
    with path.open("ab") as file:
        file.write(b'{"row": 3, "half a li')
    work = Worked()
    steps, journal = kept(sources, path, work)
    assert (work.seen, steps, journal.counts["rows"]) == ([3, 4], [4, 5], 5)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert Journal(path, {"a": 1}).done == 5
    sources[0].write_text(sources[0].read_text() + '{"prompt": "added"}\n')
    work = Worked()
    kept(sources, path, work)
    assert work.seen == [5]
    work = Worked()
    kept(sources, path, work, {"a": 2}, overwrite=True, limit=2)
    assert work.seen == [0, 1]
    assert path.read_text().count("\n") == 2


class Backwards(Worked):
    """Finishes all prompts but the first; then something happens."""

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


def test_rows_that_wait_for_an_earlier_one_are_saved(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        kept(sources, path, Backwards(interrupt))
    assert path.read_text() == ""
    with pytest.raises(RedrafterError, match="begun with other options"):
        Journal(path, {"a": 2})
    again = Worked()
    steps, journal = kept(sources, path, again)
    assert again.seen == [0]
    assert (steps, journal.done, journal.ahead, journal.counts["rows"]) == ([1, 5], 5, {}, 5)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_saved_rows_of_a_source_that_has_changed_are_made_again(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        kept(sources, path, Backwards(interrupt))
    lines = sources[0].read_text().splitlines(keepends=True)
    sources[0].write_text("".join([*lines[:3], '{"prompt": "another"}\n', lines[4]]))
    again = Worked()
    kept(sources, path, again)
    assert sorted(again.seen) == [0, 3, 4]
    assert json.loads(path.read_text().splitlines()[3])["prompt"] == "another"


@pytest.mark.parametrize("saving", [{"save_seconds": 0.0}, {"save_rows": 2}, {}])
def test_rows_are_saved_by_time_and_by_number(sources, tmp_path, saving):
    path, on_disk = tmp_path / "out.jsonl", []

    def look():
        note = json.loads((tmp_path / "out.jsonl.state").read_text())
        on_disk.append(len(note["ahead"]))

    kept(sources, path, Backwards(look), **saving)
    assert on_disk == [4 if saving else 0], "two or four of them, or none within 30 s"


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.9)])
def test_every_finished_answer_of_a_conversation_is_saved(sources, model, tokenizer, tmp_path, temperatures):
    """Interrupted after each number of answers, the run asks for the others alone and writes the same rows."""
    law = Law(temperatures, max_new_tokens=9)
    total = 8 * len(temperatures)

    def work(tally):
        return lambda prompts: by_target(
            prompts, model, tokenizer, None, law, seeds=law.seeds(5), chunk=9, batch_size=2, tally=tally
        )

    def run(path, tally, stop=None):
        journal = Journal(path, {})
        found = survey(sources, lambda prompt: None, journal)
        for number, _ in enumerate(distil(sources, found, journal, work(tally), tally=tally), start=1):
            if number == stop:
                raise KeyboardInterrupt

    whole = Tally()
    run(tmp_path / "whole.jsonl", whole)
    for stop in (1, 4, total - 1):
        path, first, second = tmp_path / f"{stop}.jsonl", Tally(), Tally()
        with pytest.raises(KeyboardInterrupt):
            run(path, first, stop)
        answers = []

        def count(events, tally=second, answers=answers):
            for event in Tally.watch(tally, events):
                answers.append(event.finish_reason is not None)
                yield event

        second.watch = count
        run(path, second)
        assert sum(answers) == total - stop
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert Journal(path, {}).counts == Journal(tmp_path / "whole.jsonl", {}).counts


def test_a_row_advances_with_its_answers(sources, model, tokenizer):
    law = Law(max_new_tokens=4)
    work = by_target(read(sources), model, tokenizer, None, law, seeds=law.seeds(5), chunk=9)
    shares = [one.share for one in work if isinstance(one, Part) and one.prompt.number == 1]
    assert shares == pytest.approx([1 / 3, 2 / 3])


def test_a_file_of_other_work_is_refused(sources, tmp_path):
    path = tmp_path / "out.jsonl"
    kept(sources, path, Worked(), {"temperature": 0, "gone": 1})
    before = path.read_bytes()
    with pytest.raises(RedrafterError, match=r"other options \(temperature 0, now 1; gone 1, now null\)"):
        kept(sources, path, Worked(), {"temperature": 1})
    sources[0].write_text('{"prompt": "others"}\n' * 9)
    with pytest.raises(RedrafterError, match="what came of 5 other rows"):
        kept(sources, path, Worked(), {"temperature": 0, "gone": 1})
    assert path.read_bytes() == before
    path.write_bytes(before[:-3])
    with pytest.raises(RedrafterError, match="has lost lines"):
        kept(sources, path, Worked(), {"temperature": 0, "gone": 1})
    (tmp_path / "out.jsonl.state").write_text("{}")
    with pytest.raises(RedrafterError, match="is not a note of this command"):
        kept(sources, path, Worked())
    (tmp_path / "out.jsonl.state").unlink()
    with pytest.raises(RedrafterError, match=r"exists and has no out\.jsonl\.state beside it"):
        kept(sources, path, Worked())
    with pytest.raises(RedrafterError, match=r"let its name end in \.jsonl"):
        Journal(tmp_path / "out.jsonl.gz", {})
    with pytest.raises(RedrafterError, match="is a folder"):
        Journal(tmp_path, {})


def test_two_processes_do_not_mix_their_lines(sources, tmp_path):
    def work(prompts):
        for number, done in enumerate(Worked()(prompts)):
            if number == 2:
                with (tmp_path / "out.jsonl").open("a") as other:
                    other.write("{}\n")
            yield done

    with pytest.raises(RedrafterError, match="Something else writes"):
        kept(sources, tmp_path / "out.jsonl", work, save_rows=1)


@pytest.mark.parametrize("full", ["file", "note"])
def test_a_full_disk_keeps_what_is_written(sources, tmp_path, monkeypatch, full):
    path = tmp_path / "out.jsonl"

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(prompts):
        for number, done in enumerate(Worked()(prompts)):
            if number == 2:
                monkeypatch.setattr(os, "fsync" if full == "file" else "replace", no_space)
            yield done

    with pytest.raises(
        RedrafterError, match=r"cannot be written: no space is left on the device\. What came of 2 of 5"
    ):
        kept(sources, path, work, save_rows=1)
    assert path.read_text().count("\n") == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.state", "prompts.jsonl"]
    monkeypatch.undo()
    kept(sources, path, Worked())
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_bad_rows_are_told_before_any_work(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\nnonsense\n{"prompt": "b"}\n{"prompt": ""}\n')
    told, work = [], Worked()

    def check(prompt):
        if not prompt.record["prompt"]:
            raise RedrafterError(f"{prompt.where} is empty.")

    journal = Journal(tmp_path / "out.jsonl", {})
    with pytest.raises(RedrafterError, match="line 2 is empty"):
        survey([path], check, journal)
    assert not journal.path.exists()
    found = survey([path], check, journal, skip=told.append)
    list(distil([path], found, journal, work))
    assert [sentence.split("jsonl ")[1][:6] for sentence in told] == ["line 2", "line 3", "line 5"]
    assert work.seen == [0, 2]
    assert journal.done == found.total == 4
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(RedrafterError, match="holds no row to work on"):
        survey([path], check, Journal(tmp_path / "new.jsonl", {}), skip=told.append)


class Server(ThreadingHTTPServer):
    """Answers in upper case; `trouble` is what goes wrong first, each once."""

    daemon_threads = True

    def __init__(self, *trouble):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.asked, self.keys = list(trouble), [], set()
        self.now = self.most = 0
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
            server.asked.append((self.path, body))
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
    """Gives up on slow answers at once, and waits for others however busy the machine is."""
    patient = Endpoint(f"{server.url}/v1/", "m")

    class Hasty(Endpoint):
        def _post(self, path, body):
            one = replace(patient, timeout=0.2) if server.trouble[:1] == ["slow"] else patient
            return one._post(path, body)

    return Hasty(patient.url, patient.model)


def from_server(sources, server, law=None, *, concurrency=1, skip=None, endpoint=None):
    law = law or Law(max_new_tokens=9)
    endpoint = endpoint or Endpoint(server.url, "m")
    tally = Tally()
    work = by_endpoint(
        read(sources), endpoint, law, seeds=law.seeds(99), concurrency=concurrency, tally=tally, skip=skip
    )
    done = list(work)
    assert tally.tokens == sum(one.counts["tokens"] for one in done)
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
    paths = [path for path, _ in server.asked]
    assert paths.count("/v1/completions") == 2
    assert paths.count("/v1/chat/completions") == 3 + 2 + 1
    assert server.asked[0][1] == {"model": "m", "prompt": "Once upon", "max_tokens": 9, "temperature": 0.0}
    sources[0].with_name("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    learnt = read_rows([sources[0].with_name("own.jsonl")], tokenizer)
    assert tokenizer.decode([i for i, t in zip(learnt[0].input_ids, learnt[0].trained, strict=True) if t]) == (
        "ONCE UPON</s>"
    )
    assert learnt[4].input_ids[-1] != 2


def test_a_server_is_asked_at_every_temperature_several_times_at_once_and_answers_keep_their_order(sources, served):
    sources[0].write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(20)))
    server = served("slow")
    rows = from_server(sources, server, Law((0.0, 0.7), top_p=0.9, seed=3), concurrency=4)
    assert [(row["row"], row["temperature"]) for row in rows] == [(i, t) for i in range(1, 21) for t in (0.0, 0.7)]
    assert [row["completion"] for row in rows[::2]] == [f"ROW {i}" for i in range(20)]
    assert 2 <= server.most <= 4
    sampled = [body for _, body in server.asked if body["temperature"]]
    assert all(body["top_p"] == 0.9 for body in sampled)
    assert len({body["seed"] for body in sampled}) == 20
    assert all("seed" not in body for _, body in server.asked if not body["temperature"])


@pytest.mark.parametrize("trouble", [500, 429, "slow", "garbage", "{", '{"choices": []}', "[]", '{"choices": [null]}'])
def test_a_server_that_fails_now_and_then_is_asked_again(sources, served, trouble):
    sources[0].write_text('{"prompt": "a"}\n')
    server = served(trouble, trouble)
    assert [row["completion"] for row in from_server(sources, server, endpoint=hasty(server))] == ["A"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (500, "failed 6 times, the last time so: it answers 500 Internal Server Error (a reason in two lines)."),
        ("slow", "the last time so: no answer within 0.2 s."),
        ("garbage", "the last time so: its answer is not JSON."),
        ("{}", "the last time so: its answer holds no text where one belongs."),
        ("{", "the last time so: it broke off in the middle of an answer."),
    ],
)
def test_a_server_that_fails_for_good_is_said_in_a_sentence_and_rows_are_kept(
    sources, served, tmp_path, trouble, sentence
):
    sources[0].write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    server = served(None, *[trouble] * 6)
    endpoint, law = hasty(server), Law()
    path = tmp_path / "out.jsonl"

    def work(prompts):
        return by_endpoint(prompts, endpoint, law, seeds=law.seeds(2), concurrency=1)

    with pytest.raises(RedrafterError) as raised:
        kept(sources, path, work)
    assert sentence in str(raised.value)
    assert "What came of 1 of 2 rows is kept" in str(raised.value)
    kept(sources, path, work)
    assert [json.loads(line)["completion"] for line in path.read_text().splitlines()] == ["A", "B"]
    assert len(server.asked) == 8


def test_answers_that_wait_for_an_earlier_one_of_a_server_are_given_back_at_once(sources, served):
    sources[0].write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(6)))
    server, law = served("slow"), Law()
    work = by_endpoint(read(sources), Endpoint(server.url, "m"), law, seeds=law.seeds(6), concurrency=6)
    numbers = [one.prompt.number for one in work]
    assert sorted(numbers) == list(range(6))
    assert numbers != list(range(6)) or server.most < 2, "one of them was slow"


def test_what_a_server_will_never_take(sources, served):
    for status, times in ((401, 1), (404, 1), (302, 1)):
        server = served(status)
        with pytest.raises(RedrafterError, match=f"it answers {status}"):
            from_server(sources, server)
        assert len(server.asked) >= times
    sources[0].write_text('{"prompt": "a"}\n{"prompt": "refused"}\n{"prompt": "b"}\n')
    told = []
    assert [row["completion"] for row in from_server(sources, served(), skip=told.append)] == ["A", "B"]
    assert len(told) == 1
    assert "line 2" in told[0]
    with pytest.raises(RedrafterError, match=r"line 2: .*it answers 400"):
        from_server(sources, served())
    with pytest.raises(RedrafterError, match="must be a URL"):
        Endpoint("localhost:8000", "m")
    gone = served()
    gone.server_close()
    with pytest.raises(RedrafterError, match="Connection refused"):
        from_server(sources, gone)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.8.7", "[::1]"])
def test_a_key_is_sent_unencrypted_to_this_machine(host):
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
def test_a_key_is_sent_unencrypted_to_no_other_machine_unless_asked(host):
    with pytest.raises(RedrafterError, match="OPENAI_API_KEY would be sent unencrypted"):
        Endpoint(f"http://{host}:8000/v1", "m", "secret")
    Endpoint(f"https://{host}:8000/v1", "m", "secret")
    Endpoint(f"http://{host}:8000/v1", "m")
    Endpoint(f"http://{host}:8000/v1", "m", "secret", insecure=True)


def test_a_key_goes_to_no_proxy_on_its_way_to_this_machine(sources, served, monkeypatch):
    server, proxy = served(), served()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    from_server(sources, server, endpoint=Endpoint(server.url, "m", "secret"))
    assert server.keys == {"Bearer secret"}
    assert not proxy.asked


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_a_target_and_a_server_read_the_whole_row(tmp_path, served, model, model_folder):
    """Its tools and the variables of its template."""
    template = "{% if tools %}T{{ tools | tojson }}{% endif %}{{ style }}"
    reading = transformers.AutoTokenizer.from_pretrained(model_folder)
    reading.chat_template = template + reading.chat_template
    path = _lines(tmp_path, {"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"style": "dry"}})
    (row,) = answered([path], model, reading)
    whole = reading.apply_chat_template([USER], tools=TOOLS, style="dry", add_generation_prompt=True)["input_ids"]
    assert prompt_of(row) == whole
    assert (row["tools"], row["chat_template_kwargs"]) == (TOOLS, {"style": "dry"})
    server = served()
    (row,) = from_server([path], server)
    assert server.asked[0][1]["tools"] == row["tools"] == TOOLS
    assert server.asked[0][1]["chat_template_kwargs"] == row["chat_template_kwargs"] == {"style": "dry"}


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
    done = list(by_continuation(read([path]), model, forgetful, depth=2, chunk=2, batch_size=2))
    assert sorted(row["row"] for one in done for row in one.rows) == [1, 1, 2]
    assert [len(one.rows) for one in sorted(done, key=lambda one: one.prompt.number)] == [2, 1]
