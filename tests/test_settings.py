"""Every setting of transformers is applied as transformers applies it, or rejected, or does not change the text.

`python tests/test_settings.py` writes the tables of `docs/settings.md`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.decoding.settings import FIELDS, SAMPLING

MODEL = tiny_model()
PROMPTS = [[5, 9, 12], [7], [30, 31, 30, 31, 30]]
ENDS = {"eos_token_id": [2, 11]}


def transformers_text(prompt: list[int], **arguments) -> list[int]:
    """What transformers adds to one prompt."""
    ids = torch.tensor([prompt])
    arguments = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 14} | arguments
    if "max_length" in arguments:
        del arguments["max_new_tokens"]
    return MODEL.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()


def drafter(**shape) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, beam_width=4, beam_length=3, **shape)


def test_the_table_contains_every_field_of_the_installed_transformers():
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} == set(FIELDS)


PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
SECTIONS = {
    "supported": "Applied by transformers' own processors and criteria, in its order.",
    "rejected": "Raise an error that names the setting, unless it holds a value without effect.",
    "ignored": "Accepted without effect: they do not change the text here.",
}


def page() -> str:
    """`docs/settings.md`: its prose as it is, then a table for each status."""
    parts = [PAGE.read_text().partition("## Supported")[0].rstrip() + "\n"]
    for status, explanation in SECTIONS.items():
        rows = "".join(f"| `{name}` | {field.note} |\n" for name, field in FIELDS.items() if field.status == status)
        parts.append(f"## {status.capitalize()}\n\n{explanation}\n\n| setting | |\n|---|---|\n{rows}")
    return "\n".join(parts)


def test_the_docs_list_every_setting():
    assert PAGE.read_text() == page()


PLAIN = [transformers_text(prompt, **ENDS) for prompt in PROMPTS]
FREQUENT = max(range(61), key=[token for text in PLAIN for token in text].count)
GREEDY = {
    "max_length": 9,
    "max_new_tokens": 6,
    "min_length": 15,
    "min_new_tokens": 12,
    "eos_token_id": FREQUENT,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 0.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[FREQUENT], PLAIN[0][:2]],
    "sequence_bias": [[[FREQUENT], -30.0], [PLAIN[0][:2], -40.0]],
    "forced_bos_token_id": 33,
    "forced_eos_token_id": 5,
    "suppress_tokens": [FREQUENT],
    "begin_suppress_tokens": [text[0] for text in PLAIN],
    "exponential_decay_length_penalty": (2, 1.9),
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0},
}
CHANGE_NOTHING_GREEDY = {"renormalize_logits": True, "remove_invalid_values": True}
ELSEWHERE = {"do_sample", "num_return_sequences", "pad_token_id", "max_time", "stop_strings", *SAMPLING} | {
    "output_scores",
    "output_logits",
}  # tested below, in test_sampling.py and in test_request.py


def test_every_supported_field_is_tested():
    supported = {name for name, field in FIELDS.items() if field.status == "supported"}
    assert supported == set(GREEDY) | set(CHANGE_NOTHING_GREEDY) | ELSEWHERE


@pytest.mark.parametrize("name", [*GREEDY, *CHANGE_NOTHING_GREEDY])
def test_a_supported_setting_does_what_it_does_in_transformers(name):
    value = (GREEDY | CHANGE_NOTHING_GREEDY)[name]
    arguments = {name: value}
    if name == "watermarking_config":
        from transformers import WatermarkingConfig

        arguments = {name: WatermarkingConfig(**value)}
    prompts = [p for p in PROMPTS if len(p) == 1] if name == "forced_bos_token_id" else PROMPTS
    expected = [transformers_text(prompt, **(ENDS | arguments)) for prompt in prompts]
    limit = {} if name == "max_length" else {"max_new_tokens": 14}
    for head in (None, drafter()):
        assert generate(MODEL, head, prompts, **(limit | ENDS | arguments)).new_tokens == expected
    changed = expected != [PLAIN[PROMPTS.index(prompt)] for prompt in prompts]
    assert changed == (name in GREEDY), "otherwise the test cannot fail"


# without exponential_decay_length_penalty, which makes NaN of a forbidden end token, also in transformers
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3, 2.0]),
        "no_repeat_ngram_size": st.integers(0, 3),
        "min_new_tokens": st.integers(0, 10),
        "suppress_tokens": st.lists(st.integers(3, 60), min_size=1, max_size=20),
        "bad_words_ids": st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=2), min_size=1, max_size=9),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "encoder_repetition_penalty": st.sampled_from([0.8, 1.4]),
        "forced_eos_token_id": st.just(5),
        "begin_suppress_tokens": st.lists(st.integers(3, 60), min_size=1, max_size=20),
    },
)
SAMPLING_SETTINGS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"do_sample": st.just(True), "seed": st.integers(0, 2**40)},
        optional={
            "temperature": st.floats(0.3, 2),
            "top_k": st.integers(1, 61),
            "top_p": st.floats(0.1, 1),
            "min_p": st.floats(0, 0.5),
            "typical_p": st.floats(0.2, 1),
            "epsilon_cutoff": st.floats(0, 0.1),
            "eta_cutoff": st.floats(0, 0.1),
        },
    ),
)


@settings(max_examples=30)
@given(
    VALUES, SAMPLING_SETTINGS, st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_under_any_settings_drafted_text_is_undrafted_text(
    arguments, sampling, prompts, width, length, batch_size, seed
):
    arguments = {"max_new_tokens": 10, **ENDS, **arguments, **sampling}
    if "forced_eos_token_id" in arguments:  # what is forced must not be forbidden too
        for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
            arguments.pop(name, None)
    torch.manual_seed(seed)
    head = RecurrentDrafter.for_target(MODEL)
    plain = generate(MODEL, None, prompts, output_scores=True, output_logits=True, **arguments)
    drafted = generate(
        MODEL, head, prompts, beam_width=width, beam_length=length, batch_size=batch_size,
        output_scores=True, output_logits=True, **arguments,
    )  # fmt: skip
    assert drafted.new_tokens == plain.new_tokens
    assert drafted.finish_reasons == plain.finish_reasons
    for ours, theirs in ((drafted.scores, plain.scores), (drafted.logits, plain.logits)):
        for one, other, new in zip(ours, theirs, plain.new_tokens, strict=True):
            assert one.shape == (len(new), 61)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    if not sampling and "presence_penalty" not in arguments and "frequency_penalty" not in arguments:
        assert plain.new_tokens == [transformers_text(p, **arguments) for p in prompts]


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_a_bias_of_tokens_is_that_of_transformers(more):
    """Also beside processors that see the text."""
    bias = {FREQUENT: -30.0, PLAIN[0][1]: -2.5, 40: 6.0}
    theirs = {"sequence_bias": [[[token], value] for token, value in bias.items()]}
    expected = [transformers_text(prompt, **ENDS, **theirs, **more) for prompt in PROMPTS]
    for head in (None, drafter()):
        found = generate(MODEL, head, PROMPTS, max_new_tokens=14, **ENDS, logit_bias=bias, **more)
        assert found.new_tokens == expected
    assert expected != [transformers_text(prompt, **ENDS, **more) for prompt in PROMPTS]


def test_top_h_samples_the_same_with_a_drafter():
    arguments = {"do_sample": True, "top_h": 0.4, "seed": 3, "max_new_tokens": 12}
    plain = generate(MODEL, None, PROMPTS, **arguments).new_tokens
    assert generate(MODEL, drafter(), PROMPTS, **arguments).new_tokens == plain
    assert plain != generate(MODEL, None, PROMPTS, **(arguments | {"top_h": None})).new_tokens


class Forbid(LogitsProcessor):
    """Forbids the token two positions before, if the text is long enough; records its input."""

    def __init__(self):
        self.shown: list[list[int]] = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        assert scores.dtype == torch.float32
        self.shown.append(input_ids[0].tolist())
        if input_ids.shape[1] > 2:
            scores[:, input_ids[0, -2]] = -float("inf")
        return scores


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 4, "temperature": 0.7}])
def test_a_users_processor_sees_every_text_once_and_in_order(sampling):
    arguments = {"max_new_tokens": 9, **sampling}
    theirs, ours, drafts = Forbid(), Forbid(), Forbid()
    if not sampling:
        expected = [transformers_text(p, max_new_tokens=9, logits_processor=[theirs]) for p in PROMPTS]
        assert generate(MODEL, None, PROMPTS, logits_processor=[ours], **arguments).new_tokens == expected
        assert sorted(theirs.shown) == sorted(ours.shown)
    plain = generate(MODEL, None, PROMPTS, logits_processor=[Forbid()], **arguments).new_tokens
    assert generate(MODEL, drafter(), PROMPTS, logits_processor=[drafts], **arguments).new_tokens == plain
    for prompt, new in zip(PROMPTS, plain, strict=True):
        own = [text for text in drafts.shown if text[: len(prompt)] == prompt]
        assert own[: len(new)] == [prompt + new[:count] for count in range(len(new))]


def test_allowed_tokens_are_requested_by_row():
    def allowed(row: int, text: torch.Tensor) -> list[int]:
        return [10 + row, 20 + row, 3 + len(text) % 5]

    expected = [
        transformers_text(p, prefix_allowed_tokens_fn=lambda _, t, r=r: allowed(r, t)) for r, p in enumerate(PROMPTS)
    ]
    for head in (None, drafter()):
        out = generate(MODEL, head, PROMPTS, max_new_tokens=14, prefix_allowed_tokens_fn=allowed)
        assert out.new_tokens == expected


class StopAfter(StoppingCriteria):
    """Finishes a text whose last two tokens add up to an even number, from `least` tokens on."""

    def __init__(self, least: int):
        self.least = least

    def __call__(self, input_ids, scores, **kwargs):
        stop = input_ids.shape[1] >= self.least and int(input_ids[0, -2:].sum()) % 2 == 0
        return torch.tensor([stop])


@pytest.mark.parametrize("least", [2, 6, 9, 13])
def test_a_users_criterion_ends_a_row_inside_a_draft(least):
    expected = [transformers_text(p, stopping_criteria=[StopAfter(least)]) for p in PROMPTS]
    for head in (None, drafter()):
        out = generate(MODEL, head, PROMPTS, max_new_tokens=14, stopping_criteria=[StopAfter(least)])
        assert out.new_tokens == expected
        assert out.finish_reasons == [
            "stop" if len(new) < 14 else reason for new, reason in zip(expected, out.finish_reasons, strict=True)
        ]
    assert any(len(new) < 14 for new in expected)


def test_time_runs_out():
    out = generate(MODEL, drafter(), [[5]] * 3, max_new_tokens=100, max_time=1e-9, batch_size=2)
    assert [len(new) for new in out.new_tokens] == [1, 1, 1]
    assert out.finish_reasons == ["stop"] * 3


def test_scores_and_logits_are_those_of_transformers():
    arguments = {"max_new_tokens": 8, "repetition_penalty": 1.5, "output_scores": True, "output_logits": True}
    for head in (None, drafter()):
        out = generate(MODEL, head, PROMPTS, **arguments)
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            theirs = MODEL.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, **arguments,
            )  # fmt: skip
            torch.testing.assert_close(out.scores[row], torch.cat(theirs.scores), rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(out.logits[row], torch.cat(theirs.logits), rtol=1e-4, atol=1e-3)
    assert generate(MODEL, None, PROMPTS, max_new_tokens=3).scores is None


def test_invalid_values_are_removed_on_request():
    model = tiny_model()
    handle = model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([4]), float("nan")))
    try:
        with pytest.raises(RedrafterError, match="hold NaN"):
            generate(model, None, [[5]], max_new_tokens=3)
        arguments = {"max_new_tokens": 3, "remove_invalid_values": True}
        ids = torch.tensor([[5]])
        expected = model.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, pad_token_id=0, **arguments)[
            0, 1:
        ].tolist()
        assert generate(model, None, [[5]], **arguments).new_tokens == [expected]
    finally:
        handle.remove()


def test_ignored_settings_do_not_change_greedy_text():
    ignored = {"use_cache": False, "length_penalty": 2.0, "cache_implementation": "static", "prefill_chunk_size": 3}
    assert generate(MODEL, None, PROMPTS, max_new_tokens=5, **ignored).new_tokens == [
        greedy(MODEL, p, 5) for p in PROMPTS
    ]


@pytest.mark.parametrize("head", [None, drafter()])
def test_settings_that_forbid_every_token_raise_an_error(head):
    words = {"bad_words_ids": [[token] for token in range(61)]}
    with pytest.raises(RedrafterError, match="The settings leave no token to choose at row 0, position 3"):
        generate(MODEL, head, [[5, 9, 12]], max_new_tokens=3, **words)
    with pytest.raises(RedrafterError, match=r"transformers refuses a setting: .*forced_eos_token_id"):
        generate(MODEL, head, [[5]], max_new_tokens=3, suppress_tokens=[5], forced_eos_token_id=5)


if __name__ == "__main__":
    PAGE.write_text(page())
