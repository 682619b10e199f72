"""Tool calls: found in the text of each form, required by grammars, refused by name."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redrafter import RedrafterError
from redrafter.server.structured import make_processor
from redrafter.server.tools import ParsedMessage, ToolCall, tool_parser

CHAT = "{% for message in messages %}{{ message.role + ': ' + (message.content or '') }}"
CALLS = "{% for call in message.tool_calls or [] %}{% set function = call.function %}"
MARKED = "{% set calls = message.tool_calls or [] %}{% if calls %}"
OBJECT = """{{ '{"name": "' + function.name + '", "KEY": ' + (function.arguments | tojson) + '}' }}"""
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} answer in <tool_call></tool_call> with name and arguments{% endif %}"
    + CHAT
    + CALLS
    + "{{ '<tool_call>\n' }}"
    + OBJECT.replace("KEY", "arguments")
    + "{{ '\n</tool_call>' }}{% endfor %}{% endfor %}",
    "llama": "{% if tools %}Environment: ipython {{ tools | tojson }}{% endif %}"
    + CHAT
    + CALLS
    + OBJECT.replace("KEY", "parameters")
    + "{% endfor %}{% endfor %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + CHAT
    + MARKED
    + "{{ '[TOOL_CALLS]' + (calls | map(attribute='function') | list | tojson) }}{% endif %}{% endfor %}",
    "mistral-args": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + CHAT
    + CALLS
    + "{{ '[TOOL_CALLS]' + function.name + '[ARGS]' + (function.arguments | tojson) }}{% endfor %}{% endfor %}",
    "granite": "{% if tools %}{{ tools | tojson }}{% endif %}"
    + CHAT
    + MARKED
    + "{{ '<|tool_call|>' + (calls | map(attribute='function') | list | tojson) }}{% endif %}{% endfor %}",
}
SPECIAL = {
    "hermes": (),
    "llama": ("<|python_tag|>", "<|eom_id|>"),
    "mistral": ("[TOOL_CALLS]",),
    "mistral-args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "granite": ("<|tool_call|>",),
}
FORMS = list(TEMPLATES)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "day": {"$ref": "#/$defs/Day"}},
                "required": ["city", "day"],
                "additionalProperties": False,
                "$defs": {"Day": {"type": "integer", "minimum": 1, "maximum": 7}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
WEATHER = {"name": "get_weather", "arguments": {"city": "São Paulo", "note": 'a "quote", </tool_call> and ] }'}}
NOW = {"name": "now", "arguments": {}}


def tokenizer_of(template, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte tokenizer; `plain` are added tokens that are not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def parser_of(form: str):
    return tool_parser(tokenizer_of(TEMPLATES[form], SPECIAL[form]))


def written(form: str, calls: list[dict]) -> str:
    """The text of a message with calls, rendered by the form's own template."""
    tokenizer = tokenizer_of(TEMPLATES[form], SPECIAL[form])
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    return tokenizer.apply_chat_template([message], tokenize=False).removeprefix("assistant: ")


def read(message: ParsedMessage) -> list[dict]:
    return [{"name": call.name, "arguments": json.loads(call.arguments_json)} for call in message.tool_calls]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("calls", [[WEATHER], [NOW]])
def test_a_call_that_the_template_renders_is_read_back(form, calls):
    parser, text = parser_of(form), written(form, calls)
    message = parser.parse(text)
    assert read(message) == calls
    assert message.content is None
    assert parser.may_be_call(text)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "llama"])
def test_several_calls_and_content_before_them(form):
    message = parser_of(form).parse("I will look.\n\n" + written(form, [WEATHER, NOW]))
    assert read(message) == [WEATHER, NOW]
    assert message.content == "I will look."


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("llama", '<|python_tag|>{"name": "now", "parameters": {}}'),
        ("llama", '\n{"type": "function", "name": "now", "parameters": "{}"}'),
        ("hermes", '<tool_call>{"arguments": {}, "name": "now"}'),  # ended without the end marker
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "123456789"}]'),
        ("mistral-args", "[TOOL_CALLS]now[CALL_ID]123456789[ARGS] {}"),
    ],
)
def test_variants_of_a_form(form, text):
    assert parser_of(form).parse(text) == ParsedMessage(None, [ToolCall("now", "{}")])


def test_llama_separates_several_calls_by_semicolons():
    text = '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Oslo"}}'
    calls = [NOW, {"name": "get_weather", "arguments": {"city": "Oslo"}}]
    assert read(parser_of("llama").parse(text)) == calls


MALFORMED = {
    "hermes": [
        "<tool_call>now()</tool_call>",
        '<tool_call>{"name": "now", "arguments": {}',
        '<tool_call>{"name": "now", "arguments": []}</tool_call>',
        '<tool_call>{"name": "now"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}} or so</tool_call>',
        "<tool_call>" + 5000 * "[",
        "no call",
    ],
    "llama": [
        '{"name": "Ben", "age": 3}',
        '{"name": "now", "parameters": {}} is how to call it',
        '{"name": "now", "parameters": {}}; {"name": 3}',
        'An example: {"name": "now", "parameters": {}}',
        '<|python_tag|>search.call(query="x")',
    ],
    "mistral": ['[TOOL_CALLS][{"name": "now", "arguments": {}}, 3]', "[TOOL_CALLS]now", "[TOOL_CALLS][]"],
    "mistral-args": ["[TOOL_CALLS]now{}", "[TOOL_CALLS]now[ARGS]3", "[TOOL_CALLS]"],
    "granite": ['<|tool_call|>[{"name": "no w", "arguments": {}}]'],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in MALFORMED.items() for text in texts])
def test_malformed_calls_stay_content(form, text):
    assert parser_of(form).parse(text) == ParsedMessage(text, [])


def test_a_malformed_call_beside_a_complete_one_stays_content():
    bad, good = "<tool_call>now()</tool_call>", '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parser_of("hermes").parse(bad + good) == ParsedMessage(bad, [ToolCall("now", "{}")])


def test_an_empty_text_has_no_content():
    assert parser_of("hermes").parse("") == ParsedMessage(None, [])


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_holds_back_what_may_be_a_call(form):
    parser = parser_of(form)
    text = "Well. " + written(form, [WEATHER]) if form != "llama" else written(form, [WEATHER])
    begin = text.index({"hermes": "<", "llama": "{", "granite": "<"}.get(form, "["))
    assert all(parser.may_be_call(text[:end]) for end in range(begin + 1, len(text) + 1))
    assert not any(parser.may_be_call(text[:end]) for end in range(1, begin + 1))
    assert not parser.may_be_call("1 < 2 [and] {so} on")


@pytest.mark.parametrize("form", FORMS)
def test_markers_that_are_special_tokens_are_decoded(form):
    tokenizer = tokenizer_of(TEMPLATES[form], (*SPECIAL[form], "<|other|>"))
    text = written(form, [WEATHER])
    ids = tokenizer.encode(f"{text}<|other|></s>", add_special_tokens=False)
    assert tool_parser(tokenizer).decode(ids) == text


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize(
    ("form", "plain"), [*((form, ()) for form in FORMS), ("hermes", ("<tool_call>", "</tool_call>"))]
)
def test_every_text_of_a_grammar_is_a_call_of_a_tool(form, plain, choice):
    """Random walks; the tokens of most Qwen tokenizers are not special."""
    tokenizer = tokenizer_of(TEMPLATES[form], SPECIAL[form], plain)
    parser, size = tool_parser(tokenizer), len(tokenizer)
    grammar, draw = parser.grammar(TOOLS, choice), random.Random(0)
    names = []
    for _ in range(6):
        processor, text = make_processor(tokenizer, size, grammar=grammar), [5]
        while text[-1] != tokenizer.eos_token_id:
            scores = processor(torch.tensor([text]), torch.zeros(1, size))[0]
            choices = scores.isfinite().nonzero()[:, 0].tolist()
            text.append(tokenizer.eos_token_id if tokenizer.eos_token_id in choices else draw.choice(choices))
        message = parser.parse(parser.decode(text[1:]))
        assert message.content is None
        assert message.tool_calls
        for call in read(message):
            names.append(call["name"])
            if call["name"] == "get_weather":
                assert call["arguments"]["city"] in ("Rome", "Oslo")
                assert call["arguments"]["day"] in range(1, 8)
            else:
                assert call["arguments"] == {}
    assert set(names) == ({"get_weather"} if choice == NAMED else {"get_weather", "now"})


@pytest.mark.parametrize("form", [form for form in FORMS if form != "llama"])
def test_required_allows_several_calls_and_a_named_function_one(form):
    tokenizer = tokenizer_of(TEMPLATES[form], SPECIAL[form])
    parser, size = tool_parser(tokenizer), len(tokenizer)
    call = {"name": "get_weather", "arguments": {"city": "Rome", "day": 1}}
    text = written(form, [call, call]).replace("</tool_call><", "</tool_call>\n<")

    def accepted(text: str, choice) -> bool:
        processor = make_processor(tokenizer, size, grammar=parser.grammar(TOOLS, choice))
        ids = [5, *tokenizer.encode(text, add_special_tokens=False)]
        try:
            for end in (1, len(ids)):
                scores = processor(torch.tensor([ids[:end]]), torch.zeros(1, size))[0]
        except RedrafterError:
            return False
        return bool(scores[tokenizer.eos_token_id].isfinite())

    assert accepted(text, "required")
    assert not accepted(text, NAMED)
    assert not accepted(text.replace('"city":', '"city":' + 100 * " "), "required")


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_other_choices_need_no_grammar(choice):
    assert parser_of("hermes").grammar(TOOLS, choice) is None


@pytest.mark.parametrize(
    ("tools", "choice", "cause"),
    [
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "other"),
        (TOOLS, "always", "tool_choice"),
        (TOOLS, {"name": "now"}, "tool_choice"),
        ([], "required", "at least one"),
        ([{"name": "now"}], "auto", r"tools\[0\]"),
        ([TOOLS[0], {"type": "function", "function": {"name": "a b"}}], "auto", r"tools\[1\]"),
        ([{"type": "function", "function": {"name": "now", "parameters": []}}], "auto", r"tools\[0\]"),
    ],
)
def test_malformed_tools_and_choices_are_refused(tools, choice, cause):
    with pytest.raises(RedrafterError, match=cause):
        parser_of("hermes").grammar(tools, choice)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (None, "has none"),
        ({"one": TEMPLATES["hermes"], "two": TEMPLATES["llama"]}, "No chat template"),
        (CHAT + "{% endfor %}", "does not support tools"),
        (TEMPLATES["hermes"].replace("tool_call>", "call>"), "unknown form"),
        ("{{ tools }}<tool_call><function=name><parameter=arguments>", "unknown form"),  # calls in XML
    ],
)
def test_a_template_without_a_known_form_is_refused(template, cause):
    with pytest.raises(RedrafterError, match=cause):
        tool_parser(tokenizer_of(template))


def test_of_several_templates_the_one_for_tools_counts():
    templates = {"default": CHAT + "{% endfor %}", "tool_use": TEMPLATES["mistral"]}
    parser = tool_parser(tokenizer_of(templates, SPECIAL["mistral"]))
    assert read(parser.parse(written("mistral", [NOW]))) == [NOW]
