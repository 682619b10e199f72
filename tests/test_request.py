"""What a call asks for, and what is refused before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from conftest import tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, generate, stream
from redrafter.core.shapes import DraftShape
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.settings import plain
from redrafter.decoding.state import GREEDY, Sampling
from redrafter.engine.request import NEW_TOKENS, request

MODEL = tiny_model()


@pytest.mark.parametrize(
    ("prompts", "given", "sentence"),
    [
        ([], {}, "There is no prompt"),
        ([[5], []], {}, "prompt of row 1 is empty"),
        ([[5, 61]], {}, "outside the vocabulary of 61"),
        ([[5, -1]], {}, "outside the vocabulary of 61"),
        ([[5] * 129], {}, "row 0 has 129 tokens, the model's context 128"),
        ([[5]], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens. must be greater than 0, but is 0"),
        ([[5]], {"beam_length": -1}, "0 to decode without drafting, not -1"),
        ([[5]], {"beam_length": 4, "node_budget": 4}, "must hold the root and 4 drafted tokens, not be 4"),
        ([[5]], {"beam_width": 0}, "beam_width must be at least 1, not 0"),
        ([[5]], {"beam_width": 62}, "between 1 and the drafter's 61 tokens, not 62"),
        (torch.tensor([5, 6]), {}, "two dimensions"),
        (torch.tensor([[5.0, 6.0]]), {}, "must be integers, not float32"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.ones(1, 3)}, "has shape \\(1, 3\\)"),
        (torch.tensor([[5, 6, 7]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, "has holes"),
        ([[5]], {"attention_mask": torch.ones(1, 1)}, "not with a list of rows"),
        (torch.tensor([[True]]), {}, "must be integers, not bool"),
        (torch.zeros(2, 0).long(), {"attention_mask": torch.zeros(2, 0)}, "prompt of row 0 is empty"),
        ([[5]], {"logprobs": 62}, "logprobs must lie between 0 and the vocabulary's 61 tokens, not 62"),
        ([[5]], {"logprobs": -1}, "logprobs must lie between 0"),
        ([[5]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ([[5]], {"do_sample": True, "temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ([[5]], {"bad_words_ids": [[3], [4, 61]]}, "bad_words_ids names token 61, outside the vocabulary of 61"),
        ([[5]], {"sequence_bias": {(3, 99): 1.0}}, "sequence_bias names token 99, outside"),
        ([[5]], {"forced_eos_token_id": -1}, "forced_eos_token_id names token -1, outside"),
        ([[5]], {"exponential_decay_length_penalty": (3, 1.1)}, "transformers refuses a setting"),
        ([[5]], {"stop_strings": 3}, "must be a string that is not empty"),
    ],
)
def test_bad_input_gets_a_sentence_before_the_first_event(prompts, given, sentence):
    drafter = RecurrentDrafter.for_target(MODEL)
    with pytest.raises(RedrafterError, match=sentence):
        generate(MODEL, drafter, prompts, **given)
    mask = given.pop("attention_mask", None)
    with pytest.raises(RedrafterError, match=sentence):
        stream(MODEL, drafter, prompts, mask, **given)


OF_OTHER_TYPES = (
    ([5, 6], {}, "Row 0 of input_ids must hold integers, not be 5"),
    ([[5], [5.0]], {}, r"Row 1 of input_ids must hold integers, not be \[5.0\]"),
    (["a text"], {}, "Row 0 of input_ids must hold integers, not be 'a text'"),
    ("a text", {}, "rows of token ids, not a str"),
    ({"input_ids": [[5]]}, {}, "rows of token ids, not a dict"),
    (None, {}, "rows of token ids, not None"),
    (torch.tensor([[5]]), {"attention_mask": [[1]]}, "attention mask must be a tensor, not list"),
    ([[5]], {"batch_size": 1.5}, "batch_size must be a whole number, not 1.5"),
    ([[5]], {"beam_width": "3"}, "beam_width must be a whole number, not '3'"),
    ([[5]], {"node_budget": 7.5}, "node_budget must be a whole number, not 7.5"),
    ([[5]], {"logprobs": 1.5}, "logprobs must be a whole number, not 1.5"),
    ([[5]], {"logit_bias": [5]}, r"logit_bias must map token ids to numbers, not be \[5\]"),
    ([[5]], {"logit_bias": {"a": 1.0}}, "logit_bias must map token ids"),
    ([[5]], {"logit_bias": {5: "a"}}, "logit_bias of token 5 must be a number, not 'a'"),
    ([[5]], {"logit_bias": {61: 1.0}}, "logit_bias names token 61, outside the vocabulary of 61"),
    ([[5]], {"logit_bias": {-1: 1.0}}, "logit_bias names token -1, outside the vocabulary of 61"),
    ([[5]], {"presence_penalty": "a"}, "presence_penalty must be a number, not 'a'"),
    ([[5]], {"do_sample": True, "seed": 1.5}, "[Ss]eed.* not 1.5"),
    ([[5]], {"do_sample": True, "seed": ["a"]}, r"[Ss]eed.* not \['a'\]"),
    ([[5]], {"eos_token_id": "a"}, "eos_token_id must be a token id, or several, not 'a'"),
    ([[5]], {"eos_token_id": [[3]]}, r"eos_token_id must be a token id, or several, not \[\[3\]\]"),
    ([[5]], {"generation_config": {"top_k": 3}}, "must be a GenerationConfig, not a dict"),
    ([[5]], {"logits_processor": transformers.TopKLogitsWarper(3)}, "logits_processor must be a list of callables"),
    ([[5]], {"stopping_criteria": [3]}, r"stopping_criteria must be a list of callables, not \[3\]"),
    ([[5]], {"drafter": "no/such/folder"}, "There is no drafter folder at no/such/folder"),
    ([[5]], {"drafter": 3}, "int is not a supported drafter: pass a loaded drafter, its folder or hub id"),
    ([[5]], {"drafter": MODEL}, "LlamaForCausalLM is not a supported drafter: .*TwoModel\\(model\\)"),
)


@pytest.mark.parametrize(("prompts", "given", "sentence"), OF_OTHER_TYPES)
def test_what_is_of_another_type_gets_a_sentence_too(prompts, given, sentence, unchecked):
    drafter = given.get("drafter", PromptLookup())
    with pytest.raises(RedrafterError, match=sentence):
        generate(MODEL, drafter, prompts, **{name: value for name, value in given.items() if name != "drafter"})


def test_whole_numbers_may_come_from_other_libraries(unchecked):
    new = generate(MODEL, None, [[5]], max_new_tokens=5).new_tokens
    end = torch.tensor(new[0][1])
    for told in (end, end.numpy()[()], end[None], [end]):
        assert generate(MODEL, None, torch.tensor([[5]]), max_new_tokens=5, eos_token_id=told).new_tokens == [
            new[0][:2]
        ]
    assert generate(MODEL, None, [torch.tensor([5])], max_new_tokens=5).new_tokens == new
    sampled = {"do_sample": True, "max_new_tokens": 5}
    expected = generate(MODEL, None, [[5]], seed=7, **sampled).new_tokens
    assert generate(MODEL, None, [[5]], seed=torch.tensor(7), **sampled).new_tokens == expected


def test_new_tokens_at_least_go_before_a_least_length():
    """As in transformers, which makes the latter of the former."""
    ids = torch.tensor([[5, 9, 12]])
    end = generate(MODEL, None, ids, max_new_tokens=5).new_tokens[0][4]
    told = {"max_new_tokens": 12, "min_new_tokens": 2, "min_length": 12, "eos_token_id": end}
    expected = MODEL.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, pad_token_id=0, **told)
    assert generate(MODEL, None, ids, **told).new_tokens == [expected[0, 3:].tolist()]


def test_a_criterion_may_answer_with_a_bool():
    class Six(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **told):
            return ids.shape[1] >= 6

    out = generate(MODEL, None, [[5, 9, 12]], max_new_tokens=9, stopping_criteria=[Six()])
    assert (len(out.new_tokens[0]), out.finish_reasons) == (3, ["stop"])


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported: beam search by the target"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported: contrastive search"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not supported: classifier-free guidance"),
        ({"dola_layers": "low"}, "dola_layers='low' is not supported"),
        ({"prompt_lookup_num_tokens": 5}, "transformers' own drafting"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"force_words_ids": [[5]]}, "is not supported"),
        ({"temprature": 0.5}, "temprature is not a generation setting; did you mean temperature?"),
        ({"inputs_embeds": torch.zeros(1)}, "inputs_embeds is not a generation setting"),
        ({"max_length": 1}, "row 0 has 1 tokens, max_length is 1"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
        ({"stop_strings": [""]}, "must be a string that is not empty"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"repetition_penalty": -1.0}, "transformers refuses a setting: .*penalty"),
        ({"no_repeat_ngram_size": 1.5}, "transformers refuses a setting"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids names token -1, outside the vocabulary of 61"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(told, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        request(MODEL, None, [[5]], **told)


def asked(told: dict | None = None, *, config: dict | None = None, own: dict | None = None, prompts=([5],)):
    model = tiny_model(max_position_embeddings=512)
    for name, value in (own or {}).items():
        setattr(model.generation_config, name, value)
    given = None if config is None else transformers.GenerationConfig(**config)
    return request(model, None, list(prompts), generation_config=given, **(told or {}))


def test_the_callers_word_goes_before_the_callers_config_before_the_models_own():
    own = {"max_new_tokens": 3, "eos_token_id": [4, 6], "pad_token_id": 9}
    assert asked().rows[0].budget == NEW_TOKENS
    assert asked(own=own).rows[0].budget == 3
    assert asked(config={"max_new_tokens": 5}, own=own).rows[0].budget == 5
    assert asked({"max_new_tokens": 7}, config={"max_new_tokens": 5}, own=own).rows[0].budget == 7
    assert asked({"max_length": 11}, config={"max_new_tokens": 5}, own=own).rows[0].budget == 10
    assert asked(config={"max_length": 11}, own=own).rows[0].budget == 10
    assert asked({"max_length": 90, "max_new_tokens": 8}).rows[0].budget == 8
    assert asked(own=own).tasks[0].ends == {4, 6}
    assert asked({"eos_token_id": ()}, own=own).tasks[0].ends == frozenset()
    assert asked({"eos_token_id": 8}, own=own).tasks[0].ends == {8}
    assert asked(own=own).pad == 9


def test_nothing_is_sampled_or_cut_off_unasked():
    assert asked().rows[0].sampling == GREEDY
    assert asked({"do_sample": True}).rows[0].sampling == Sampling(do_sample=True)  # transformers would cut at 50
    inherited = asked(own={"do_sample": True, "temperature": 0.6, "top_p": 0.9}).rows[0].sampling
    assert inherited == Sampling(do_sample=True, temperature=0.6, top_p=0.9)
    greedy = asked({"do_sample": False}, own={"do_sample": True, "temperature": 0.6})
    assert greedy.rows[0].sampling == GREEDY
    assert greedy.sampler == Sampler()


def test_what_is_no_tensor_becomes_transformers_processors():
    """Those that look at scores alone are one object for all rows, which a captured step may call."""
    told = {"do_sample": True, "top_k": 5, "typical_p": 0.5}
    one = asked(told, prompts=([5], [6])).sampler
    assert [type(each).__name__ for each in one.shared.processors] == ["TopKLogitsWarper", "TypicalLogitsWarper"]
    assert not one.synchronizes
    each = asked(told | {"no_repeat_ngram_size": 2}, prompts=([5], [6])).sampler
    assert each.synchronizes
    assert each.own.keys() == {0, 1}


def test_a_models_own_search_by_beams_is_not_passed_over():
    with pytest.raises(RedrafterError, match="num_beams=4 is not supported"):
        asked(own={"num_beams": 4})


def test_entries_of_old_configs_that_mean_nothing_are_passed_over():
    assert asked(own={"chat_format": "chatml"}).rows


def test_sequences_to_return_are_rows_of_their_own():
    rows = asked({"do_sample": True, "num_return_sequences": 3, "seed": 1}, prompts=[[5], [6]]).rows
    assert [row.prompt for row in rows] == [[5]] * 3 + [[6]] * 3
    assert len({row.seed for row in rows}) == 6


def test_no_drafting_is_a_length_of_zero():
    drafter = RecurrentDrafter.for_target(MODEL)
    assert request(MODEL, drafter, [[5]], beam_length=0).decoder.proposer is None
    assert request(MODEL, None, [[5]]).decoder.proposer is None
    out = generate(MODEL, drafter, [[5], [6]], beam_length=0, max_new_tokens=5)
    assert (out.stats.steps, out.stats.drafted, out.stats.accepted_by_position) == (10, 0, [])


def tuned() -> RecurrentDrafter:
    """A drafter tuned for batches of 2 and more, of 3 and more, and of 4 and more, where it is not to draft."""
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_width=5, beam_length=3, node_budget=8)
    shapes = (
        DraftShape(batch=2, beam_width=4, beam_length=2),
        DraftShape(batch=3, beam_width=2, beam_length=4, node_budget=6),
        DraftShape(batch=4, beam_width=1, beam_length=0),
    )
    drafter.config = drafter.config.model_copy(update={"shapes": shapes, "tuned_on": "here"})
    return drafter


@pytest.mark.parametrize(
    ("rows", "batch_size", "told", "expected"),
    [
        (1, None, {}, (5, 3, 8)),
        (2, None, {}, (4, 2, None)),
        (3, None, {}, (2, 4, 6)),
        (9, 3, {}, (2, 4, 6)),  # rows decoded together, not all of them
        (2, 9, {}, (4, 2, None)),
        (9, 1, {}, (5, 3, 8)),
        (4, None, {}, None),
        (4, None, {"beam_width": 6}, (6, 3, 8)),
        (2, None, {"beam_length": 5}, (5, 5, 8)),
        (2, None, {"node_budget": 9}, (5, 3, 9)),
        (2, None, {"beam_length": 0}, None),
    ],
)
def test_drafts_are_tuned_to_the_batch_unless_a_shape_is_given(rows, batch_size, told, expected):
    proposer = request(MODEL, tuned(), [[5]] * rows, batch_size=batch_size, **told).decoder.proposer
    found = None if proposer is None else proposer.inner.shape
    assert (found and (found.beam_width, found.beam_length, found.node_budget)) == expected


def test_a_complete_shape_replaces_the_tuned_one():
    shape = DraftShape(beam_width=6, beam_length=2, node_budget=5)
    assert request(MODEL, tuned(), [[5]] * 4, shape=shape).decoder.proposer.shape == shape
    without = DraftShape(beam_width=1, beam_length=0)
    assert request(MODEL, tuned(), [[5]], shape=without).decoder.proposer is None
    expected = generate(MODEL, None, [[5], [7]], max_new_tokens=9).new_tokens
    out = generate(MODEL, tuned(), [[5], [7]], max_new_tokens=9, shape=shape)
    assert out.new_tokens == expected
    assert len(out.stats.accepted_by_position) == 2
    assert 0 < out.stats.drafted <= 4 * out.stats.steps
    with pytest.raises(RedrafterError, match="beam_width"):
        request(MODEL, tuned(), [[5]], shape=DraftShape(beam_width=62, beam_length=2))


@pytest.mark.parametrize("part", [{"beam_width": 6}, {"beam_length": 2}, {"beam_length": 0}, {"node_budget": 5}])
def test_a_complete_shape_and_parts_of_one_are_refused(part):
    with pytest.raises(RedrafterError, match="either shape, or beam_width"):
        generate(MODEL, tuned(), [[5]], shape=DraftShape(beam_width=6, beam_length=2), **part)


@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3}])
def test_no_text_depends_on_the_tuning(law):
    untuned = tuned()
    untuned.config = untuned.config.model_copy(update={"shapes": ()})
    prompts = [[5, 9], [7], [11, 12, 13], [4], [6]]
    steps = set()
    for batch_size in (1, 2, 3, 4):
        plain = generate(MODEL, untuned, prompts, batch_size=batch_size, max_new_tokens=12, **law)
        out = generate(MODEL, tuned(), prompts, batch_size=batch_size, max_new_tokens=12, **law)
        assert out.new_tokens == plain.new_tokens
        assert (out.stats.drafted == 0) == (batch_size == 4)
        steps.add(out.stats.drafted)
    assert len(steps) > 2, "what drafts alike shows nothing"


def test_a_drafter_may_be_named(model_folder, drafter_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    told = {"max_new_tokens": 8, "do_sample": False}
    expected = generate(model, None, [[5, 6, 5, 6]], **told).new_tokens
    for name in ("prompt-lookup", drafter_folder, str(drafter_folder), str(model_folder)):
        out = generate(model, name, [[5, 6, 5, 6]], **told)
        assert out.new_tokens == expected
        assert out.stats.accepted_by_position, "it was drafted"
        events = list(stream(model, name, [[5, 6, 5, 6]], **told))
        assert [token for event in events for token in event.tokens] == expected[0]


def padded(**config):
    """A model with a padding token, and a batch that is padded with it."""
    model = tiny_model()
    model.generation_config.update(pad_token_id=0, **config)
    return model, torch.tensor([[0, 0, 5, 9, 12], [0, 7, 8, 7, 8], [30, 31, 32, 33, 34]])


@pytest.mark.parametrize("end", [None, 2, [2, 50], [2, 0]])
@pytest.mark.parametrize("kind", ["tensor", "int32", "numpy"])
def test_padding_without_a_mask_is_found_as_in_transformers(end, kind, unchecked):
    """By the padding token, unless it is an end token too."""
    model, ids = padded(eos_token_id=end)
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)[:, 5:].tolist()
    given = {"tensor": ids, "int32": ids.int(), "numpy": ids.numpy()}[kind]
    new = generate(model, "prompt-lookup", given, max_new_tokens=8).new_tokens
    assert [row + [0] * (len(expected[0]) - len(row)) for row in new] == expected
    as_text = generate(model, None, ids, torch.ones_like(ids), max_new_tokens=8).new_tokens
    assert (as_text == new) == (end == [2, 0])


def test_padding_that_cannot_be_told_from_text_is_refused():
    model, ids = padded()
    for bad in (torch.tensor([[5, 0, 6]]), torch.tensor([[0, 0], [5, 6]])):
        with pytest.raises(RedrafterError, match=r"holds the padding token 0 .* pass attention_mask"):
            generate(model, None, bad, max_new_tokens=2)
    for rows in (ids.tolist(), ids.flip(1).tolist()):
        for call in (generate, stream):
            with pytest.raises(RedrafterError, match="Row 0 of input_ids looks padded with token 0"):
                call(model, None, rows, max_new_tokens=2)
    # texts that all begin with the token, and texts of several lengths, are not padded
    assert generate(model, None, [[0, 5], [0, 6]], max_new_tokens=2).new_tokens
    assert generate(model, None, [[0, 5], [6]], max_new_tokens=2).new_tokens


def test_rows_that_end_are_filled_as_in_transformers():
    """With an end token where there is no padding token."""
    model = tiny_model()
    model.generation_config.pad_token_id = None
    ids = torch.tensor([[5, 9, 12], [30, 31, 32]])
    first = generate(model, None, ids, max_new_tokens=2).new_tokens[0][1]
    told = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": [first, 60]}
    expected = model.generate(ids, attention_mask=ids * 0 + 1, **told)
    assert generate(model, None, ids, **told).sequences.tolist() == expected.tolist()


NUMBERS = {
    "temperature": np.float32(0.7),
    "top_k": np.int32(9),
    "top_p": torch.tensor(0.9),
    "do_sample": np.bool_(True),
    "seed": np.int64(7),
    "max_new_tokens": np.int64(6),
    "batch_size": np.int64(2),
    "eos_token_id": np.array([3, 4]),
    "suppress_tokens": np.array([8, 9]),
    "bad_words_ids": [[np.int64(5)]],
    "sequence_bias": {(np.int64(6),): np.float32(-3.0)},
    "presence_penalty": np.float64(0.5),
}


def test_numbers_may_be_those_of_numpy_and_torch(unchecked):
    python = plain(NUMBERS)
    assert not any(isinstance(value, np.generic | np.ndarray | torch.Tensor) for value in python.values())
    expected = generate(MODEL, None, [[5, 9], [7, 7]], **python).new_tokens
    ids = np.array([[5, 9], [7, 7]])
    assert generate(MODEL, PromptLookup(), ids, ids * 0 + 1, **NUMBERS).new_tokens == expected
    assert generate(MODEL, None, list(ids), **NUMBERS).new_tokens == expected
    config = {name: NUMBERS[name] for name in ("temperature", "top_k", "do_sample", "max_new_tokens")}
    given = transformers.GenerationConfig(**config)
    expected = generate(MODEL, None, ids, **plain(config), seed=[3, 4]).new_tokens
    assert generate(MODEL, None, ids, generation_config=given, seed=np.array([3, 4])).new_tokens == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("watermarking_config", {"greenlist_ratio": 0.25, "bias": 9.0}),
        ("sequence_bias", {(20,): -9.0, (9, 12): -9.0}),
        ("compile_config", {"dynamic": True}),
        ("cache_config", {"x": 1}),
    ],
)
def test_settings_may_be_dictionaries(name, value):
    ids = torch.tensor([[5, 9, 12]])
    told = {"max_new_tokens": 9, "do_sample": False}
    theirs = {name: value} if name in ("watermarking_config", "sequence_bias") else {}
    expected = MODEL.generate(ids, attention_mask=ids * 0 + 1, pad_token_id=0, **told, **theirs)[0, 3:].tolist()
    assert generate(MODEL, None, ids, **told, **{name: value}).new_tokens == [expected]


def test_wrappers_of_torch_compile_are_removed(unchecked):
    model = tiny_model()
    told = {"max_new_tokens": 6, "do_sample": False}
    expected = generate(model, None, [[5, 9, 12]], **told).new_tokens
    compiled = torch.compile(model, backend="eager")
    for drafter in (None, "prompt-lookup", torch.compile(RecurrentDrafter.for_target(model), backend="eager")):
        assert generate(compiled, drafter, [[5, 9, 12]], **told).new_tokens == expected


@pytest.mark.parametrize(
    "name",
    [
        *("assistant_model", "inputs_embeds", "position_ids", "token_type_ids", "past_key_values", "synced_gpus"),
        *("negative_prompt_ids", "custom_generate", "trust_remote_code", "use_model_defaults", "inputs"),
    ],
)
def test_other_arguments_of_transformers_are_refused_by_name(name):
    for call in (generate, stream):
        with pytest.raises(RedrafterError, match=f"{name} is not a generation setting"):
            call(MODEL, None, [[5]], **{name: 1})


def test_what_is_no_tokenizer_is_refused(unchecked):
    with pytest.raises(RedrafterError, match="tokenizer must be a tokenizer of transformers, not 'tiny'"):
        generate(MODEL, None, [[5]], tokenizer="tiny")
