"""GGUF files as target models, on a file with quantised weights that is written here."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

from conftest import refusal, tiny_model
from redrafter import RecurrentDrafter

BLOCKS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a layer's weights in GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


def name_in_file(name: str) -> str:
    """The name of one of Llama's weights."""
    name = name.removesuffix(".weight").removeprefix("model.")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"blk.{number}.{BLOCKS[rest]}.weight"
    return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name] + ".weight"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of two layers whose matrices are packed in blocks of 8 bits, with a tokenizer of bytes."""
    model: LlamaForCausalLM = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=258)
    config = model.config
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "ba"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b", "b a"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        if values.ndim == 2:
            writer.add_tensor(name_in_file(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name_in_file(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("words", [[], ["--dequantize"]])
def test_drafted_text_equals_undrafted_text(gguf_file, tmp_path, say, words):
    from redrafter.cli.loading import load_model

    model, _ = load_model(str(gguf_file))
    assert model.config.hidden_size == 64
    torch.manual_seed(0)
    RecurrentDrafter.for_target(model, beam_width=2, beam_length=3).save_pretrained(tmp_path / "drafter")
    common = ["generate", "--model", gguf_file, "--prompt", "Hello", "--max-new-tokens", 24, "--device", "cpu", *words]
    status, alone, _ = say(*common, "--no-drafter")
    assert status == 0
    assert say(*common, "--drafter", tmp_path / "drafter")[:2] == (0, alone)
    assert len(alone) > 10


def test_a_drafter_without_fingerprint_is_recognised_by_the_models_name(gguf_file, tmp_path, say):
    from redrafter.cli.loading import load_model

    model, _ = load_model(str(gguf_file))
    folder = tmp_path / "drafter"
    words = ["generate", "--model", gguf_file, "--prompt", "Hello", "--max-new-tokens", 4, "--device", "cpu"]
    for target, fits in (("someone/tiny", True), ("someone/other", False)):
        drafter = RecurrentDrafter.for_target(model, beam_width=2, beam_length=3)
        drafter.config = drafter.config.model_copy(update={"target": target, "target_fingerprint": None})
        drafter.save_pretrained(folder)
        status, _, err = say(*words, "--drafter", folder)
        assert (status, "someone/other" in err) == ((0, False) if fits else (2, True))


def test_dequantize_needs_a_gguf_file(model_folder, say):
    answer = say("generate", "--model", model_folder, "--no-drafter", "--prompt", "a", "--dequantize")
    assert "--dequantize" in refusal(answer)


def test_a_missing_file_is_named(tmp_path, say):
    answer = say("generate", "--model", tmp_path / "none.gguf", "--no-drafter", "--prompt", "a")
    assert "none.gguf" in refusal(answer)
