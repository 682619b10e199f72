"""`model.generate` returns the same sequences with `custom_generate` as without."""

from __future__ import annotations

import functools
import shutil
import threading

import pytest
import torch
import transformers
from transformers import LogitsProcessor, StopStringCriteria, TextStreamer

import redrafter
from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.heads.recurrent import RecurrentDrafter as Drafter
from redrafter.proposers import loading

MODEL = tiny_model()
MODEL.generation_config.pad_token_id = 0
IDS = torch.tensor([[0, 0, 5, 9, 12], [0, 7, 8, 7, 8], [30, 31, 32, 33, 34]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def head(**shape) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, beam_width=4, beam_length=3, **shape)


class Seven(LogitsProcessor):
    """Makes the eighth token of a text seven."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 7:
            scores[:, 7] += 100
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_length": 14},
        {"max_new_tokens": 12, "eos_token_id": [9, 12]},
        {"max_new_tokens": 12, "no_repeat_ngram_size": 1, "min_new_tokens": 4, "eos_token_id": 9},
        {"max_new_tokens": 12, "bad_words_ids": [[9], [12, 3]], "suppress_tokens": [20, 21]},
        {"max_new_tokens": 9, "forced_eos_token_id": 5},
    ],
)
def test_the_sequences_are_those_of_transformers(options):
    expected = MODEL.generate(**INPUTS, do_sample=False, **options)
    ours = MODEL.generate(
        **INPUTS, do_sample=False, custom_generate=redrafter.custom_generate, drafter=head(), **options
    )
    assert ours.tolist() == expected.tolist()
    assert ours.dtype == expected.dtype


def test_a_drafter_given_by_name_is_loaded_once_per_model(model_folder, drafter_folder, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    load, loaded = loading.load_drafter, []
    monkeypatch.setattr(loading, "load_drafter", lambda *options: loaded.append(load(*options)) or loaded[-1])
    options = {"inputs": torch.tensor([[5, 9, 12]]), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours = {"custom_generate": redrafter.custom_generate, "drafter": drafter_folder}
    for kind in (torch.float32, torch.float32, torch.float64):
        assert model.to(kind).generate(**options, **ours).equal(model.generate(**options))
    assert [one.dtype for one in loaded] == [torch.float32, torch.float64]


def test_a_users_processor_stop_string_and_allowed_tokens_reach_the_rows(model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    drafter = RecurrentDrafter.for_target(model)
    ids = {"input_ids": torch.tensor([[5, 9, 12], [40, 41, 42]])}
    common = {**ids, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 2}
    written = tokenizer.decode(model.generate(**common)[0, 3:])
    for options in (
        {"logits_processor": [Seven()]},
        {"stopping_criteria": [StopStringCriteria(tokenizer, [written[7:9]])]},
        {"prefix_allowed_tokens_fn": lambda row, text: [10 + row, 20 + row, 3 + len(text) % 5]},
    ):
        expected = model.generate(**common, **options).tolist()
        ours = model.generate(**common, **options, custom_generate=redrafter.custom_generate, drafter=drafter)
        assert ours.tolist() == expected
        assert expected != model.generate(**common).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1, "logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(5.0)]},
        {"suppress_tokens": [3], "logits_processor": [transformers.SuppressTokensLogitsProcessor([9, 34])]},
        {"stopping_criteria": [transformers.MaxLengthCriteria(7)]},
        {"stopping_criteria": [transformers.MaxLengthCriteria(2)]},
        {"stopping_criteria": [transformers.EosTokenCriteria([12, 19])], "eos_token_id": 3},
    ],
)
def test_a_users_object_replaces_that_of_transformers(options):
    """An object that transformers would also create from the settings."""
    common = {"input_ids": torch.tensor([[5, 9, 12]]), "do_sample": False, "max_new_tokens": 12}
    expected = MODEL.generate(**common, **options).tolist()
    assert (
        MODEL.generate(**common, **options, custom_generate=redrafter.custom_generate, drafter=head()).tolist()
        == expected
    )
    without = {
        name: value for name, value in options.items() if not isinstance(value, list) or name == "suppress_tokens"
    }
    assert expected != MODEL.generate(**common, **without).tolist()


def test_none_turns_off_settings_of_the_models_config():
    model = tiny_model()
    end = model.generate(torch.tensor([[5, 9, 12]]), do_sample=False, max_new_tokens=1)[0, -1]
    for name, value in {"eos_token_id": int(end), "repetition_penalty": 3.0, "forced_eos_token_id": 7}.items():
        setattr(model.generation_config, name, value)
    common = {"inputs": torch.tensor([[5, 9, 12]]), "do_sample": False, "max_new_tokens": 9}
    ours = {"custom_generate": redrafter.custom_generate, "drafter": head()}
    for names in ((), ("eos_token_id",), ("eos_token_id", "repetition_penalty", "forced_eos_token_id")):
        off = dict.fromkeys(names)
        assert model.generate(**common, **off, **ours).tolist() == model.generate(**common, **off).tolist()


def test_min_new_tokens_does_not_count_padding():
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 2}
    plain = MODEL.generate(**INPUTS, do_sample=False, max_new_tokens=12)[0, 5:].tolist()
    end = next(token for i, token in enumerate(plain) if i >= 2 and token not in plain[:i])
    ours = MODEL.generate(
        **INPUTS, **options, eos_token_id=end, custom_generate=redrafter.custom_generate, drafter=head()
    )
    assert ours.tolist() == MODEL.generate(**INPUTS, **options, eos_token_id=end).tolist()
    assert ours[0].tolist()[5:].index(end) == plain.index(end) < 5


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_padding_is_not_penalised(penalty):
    """Some versions of transformers penalise padding; here a row is independent of the batch."""
    options = {"max_new_tokens": 12, "repetition_penalty": penalty, "do_sample": False}
    ours = MODEL.generate(**INPUTS, custom_generate=redrafter.custom_generate, drafter=head(), **options)
    for row, mask in enumerate(INPUTS["attention_mask"].bool()):
        row_ids = IDS[row][mask][None]
        expected = MODEL.generate(input_ids=row_ids, attention_mask=torch.ones_like(row_ids), **options)
        assert ours[row, 5:].tolist() == expected[0, row_ids.shape[1] :].tolist()


def test_sampling_uses_the_seed_and_the_models_defaults():
    options = {**INPUTS, "do_sample": True, "top_p": 0.9, "max_new_tokens": 12, "drafter": head(), "seed": 3}
    ours = MODEL.generate(**options, custom_generate=redrafter.custom_generate)
    plain = MODEL.generate(**options, custom_generate=redrafter.custom_generate, beam_length=0)
    assert ours.tolist() == plain.tolist()
    out = redrafter.generate(MODEL, None, **INPUTS, do_sample=True, top_p=0.9, top_k=50, max_new_tokens=12, seed=3)
    assert ours[:, 5:].tolist() == out.new_tokens
    three = MODEL.generate(**options, custom_generate=redrafter.custom_generate, num_return_sequences=3)
    assert three.shape == (9, 17)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.5, "min_new_tokens": 6, "eos_token_id": [9, 34]},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
        {"watermarking_config": transformers.WatermarkingConfig()},
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_processors_of_transformers_are_not_mistaken_for_the_users(options, count):
    """Processors that transformers prepared for the batch."""
    sampled = {**INPUTS, **options, "do_sample": True, "seed": 3, "max_new_tokens": 10, "num_return_sequences": count}
    ours = MODEL.generate(**sampled, custom_generate=redrafter.custom_generate, drafter=head())
    expected = redrafter.generate(MODEL, None, **sampled, top_k=50).new_tokens
    assert [row[: len(new)] for row, new in zip(ours[:, 5:].tolist(), expected, strict=True)] == expected


def test_the_output_can_contain_scores():
    options = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True} | {
        "output_scores": True,
        "output_logits": True,
    }
    expected = MODEL.generate(**INPUTS, **options)
    ours = MODEL.generate(**INPUTS, **options, custom_generate=redrafter.custom_generate, drafter=head())
    assert ours.sequences.tolist() == expected.sequences.tolist()
    for one, other in ((ours.scores, expected.scores), (ours.logits, expected.logits)):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-4, atol=1e-3)


def test_a_text_streamer_prints_the_text(model_folder, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    drafter = RecurrentDrafter.for_target(model)
    ids = tokenizer("ab", return_tensors="pt")
    common = {**ids, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    model.generate(**common, streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    model.generate(
        **common, custom_generate=redrafter.custom_generate, drafter=drafter, text_streamer=TextStreamer(tokenizer)
    )
    assert capsys.readouterr().out == expected
    assert len(expected) > 20


def test_transformers_needs_only_a_saved_drafter(model_folder, drafter_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    loads = []
    load = Drafter.from_pretrained.__func__
    monkeypatch.setattr(Drafter, "from_pretrained", classmethod(lambda *a, **k: loads.append(a) or load(*a, **k)))
    ids = torch.tensor([[5, 9, 12]])
    common = {"input_ids": ids, "attention_mask": ids * 0 + 1, "do_sample": False, "max_new_tokens": 9}
    expected = model.generate(**common, pad_token_id=0)
    for _ in range(2):
        ours = model.generate(**common, custom_generate=str(drafter_folder), trust_remote_code=True)
        assert ours.tolist() == expected.tolist()
    assert len(loads) == 1, "the drafter decoded, and was read once"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"drafter": None}, "needs a drafter"),
        ({"num_beams": 3}, "num_beams=3 is not supported"),
        ({"position_ids": torch.arange(1, 6)[None].expand(3, 5)}, "position_ids other than the usual ones"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"drafter": "no/such/folder"}, "There is no drafter folder at no/such/folder"),
        ({"drafter": head(), "seed": 3}, "seed .* greedy"),
    ],
)
def test_unsupported_arguments_raise_an_error(options, sentence):
    arguments = INPUTS | {"drafter": head(), "max_new_tokens": 3} | options
    with pytest.raises(RedrafterError, match=sentence):
        MODEL.generate(**arguments, custom_generate=redrafter.custom_generate)


@pytest.fixture(params=["callable", "folder"])
def setup(request, model_folder, drafter_folder, monkeypatch, tmp_path):
    """A model, its tokenizer, and the arguments for decoding with a drafter."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    drafting = {"custom_generate": str(drafter_folder), "trust_remote_code": True}
    if request.param == "callable":
        drafting = {"custom_generate": redrafter.custom_generate, "drafter": drafter_folder}
    return model, tokenizer, drafting


PADDED = {"input_ids": torch.tensor([[0, 5, 9, 12], [40, 41, 42, 43]]), "do_sample": False, "max_new_tokens": 20}
PADDED |= {"eos_token_id": 2, "pad_token_id": 0}


def ascii_letters(text: str) -> list[str]:
    """The characters of a text that are one token each."""
    return [one for one in text if one.isascii() and one.isprintable() and one != " "]


def test_stop_strings_end_rows_as_in_transformers(setup):
    model, tokenizer, drafting = setup
    letters = ascii_letters(tokenizer.decode(model.generate(**PADDED)[0, 6:]))
    for strings in (letters[0], [letters[1], "never"]):
        options = {**PADDED, "stop_strings": strings, "tokenizer": tokenizer}
        expected = model.generate(**options)
        assert not expected.equal(model.generate(**PADDED)), "otherwise the test cannot fail"
        assert model.generate(**options, **drafting).equal(expected)
    model.generation_config.stop_strings = [letters[0]]
    assert model.generate(**PADDED, tokenizer=tokenizer, **drafting).equal(
        model.generate(**PADDED, tokenizer=tokenizer)
    )


def test_stop_strings_reach_a_drafter_through_partial_and_through_a_pipeline(model_folder, drafter_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    letter = ascii_letters(tokenizer.decode(model.generate(**PADDED)[0, 6:]))[0]
    options = {**PADDED, "stop_strings": letter, "tokenizer": tokenizer}
    bound = functools.partial(redrafter.custom_generate, drafter=str(drafter_folder))
    assert model.generate(**options, custom_generate=bound).equal(model.generate(**options))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    sampling = {"do_sample": False, "max_new_tokens": 20}
    text = pipe("Once", **sampling)[0]["generated_text"]
    sampling["stop_sequence"] = ascii_letters(text[6:])[0]
    expected = pipe("Once", **sampling)
    assert len(expected[0]["generated_text"]) < len(text)
    assert pipe("Once", **sampling, custom_generate=redrafter.custom_generate, drafter=str(drafter_folder)) == expected


class Listener(transformers.generation.streamers.BaseStreamer):
    """Records its input."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_streamer_receives_the_same_as_from_transformers(setup, rows):
    model, _, drafting = setup
    options = {**PADDED, "input_ids": PADDED["input_ids"][-rows:], "eos_token_id": [40, 200, 99]}
    theirs, ours = Listener(), Listener()
    expected = model.generate(**options, streamer=theirs)
    assert model.generate(**options, streamer=ours, **drafting).equal(expected)
    assert ours.heard == theirs.heard


def test_a_reader_in_another_thread_gets_the_text_and_an_end(setup):
    model, tokenizer, drafting = setup
    options = {**PADDED, "input_ids": PADDED["input_ids"][1:]}
    expected = tokenizer.decode(model.generate(**options)[0, 4:])
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**options, **drafting, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_a_reader_does_not_wait_after_an_error(setup):
    model, tokenizer, drafting = setup

    class Broken(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ArithmeticError

    options = {**PADDED, "input_ids": PADDED["input_ids"][1:]}
    faults = (({"output_attentions": True}, RedrafterError), ({"logits_processor": [Broken()]}, ArithmeticError))
    for more, error in faults:
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        with pytest.raises(error):
            model.generate(**options, **drafting, **more, streamer=streamer)
        assert "".join(streamer) == ""


def test_a_text_streamer_rejects_a_batch_as_in_transformers(setup):
    model, tokenizer, drafting = setup
    for streamer in (TextStreamer(tokenizer), transformers.TextIteratorStreamer(tokenizer)):
        for own in ({}, drafting):
            with pytest.raises(ValueError, match="only supports batch size 1"):
                model.generate(**PADDED, streamer=streamer, **own)


def test_none_turns_off_settings_of_the_models_config_with_a_folder_too(setup):
    model, _, drafting = setup
    model.generation_config.repetition_penalty = 3.0
    options = {**PADDED, "repetition_penalty": None}
    assert model.generate(**options, **drafting).equal(model.generate(**options))
    assert not model.generate(**options).equal(model.generate(**PADDED))


def test_padding_without_a_mask_is_detected_as_in_transformers(setup):
    model, _, drafting = setup
    expected = model.generate(**PADDED)
    assert model.generate(**PADDED, **drafting).equal(expected)
    mask = torch.ones_like(PADDED["input_ids"])  # a prompt may hold the padding token
    assert model.generate(**PADDED, attention_mask=mask, **drafting).equal(
        model.generate(**PADDED, attention_mask=mask)
    )
    assert not model.generate(**PADDED, attention_mask=mask).equal(expected)


def test_criteria_receive_scores_as_in_transformers(setup):
    model, _, drafting = setup
    seen = []

    class Noted(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(None if scores is None else [one.shape for one in scores])
            return torch.tensor([False])

    for requested in ({}, {"output_scores": True}, {"output_scores": True, "return_dict_in_generate": True}):
        options = {**PADDED, "input_ids": PADDED["input_ids"][1:], "stopping_criteria": [Noted()], **requested}
        model.generate(**options)
        expected = seen.copy()
        seen.clear()
        model.generate(**options, **drafting)
        assert seen == expected
        seen.clear()


@pytest.mark.parametrize(
    "name", ["assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask", "labels"]
)
def test_arguments_that_transformers_does_not_pass_on_raise_an_error(setup, name):
    model, _, drafting = setup
    value = {"assistant_model": model, "synced_gpus": True}.get(name, PADDED["input_ids"])
    with pytest.raises(RedrafterError, match=f"{name} is not supported"):
        model.generate(**PADDED, **{name: value}, **drafting)


def test_caches_and_embeddings_of_the_caller_raise_an_error(setup):
    model, _, drafting = setup
    with pytest.raises(RedrafterError, match="past_key_values, is not supported"):
        model.generate(**PADDED, past_key_values=transformers.DynamicCache(), **drafting)
    options = {**PADDED, "inputs_embeds": model.get_input_embeddings()(PADDED["input_ids"])}
    with pytest.raises(RedrafterError, match="inputs_embeds is not supported"):
        model.generate(**options, **drafting)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_adapters_per_row_raise_an_error_and_leave_the_model_unchanged():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config, adapter_name="own").eval()
    drafting = {"custom_generate": redrafter.custom_generate, "drafter": "prompt-lookup"}
    with pytest.raises(RedrafterError, match="adapter_names is not supported: call set_adapter"):
        model.generate(**PADDED, adapter_names=["own", "__base__"], **drafting)
    assert model.generate(**PADDED, **drafting).equal(model.generate(**PADDED))


def test_a_drafter_is_read_again_when_its_folder_changes(model_folder, drafter_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    folder = shutil.copytree(drafter_folder, tmp_path / "drafter")
    first = loading.cached_drafter(folder, model)
    assert loading.cached_drafter(str(folder), model) is first
    RecurrentDrafter.for_target(model, beam_length=2, beam_width=2).save_pretrained(folder)
    assert loading.cached_drafter(folder, model).config.beam_length == 2
