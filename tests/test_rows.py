"""Rows of every format are rendered as by transformers, or raise an error."""

from __future__ import annotations

import json

import pytest
import transformers

from redrafter import RedrafterError
from redrafter.data.examples import tokenized_rows
from redrafter.data.messages import text_of
from redrafter.data.prompts import prompt_ids
from redrafter.data.rows import metadata, parse_row
from redrafter.training.dialogues import plan_answers

TEMPLATE = (
    "{% if tools %}<s>t:{{ tools | tojson }}</s>{% endif %}"
    "{% if documents %}<s>d:{{ documents | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role[0] + ':' }}{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{{ m.content | string }}{% endif %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</s>{% endfor %}"
    "{% if style is defined %}<s>style:{{ style }}</s>{% endif %}{% if add_generation_prompt %}<s>a:{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


@pytest.fixture
def tokenizer(model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]
CHATS = [
    ({"messages": [USER, ANSWER], "tools": TOOLS}, [USER, ANSWER], {"tools": TOOLS}),
    ({"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)}, [USER, ANSWER], {"tools": TOOLS}),
    ({"messages": [USER, ANSWER], "tools": "", "functions": []}, [USER, ANSWER], {}),
    ({"messages": [USER, ANSWER], "documents": [{"text": "x"}]}, [USER, ANSWER], {"documents": [{"text": "x"}]}),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": {"style": "dry"}}, [USER, ANSWER], {"style": "dry"}),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": '{"style": 1}'}, [USER, ANSWER], {"style": 1}),
    ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER], {}),
    ({"conversation": [USER, ANSWER]}, [USER, ANSWER], {}),
    ({"conversations": SHAREGPT, "system": "Be brief."}, [SYSTEM, USER, ANSWER], {}),
    ({"conversations": SHAREGPT, "system_prompt": "Be brief."}, [SYSTEM, USER, ANSWER], {}),
    ({"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER], {}),
    ({"messages": [USER, ANSWER], "system": "", "images": []}, [USER, ANSWER], {}),
    ({"messages": [{"role": "User", "content": "hi"}, {"role": "Assistant", "content": "yes?"}]}, [USER, ANSWER], {}),
    ({"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "yes?"}]}, [USER, ANSWER], {}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]}, [USER, ANSWER], {}),
    ({"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]}, [USER, ANSWER], {}),
    ({"prompt": "hi", "prompt_id": "x1", "messages": [USER, ANSWER]}, [USER, ANSWER], {}),
    ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER], {}),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, [USER, ANSWER], {}),
    ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, [USER, ANSWER], {}),
    ({"prompt": [USER], "chosen": [USER, ANSWER]}, [USER, ANSWER], {}),
    ({"prompt": "hi", "messages": [USER, ANSWER], "chosen": [USER, ANSWER]}, [USER, ANSWER], {}),
    ({"instruction": "hi", "input": "", "output": "yes?"}, [USER, ANSWER], {}),
    ({"instruction": "hi", "system": "Be brief.", "output": "yes?"}, [SYSTEM, USER, ANSWER], {}),
    (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}],
        {},
    ),
    ({"messages": [USER, ANSWER], "text": "yes?", "finish_reason": "eos", "score": float("nan")}, [USER, ANSWER], {}),
    (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "3 C"},
                SHAREGPT[1],
            ],
            "tools": json.dumps(TOOLS),
        },
        [USER, {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "3 C"}, ANSWER],
        {"tools": TOOLS},
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": ""},
                      ANSWER]},
        [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": ""}, ANSWER],
        {},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages", "inputs"), CHATS, ids=[str(list(row)) for row, _, _ in CHATS])
def test_every_chat_is_rendered_as_transformers_renders_it(tokenizer, row, messages, inputs):
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **inputs)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, **inputs)["input_ids"]
    assert prompt_ids(row, tokenizer, "here") == prompt
    if "style" not in inputs:  # the template writes the style after the last message
        assert tokenized_rows(row, tokenizer, "here")[0].input_ids == whole
    planned = plan_answers(row, "here")
    assert [text_of(m) for stretch in planned.given for m in stretch] == [text_of(m) for m in messages[:-1]]
    assert planned.chat.tools == inputs.get("tools")


def test_template_variables_of_a_row_override_those_of_the_command(tokenizer):
    def text(row, **variables):
        return tokenizer.decode(prompt_ids(row, tokenizer, "here", template_kwargs=variables))

    assert "style:dry" in text({"messages": [USER]}, style="dry")
    assert "style:own" in text({"messages": [USER], "chat_template_kwargs": {"style": "own"}}, style="dry")
    with pytest.raises(RedrafterError, match=r"here: chat_template_kwargs .* needs a chat"):
        text({"prompt": "hi"}, style="dry")


def test_several_text_parts_need_a_template_that_supports_them(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
    with pytest.raises(RedrafterError, match="here: a message has several text parts"):
        prompt_ids({"messages": parts}, tokenizer, "here")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% else %}"
        "{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}{% endfor %}"
    )
    assert tokenizer.decode(prompt_ids({"messages": parts}, tokenizer, "here")) == "ab"


def test_plain_text(tokenizer):
    def text(row, **options):
        return tokenizer.decode(prompt_ids(row, tokenizer, "here", **options))

    assert text({"prompt": "hi", "answer": "metadata"}) == "hi"
    assert text({"prompt": "hi", "system": "Be brief."}, chat=True) == "<s>s:Be brief.</s><s>u:hi</s><s>a:"
    for name in ("completion", "response", "chosen"):
        (row,) = tokenized_rows({"prompt": "hi", name: " you", "rejected": "no"}, tokenizer, "here")
        assert tokenizer.decode(row.input_ids) == "hi you</s>"
        assert row.trained == [False] * 2 + [True] * 5


BAD = [
    {"messages": [USER], "functions": [{"name": "f"}]},
    {"messages": [USER], "tools": "weather"},
    {"messages": [USER], "tools": [1]},
    {"messages": [USER], "chat_template_kwargs": {"tokenize": False}},
    {"messages": [USER], "chat_template_kwargs": []},
    {"messages": [USER], "images": ["a.png"]},
    {"messages": [USER], "conversations": [{"from": "human", "value": "bye"}]},
    {"messages": [USER], "turns": ["bye"]},
    {"messages": [USER, ANSWER], "prompt": "bye"},
    {"messages": [USER, ANSWER], "text": "something else"},
    {"messages": [USER, ANSWER], "completion": "no"},
    {"messages": [USER, ANSWER], "instruction": "bye"},
    {"messages": [SYSTEM, USER], "system": "Be long."},
    {"messages": [USER], "system": 3},
    {"messages": []},
    {"messages": [], "prompt": "hi"},
    {"messages": {"role": ["user"], "content": ["hi"]}},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": {"text": "hi"}}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
    {"messages": [{**USER, "from": "human"}]},
    {"messages": [USER, {**ANSWER, "weight": 0.5}]},
    {"messages": [{**USER, "train": True}, ANSWER]},
    {"conversations": [{"from": "narrator", "value": "once"}, {"from": "human", "value": "hi"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "weather(Oslo)"}]},
    {"turns": [{"role": "user"}]},
    {"turns": [3]},
    {"prompt": float("nan")},
    {"prompt": {"role": "user", "content": "hi"}},
    {"prompt": "hi", "tools": TOOLS},
    {"prompt": "hi", "system": "Be brief."},
    {"prompt": [USER], "completion": "yes?"},
    {"prompt": "hi", "completion": [ANSWER]},
    {"prompt": "hi", "completion": "a", "response": "b"},
    {"prompt": "hi", "text": "hi you"},
    {"completion": "alone"},
    {"chosen": "Human: hi Assistant: yes?"},
    {"instruction": "hi", "history": [["a", "b"]], "output": "x"},
    {"instruction": "hi", "context": "c", "response": "x"},
    {"instruction": "hi", "output": "x", "text": "Below is an instruction. hi x"},
    {"question": "hi", "answer": "yes"},
    {"dialogue": ["hi", "yes"]},
    {"prompt": "half \ud800"},
    {"messages": [{"role": "user", "content": "\udc00"}]},
    {},
]


@pytest.mark.parametrize("row", BAD, ids=[ascii(row)[:60] for row in BAD])
def test_ambiguous_rows_raise_an_error_with_their_location(tokenizer, row):
    for read in (prompt_ids, tokenized_rows, lambda row, tokenizer, where: plan_answers(row, where)):
        with pytest.raises(RedrafterError, match=r"^F line 3: .*\.$"):
            read(row, tokenizer, "F line 3")


def test_unknown_roles_are_kept(tokenizer):
    messages = [{"role": "observation", "content": "3 C"}, USER]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt_ids({"messages": messages}, tokenizer, "here") == whole


def test_turns_have_nothing_to_learn(tokenizer):
    assert tokenizer.decode(prompt_ids({"turns": ["hi", "so"]}, tokenizer, "here")) == "<s>u:hi</s><s>a:"
    with pytest.raises(RedrafterError, match=r"here: .*no answers to learn"):
        tokenized_rows({"turns": ["hi", "so"]}, tokenizer, "here")


def test_a_written_answer_replaces_text_columns_and_no_metadata():
    record = {
        "id": 1,
        "answer": "4",
        "output": "b",
        "instruction": "x",
        "system": "s",
        "input_ids": [1],
        "turns": ["x"],
    }
    assert metadata(record) == {"id": 1, "answer": "4", "turns": ["x"]}
    chat = parse_row({"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"a": 1}}, "here")
    again = parse_row(chat.columns([USER, ANSWER]), "here")
    assert (again.tools, again.template_kwargs, again.messages) == (TOOLS, {"a": 1}, [USER, ANSWER])
