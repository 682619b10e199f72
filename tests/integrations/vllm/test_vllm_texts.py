"""Texts of vLLM with the plug-in equal those without it: greedy ones, and seeded ones with and without drafts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_jobs import DRAFTER, LENGTH, MODEL, error, needs_vllm, prompts, run, speculative, tokens

import redrafter
from redrafter.cli.loading import demo_folder
from redrafter.core.shapes import DraftShape

pytestmark = needs_vllm

GREEDY = {"temperature": 0, "max_tokens": 64}
JSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
GREEDY_CASES = {
    "plain": GREEDY,
    "penalties": GREEDY | {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": GREEDY | {"logit_bias": {"100": 3.0, "200": -5.0}, "logprobs": 3},
    "bias and penalties": GREEDY | {"logit_bias": {"300": 9.0, "261": 7.0}, "repetition_penalty": 1.3},
    "long": GREEDY | {"max_tokens": 256, "ignore_eos": True},
    "context": GREEDY | {"max_tokens": 600, "ignore_eos": True},
    "stops": GREEDY | {"stop": ["the"], "min_tokens": 5},
    "bad words": GREEDY | {"bad_words": ["the", "you"]},
    "regex": GREEDY | {"structured": {"regex": "[a-z ]{5,40}\\."}},
    "json": GREEDY | {"structured": {"json": JSON}},
}


def sampled(**fields: object) -> list[dict]:
    return [{"temperature": 1.0, "max_tokens": 48, "seed": 1000 + row, **fields} for row in range(len(prompts()))]


def mixed() -> list[dict]:
    """Requests that differ in everything, every third of them greedy."""
    changes = [{"temperature": 0}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"presence_penalty": 0.5}]
    changes += [{"logit_bias": {"300": 4.0}}, {"temperature": 0, "repetition_penalty": 1.3}]
    return [one | changes[row % len(changes)] for row, one in enumerate(sampled())]


SEEDED_CASES = {
    "plain": {},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1, "temperature": 1.3},
}


def batches(params: list) -> list[dict]:
    """Batches of all prompts; of few for texts that fill the context."""
    return [
        {"prompts": prompts()[:4] if one == GREEDY_CASES["context"] else prompts(), "params": one} for one in params
    ]


def rate(metrics: dict, before: dict | None = None) -> float:
    """Tokens per step of drafted steps."""
    drafts, accepted = (
        metrics[name] - (before or {}).get(name, 0)
        for name in ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
    )
    assert drafts > 0
    return 1 + accepted / drafts


@pytest.fixture(scope="module")
def greedy():
    """Answers without and with drafts, and the counters with drafts."""
    cases = batches(list(GREEDY_CASES.values()))
    plain, _ = run(cases)
    drafted, metrics = run(cases, speculative())
    return plain, drafted, metrics


@pytest.mark.parametrize("case", GREEDY_CASES)
def test_greedy_text_is_vllms_own(greedy, case):
    plain, drafted, _ = greedy
    index = list(GREEDY_CASES).index(case)
    assert tokens(drafted[index]) == tokens(plain[index])
    assert [one["reason"] for one in drafted[index]] == [one["reason"] for one in plain[index]]


def test_log_probabilities_are_vllms_own(greedy):
    plain, drafted, _ = greedy
    index = list(GREEDY_CASES).index("bias")
    for one, other in zip(plain[index], drafted[index], strict=True):
        for expected, found in zip(one["logprobs"], other["logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


def test_acceptance_is_that_of_our_own_engine(greedy):
    """Long texts: engines differ in what they count at the ends of texts."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    drafter = redrafter.RecurrentDrafter.from_pretrained(DRAFTER, target=model)
    settings = {"shape": DraftShape(beam_width=1, beam_length=LENGTH), "max_new_tokens": 256, "eos_token_id": []}
    stats = [redrafter.generate(model, drafter, torch.tensor([ids]), **settings).stats for ids in prompts()]
    own = sum(one.tokens for one in stats) / sum(one.steps for one in stats)
    index = list(GREEDY_CASES).index("long")
    assert rate(greedy[2][index], greedy[2][index - 1]) == pytest.approx(own, rel=0.03)


@pytest.fixture(scope="module")
def seeded():
    cases = batches(
        [*(sampled(**one) for one in SEEDED_CASES.values()), mixed(), {"temperature": 1.0, "max_tokens": 8}]
    )
    idle, _ = run(cases, speculative(seeded=True, max_verified_tokens=1))
    drafted, metrics = run(cases, speculative(seeded=True))
    return idle, drafted, metrics


@pytest.mark.parametrize("case", [*SEEDED_CASES, "mixed"])
def test_seeded_text_is_the_same_with_and_without_drafts(seeded, case):
    idle, drafted, _ = seeded
    index = [*SEEDED_CASES, "mixed"].index(case)
    assert tokens(drafted[index]) == tokens(idle[index])


def test_requests_without_a_seed_differ(seeded):
    idle, _, _ = seeded
    assert len({tuple(one) for one in tokens(idle[-1])}) > 1


def test_seeded_text_is_that_of_our_own_engine(seeded):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for row in range(4):
        inputs = torch.tensor([prompts()[row]])
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": [1000 + row]}
        out = redrafter.generate(model, None, inputs, max_new_tokens=48, **settings)
        assert seeded[1][0][row]["tokens"] == out.new_tokens[0]


def test_ranking_by_the_noise_gains_tokens(seeded):
    """Without it, drafts of the most probable tokens are kept with the probability of these tokens."""
    _, metrics = run(batches([sampled()]), speculative())
    assert rate(seeded[2][0]) > 1.05 * rate(metrics[0])


def test_sampling_without_seeds_has_the_models_distribution():
    """vLLM's own sampler with our drafts: the distribution of the second token, drafted after the first."""
    ids = prompts()[0]
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.inference_mode():
        first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        expected = (model(torch.tensor([[*ids, first]])).logits[0, -1] / 1.5).softmax(-1)
    samples = 2000
    force = {"temperature": 1.5, "max_tokens": 2, "n": samples, "min_p": 0.02}
    results, _ = run([{"prompts": [ids], "params": force}], speculative(), max_num_seqs=64)
    seconds = [one[1] for one in tokens(results[0]) if len(one) == 2 and one[0] == first]
    expected = torch.where(expected < 0.02 * expected.max(), 0.0, expected)
    expected /= expected.sum()
    found = torch.bincount(torch.tensor(seconds), minlength=len(expected)) / len(seconds)
    assert found[expected == 0].sum() == 0
    noise = (expected * (1 - expected) / len(seconds)).sqrt()
    assert ((found - expected).abs() <= 5 * noise + 1e-9).all()


def test_chunked_prefill_prefix_caching_and_preemption_change_nothing():
    long = [(one * 10)[:150] for one in prompts()[:8]]
    params = [{"temperature": 0, "max_tokens": 120, "ignore_eos": True}, sampled(ignore_eos=True)[:8]]
    cases = [{"prompts": long, "params": one} for one in params]
    cases += [{"prompts": long[:2], "params": params[0]}] * 2
    options = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    options |= {"block_size": 32, "num_gpu_blocks_override": 48}
    idle, _ = run(cases, speculative(seeded=True, max_verified_tokens=1), **options)
    drafted, metrics = run(cases, speculative(seeded=True), **options)
    assert [tokens(one) for one in drafted] == [tokens(one) for one in idle]
    assert metrics[-1]["num_preemptions"] > 0
    assert drafted[-1][0]["cached"] > 0


def test_adapters_of_the_target(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    cases = batches([GREEDY])
    cases = [cases[0] | {"lora": str(tmp_path)}, cases[0]]
    plain, _ = run(cases, enable_lora=True, max_lora_rank=8)
    drafted, metrics = run(cases, speculative(), enable_lora=True, max_lora_rank=8)
    assert [tokens(one) for one in drafted] == [tokens(one) for one in plain]
    assert tokens(plain[0]) != tokens(plain[1])
    assert rate(metrics[0]) > 1


def test_tensor_parallelism():
    cases = batches([GREEDY, sampled()])
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    divided, metrics = run(cases, speculative(seeded=True), several, tensor_parallel_size=2)
    alone, _ = run(cases, speculative(seeded=True, max_verified_tokens=1))
    assert [tokens(one) for one in divided] == [tokens(one) for one in alone]
    assert rate(metrics[0]) > 1.5


def test_vllms_schedule_by_batch_size_is_followed():
    schedule = [[1, 2, 3], [3, 8, 0]]
    config = speculative(num_speculative_tokens_per_batch_size=schedule)
    cases = [{"prompts": prompts()[:8], "params": GREEDY | {"ignore_eos": True}}]
    cases += [{"prompts": prompts()[:1], "params": GREEDY | {"ignore_eos": True}}]
    _, metrics = run(cases, config)
    assert metrics[0]["spec_decode_num_draft_tokens"] == 0
    assert metrics[1]["spec_decode_num_draft_tokens"] == 3 * metrics[1]["spec_decode_num_drafts"] > 0


def test_other_methods_are_unaffected():
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    results, metrics = run(batches([GREEDY]), config)
    plain, _ = run(batches([GREEDY]))
    assert tokens(results[0]) == tokens(plain[0])
    assert metrics[0]["spec_decode_num_drafts"] > 0


@pytest.mark.parametrize(
    ("config", "options", "environment", "words"),
    [
        (speculative(model="missing-folder/x"), {}, {}, ["missing-folder/x"]),
        (speculative(model=str(demo_folder() / "medusa")), {}, {}, ["recurrent drafter"]),
        (speculative(typo=1), {}, {}, ["typo", "max_verified_tokens"]),
        (speculative(), {"model": "OTHER", "max_model_len": 128}, {}, ["redrafter-demo-12m", "vocabulary"]),
        (speculative(), {"pipeline_parallel_size": 2}, {}, ["pipeline parallelism"]),
        (speculative(), {}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, ["V1 model runner", "VLLM_USE_V2_MODEL_RUNNER"]),
    ],
    ids=["missing", "medusa", "field", "shape", "pipeline", "runner"],
)
def test_what_is_not_supported_is_refused_at_start(config, options, environment, words, tmp_path):
    if options.get("model") == "OTHER":
        options = options | {"model": str(small_model(tmp_path))}
    printed = error(config, environment, **options)
    assert all(word in printed for word in words), printed[-3000:]


def test_another_model_of_the_same_shape_is_refused(tmp_path):
    """The drafter's fingerprint is compared with the weights in memory and on disk."""
    for part in ("embed_tokens", "down_proj"):
        folder = tmp_path / part
        changed_model(folder, part)
        printed = error(speculative(), model=str(folder))
        assert "weights differ" in printed, printed[-3000:]
    results, _ = run(batches([GREEDY]), speculative(any_target=True), model=str(folder))
    assert all(tokens(results[0]))


def small_model(folder):
    from transformers import AutoTokenizer

    from conftest import tiny_model

    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    tiny_model(vocab_size=4096, hidden_size=128, num_attention_heads=4, num_key_value_heads=4).save_pretrained(folder)
    return folder


def changed_model(folder, part: str) -> None:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1.01)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
