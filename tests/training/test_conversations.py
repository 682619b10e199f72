"""Chats to training sequences: what is learned is what the model writes after its own generation prompt."""

from __future__ import annotations

import json

import pytest
import transformers

from redrafter import RedrafterError
from redrafter.data.examples import read_rows, tokenized_rows
from redrafter.training.dialogues import Dialogue
from redrafter.training.distillation import Prompt

END = "{% endfor %}{% if add_generation_prompt %}"
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>u:{{ m.content }}{% else %}<s>a:"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}" + END + "<s>a:<think>\n{% endif %}"
)
VERBATIM = "{% for m in messages %}<s>{{ m.role[0] + ':' + m.content }}</s>\n" + END + "<s>a:<think>\n{% endif %}"
QWEN = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>\n" + END + "<s>a:"
    "{% if thinking is defined and not thinking %}<think></think>{% endif %}{% endif %}"
)
NO_THINK = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}"
    "{{ m.content }}</s>" + END + "<s>a:<think>\n\n</think>\n\n{% endif %}"
)
PHI = "{% for m in messages %}<s>{{ m.role[0] + ':' + m.content }}</s>\n" + END + "<s>a:{% else %}</s>{% endif %}"
TRIM = "{% for m in messages %}<s>{{ m.role[0] + ':' }}{{ m.content | trim }}</s>\n" + END + "<s>a:{% endif %}"
NO_PROMPT = "{% for m in messages %}<s>{{ m.role[0] + ':' + m.content }}</s>{% endfor %}"
MARKED = (
    "{% for m in messages %}<s>{{ m.role[0] + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\n"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}" + END + "<s>a:{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


PLAIN = [user("hi"), assistant("yes?"), user("bye"), assistant("oh ")]
THINKING = [user("hi"), assistant("<think>\nhm</think>yes?"), user("bye"), assistant("so</think>oh")]


@pytest.fixture
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


def shown(row, tokenizer) -> str:
    """The text with what is learned in brackets."""
    text, before = "", False
    for token, learned in zip(row.input_ids, row.trained, strict=True):
        text += "[" * (learned and not before) + "]" * (before and not learned) + tokenizer.decode([token])
        before = learned
    return text + "]" * before


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (R1, THINKING, ["<s>u:hi<s>a:<think>\n[hm</think>yes?</s>]",
                        "<s>u:hi<s>a:yes?</s><s>u:bye<s>a:<think>\n[so</think>oh</s>]"]),
        (VERBATIM, THINKING, ["<s>u:hi</s>\n<s>a:<think>\n[hm</think>yes?</s>]\n"
                              "<s>u:bye</s>\n<s>a:<think>\n[so</think>oh</s>]"]),
        (QWEN, THINKING, ["<s>u:hi</s>\n<s>a:[<think>\nhm</think>yes?</s>]",
                          "<s>u:hi</s>\n<s>a:yes?</s>\n<s>u:bye</s>\n<s>a:[<think>so</think>oh</s>]\n"]),
        (NO_THINK, PLAIN[:2], ["<s>u:hi</s><s>a:<think>\n\n</think>\n\n[yes?</s>]"]),
        (PHI, PLAIN, ["<s>u:hi</s>\n<s>a:[yes?</s>]\n<s>u:bye</s>\n<s>a:[oh </s>]\n</s>"]),
        (TRIM, PLAIN, ["<s>u:hi</s>\n<s>a:[yes?</s>]\n<s>u:bye</s>\n<s>a:[oh</s>]\n"]),
        (TRIM, [user("hi"), assistant("s")], ["<s>u:hi</s>\n<s>a:[s</s>]\n"]),  # which the end token holds too
        (NO_PROMPT, PLAIN, ["<s>u:hi</s>[<s>a:yes?</s>]<s>u:bye</s>[<s>a:oh </s>]"]),
        (MARKED, PLAIN, ["<s>u:hi</s><s>a:[yes?</s>\n]<s>u:bye</s><s>a:[oh </s>\n]"]),
        (TRIM, [assistant("Hello!"), *PLAIN[:2]], ["<s>a:Hello!</s>\n<s>u:hi</s>\n<s>a:[yes?</s>]\n"]),
        (TRIM, PLAIN[:3], ["<s>u:hi</s>\n<s>a:[yes?</s>]\n<s>u:bye</s>\n"]),
        (TRIM, [user("hi"), assistant("no", weight=0), user("a"), assistant("b", weight=1)],
         ["<s>u:hi</s>\n<s>a:no</s>\n<s>u:a</s>\n<s>a:[b</s>]\n"]),
        (MARKED, [user("hi"), assistant("no", train=False), user("a"), assistant("b", train=True)],
         ["<s>u:hi</s><s>a:no</s>\n<s>u:a</s><s>a:[b</s>\n]"]),
    ],
)  # fmt: skip
def test_the_text_after_the_generation_prompt_is_learned(tokenizer, template, messages, expected):
    tokenizer.chat_template = template
    rows = tokenized_rows({"messages": messages}, tokenizer, "here")
    assert [shown(row, tokenizer) for row in rows] == expected


@pytest.mark.parametrize("template", [R1, VERBATIM, QWEN, PHI, TRIM, MARKED])
def test_a_chat_is_split_where_distill_splits_it(tokenizer, template):
    tokenizer.chat_template = template
    dialogue = Dialogue(Prompt(0, "here", {"turns": ["hi", "bye", "so"]}, ""), 0.0, 0)
    for text in ("hm</think>yes?", "so</think>oh", "x</think>end"):
        assert dialogue.next_turn(tokenizer, None)
        opened = "" if template in (R1, VERBATIM) else "<think>"
        dialogue.add_answer(tokenizer(f"{opened}{text}</s>").input_ids, "eos", tokenizer, None)
    distilled = dialogue.training_rows()
    messages = distilled[-1]["messages"]
    rows = tokenized_rows({"messages": messages}, tokenizer, "here")
    assert len(rows) == len(distilled) == (3 if template in (R1, VERBATIM, QWEN) else 1)
    for row, other in zip(rows, distilled, strict=True):
        size = len(other["input_ids"])  # `distill` ends with the last end token
        assert row.input_ids[:size] == other["input_ids"]
        assert tokenizer.decode(row.input_ids[size:]).strip("\n") in ("", "</s>")
        if template is not MARKED:  # which learns the line break too
            assert row.trained == [bool(mask) for mask in other["loss_mask"]] + [False] * (len(row.trained) - size)


def test_template_variables_change_the_generation_prompt(tokenizer):
    tokenizer.chat_template = QWEN
    (row,) = tokenized_rows({"messages": PLAIN[:2]}, tokenizer, "here", template_kwargs={"thinking": False})
    assert shown(row, tokenizer) == "<s>u:hi</s>\n<s>a:<think></think>[yes?</s>]\n"
    assert len(tokenized_rows({"messages": PLAIN}, tokenizer, "here")) == 2


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (R1, PLAIN, "<think>.*no reasoning"),
        (NO_THINK, THINKING, "generation prompt ends with"),
        ("{% for m in messages %}<s>{{ m.content }}" + END + "<s>b>>{% endif %}", PLAIN, "differently"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", [
            {"role": "system", "content": "s"}, *PLAIN], "no system"),
    ],
)  # fmt: skip
def test_answers_that_do_not_continue_the_generation_prompt_raise_an_error(tokenizer, template, messages, reason):
    tokenizer.chat_template = template
    with pytest.raises(RedrafterError, match=f"^F line 2: .*{reason}"):
        tokenized_rows({"messages": messages}, tokenizer, "F line 2")


def test_a_token_that_would_join_prompt_and_answer_is_divided(tmp_path, tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:-1]
    tokens = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters, ":a"])}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[(":", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    joining = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    joining.chat_template = tokenizer.chat_template
    (row,) = tokenized_rows({"messages": [user("b"), assistant("a")]}, joining, "here")
    prompt = joining.apply_chat_template([user("b")], add_generation_prompt=True)["input_ids"]
    assert row.input_ids == [*prompt, tokens["a"], 2]
    assert row.trained == [False] * len(prompt) + [True, True]


def test_ids_outside_the_models_vocabulary_raise_an_error(tmp_path, tokenizer):
    data = tmp_path / "d.jsonl"
    size = len(tokenizer)
    data.write_text(json.dumps({"input_ids": [1, size + 3, 5], "loss_mask": [0, 1, 1]}) + "\n")
    (row,) = read_rows([data], tokenizer, vocab_size=size + 5)
    assert row.input_ids == [1, size + 3, 5]
    data.write_text('{"text": "' + "z" * 5 + '"}\n')
    with pytest.raises(RedrafterError, match=r"line 1: .* outside the model's vocabulary of 50"):
        read_rows([data], tokenizer, vocab_size=50)
    data.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert len(read_rows([data], tokenizer, limit=1)) == 1
