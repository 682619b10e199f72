"""Every supported decoder family, with tiny random models: drafted and undrafted text equal that of transformers.

`docs/families.md` is generated from these tables: `python tests/test_families.py > docs/families.md`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from conftest import TINY, greedy
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.targets.target import Target

BASE = TINY | {"initializer_range": 0.4}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 6}  # shorter than the longest prompt below
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]} | WINDOW

WORKS = {
    "llama": ("", BASE),
    "mistral": ("sliding window", BASE | WINDOW),
    "qwen2": ("", BASE),
    "qwen3": ("", BASE),
    "qwen3_moe": ("mixture of experts", BASE | EXPERTS | HEADS),
    "phi": ("", BASE),
    "phi3": ("sliding window", BASE | WINDOW),
    "olmo": ("", BASE),
    "olmo2": ("", BASE),
    "olmo3": ("sliding and full layers", BASE | MIXED),
    "olmoe": ("mixture of experts", BASE | EXPERTS),
    "glm": ("", BASE | HEADS),
    "glm4": ("", BASE | HEADS),
    "smollm3": ("", BASE),
    "granite": ("scaled logits", BASE | {"logits_scaling": 2.0}),
    "stablelm": ("", BASE),
    "starcoder2": ("sliding window", BASE | WINDOW),
    "cohere": ("scaled logits, tied head", BASE | {"logit_scale": 0.5}),
    "cohere2": ("sliding and full layers", BASE | MIXED),
    "gemma": ("tied head", BASE | HEADS),
    "gemma2": (
        "capped logits, sliding and full layers",
        BASE | HEADS | MIXED | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": ("sliding and full layers", BASE | HEADS | MIXED),
    "mixtral": ("mixture of experts", BASE | {"num_local_experts": 4}),
    "gpt_oss": ("attention sinks, sliding and full layers", BASE | HEADS | MIXED | {"num_local_experts": 4}),
    "deepseek_v3": ("latent attention: keys and values differ in width", BASE | LATENT),
    "gpt2": ("learned positions, tied head", GPT2),
    "gpt_bigcode": ("multi-query attention", GPT2),
    "gpt_neox": ("", BASE | {"rotary_pct": 0.5}),
    "gptj": ("", GPT2 | {"rotary_dim": 4}),
    "codegen": ("", GPT2 | {"rotary_dim": 4}),
    "opt": ("learned positions", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "exaone4": ("sliding and full layers", BASE | MIXED),
    "falcon": ("rotary positions only; alibi is refused", BASE),
    "nemotron": ("", BASE),
    "persimmon": ("", BASE),
    "helium": ("", BASE | HEADS),
    "ernie4_5": ("", BASE),
    "hunyuan_v1_dense": ("", BASE | HEADS),
    "seed_oss": ("", BASE | HEADS),
}

REFUSED = {
    "falcon (alibi)": ("its forward takes no tree mask", BASE | {"alibi": True}),
    "bloom": ("takes no position_ids", BASE | {"n_layer": 2, "n_head": 4}),
    "mpt": ("takes no position_ids", BASE | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gpt_neo": (
        "states at the nodes of a tree differ",
        BASE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    "llama4_text": (
        "layers of type chunked_attention take no tree mask",
        BASE | HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "minimax": ("layers of type linear_attention take no tree mask", BASE),
    "qwen3_next": ("keeps a recurrent state", BASE),
    "mamba": ("keeps a recurrent state", BASE | {"state_size": 4}),
    "mamba2": ("keeps a recurrent state", BASE | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "jamba": ("keeps a recurrent state", BASE),
    "recurrent_gemma": ("keeps a recurrent state", BASE),
    "falcon_h1": ("keeps a recurrent state", BASE),
    "rwkv": ("keeps a recurrent state", BASE),
}

PROMPTS = [list(range(3, 20)), [5]]


def build(family: str, settings: dict, attention: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.filterwarnings("default")  # some families warn of themselves
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WORKS)
def test_drafted_text_is_undrafted_text_is_that_of_transformers(family, attention):
    try:
        model = build(family, WORKS[family][1], attention)
    except ValueError as error:
        if attention == "eager" or "does not support an attention implementation" not in str(error):
            raise
        pytest.skip("the family has eager attention alone")
    model.generation_config.eos_token_id = None
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)
    assert generate(model, None, PROMPTS, max_new_tokens=8).new_tokens == expected
    assert generate(model, drafter, PROMPTS, max_new_tokens=8).new_tokens == expected
    sampled = {"do_sample": True, "seed": 1, "max_new_tokens": 8}
    undrafted = generate(model, None, PROMPTS, **sampled).new_tokens
    assert generate(model, drafter, PROMPTS, **sampled).new_tokens == undrafted


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_verify_trees_is_refused_with_the_reason(family):
    reason, settings = REFUSED[family]
    model = build(family.split()[0], settings, "eager")
    with pytest.raises(RedrafterError, match=f"cannot verify draft trees: .*{reason}"):
        Target(model)


def page() -> str:
    works = "\n".join(f"| {family} | {what} |" for family, (what, _) in WORKS.items())
    refused = "\n".join(f"| {family} | {reason} |" for family, (reason, _) in REFUSED.items())
    return f"""# Model families

Generated from the tables of `tests/test_families.py`, which tests every row; do not edit.

Decoders that are not listed are supported too if they pass a probe of their forward pass, which runs on first use.

## Tested

Greedy text equals that of transformers' `generate`, and seeded samples are equal with and without a drafter: in
float32, in a batch of unequal rows, past the sliding window if there is one, with sdpa and with eager attention if the
family has both.

| model type | features |
|---|---|
{works}

## Refused

| model type | reason |
|---|---|
{refused}
"""


def test_the_docs_list_these_families():
    assert (Path(__file__).resolve().parents[1] / "docs" / "families.md").read_text() == page()


if __name__ == "__main__":
    print(page(), end="")
