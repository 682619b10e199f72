"""The head's step and its unroll over rows, against ones that run each place's text alone."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from conftest import tiny_model
from redrafter import RedrafterError
from redrafter.core.shapes import DraftShape
from redrafter.heads.eagle import EagleConfig, EagleHead

MODEL = tiny_model()


def random_head(model=MODEL, *, seed: int = 0, spread: float = 0.4, **shape) -> EagleHead:
    """One whose choices are far apart."""
    torch.manual_seed(seed)
    head = EagleHead.fresh(model, **shape).to(model.dtype)
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return head.eval()


def continued(head: EagleHead, embed, features: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The feature after the last token of a text, whose first features are the target's [P, H]; the others its own.

    Nothing is kept: each feature comes of a run over all that lies before.
    """
    while True:
        size = len(features)
        index = torch.arange(size)[None]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        after = head(embed(torch.tensor([tokens[1 : size + 1]])), features[None], index, mask, DynamicCache())[0, -1:]
        if size == len(tokens) - 1:
            return after[0]
        features = torch.cat((features, after))


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 4), st.lists(st.integers(2, 6), min_size=1, max_size=3))
@torch.no_grad()
def test_windows_over_rows_are_those_of_each_text_alone(seed, length, sizes):
    """Also where several texts share a row."""
    embed = MODEL.get_input_embeddings()
    head = random_head(seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (2, sum(sizes)), generator=generator)
    hidden = torch.randn(2, sum(sizes), 32, generator=generator, dtype=torch.double)
    segments = torch.cat([torch.full((2, size), number) for number, size in enumerate(sizes, start=1)], dim=1)
    predicted = head.over_rows(embed, hidden, ids, segments, length)
    assert predicted.shape == (length, 2, sum(sizes), 32)
    begin = 0
    for size in sizes:
        for row in range(2):
            for t in range(size - 1):
                for step in range(min(length, size - 1 - t)):
                    text = ids[row, begin : begin + t + 2 + step].tolist()
                    expected = continued(head, embed, hidden[row, begin : begin + t + 1], text)
                    found = predicted[step, row, begin + t + step]  # angles and norms are float32's
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        begin += size


def test_it_is_saved_without_the_targets_weights(tmp_path):
    head = random_head(beam_length=3, beam_width=4, node_budget=9)
    head.save_pretrained(tmp_path)
    again = EagleHead.from_pretrained(tmp_path, target=MODEL)
    assert again.config == head.config
    assert again.config.shape(1) == DraftShape(beam_width=4, beam_length=3, node_budget=9)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any("embed" in name or "lm_head" in name for name in head.state_dict())
    vocabulary = MODEL.config.vocab_size
    assert not any(vocabulary in weight.shape for weight in head.state_dict().values())


@torch.no_grad()
def test_half_precision_leaves_the_positions_as_they_were():
    """Angles of a position far along the text are those of float32."""
    head = random_head()
    x, far = torch.randn(1, 1, 32), torch.tensor([[1001]])
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    kept = []
    for one in (head, random_head().bfloat16()):
        keys = DynamicCache()
        one(x.to(one.dtype), x.to(one.dtype), far, mask, keys)
        kept.append(keys.layers[0].keys.float())
    assert torch.nn.functional.cosine_similarity(*(k.flatten() for k in kept), dim=0) > 0.999


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("gemma3_text", {"sliding_window": 8}), ("llama", {"hidden_size": 36, "num_attention_heads": 6})],
)
def test_it_takes_the_shape_of_any_target(family, changes):
    model = tiny_model(family, **changes)
    config = EagleHead.fresh(model).config
    assert config.hidden_size == model.config.hidden_size
    assert config.hidden_size % (2 * config.num_attention_heads) == 0


def test_a_config_is_refused_in_a_sentence(tmp_path):
    head = random_head()
    head.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for change, sentence in (
        ({"num_attention_heads": 5}, "hidden_size must be an even multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"intermediate_size": 0}, "intermediate_size: Input should be greater than 0"),
        ({"model_type": "other"}, "does not describe an EAGLE head: model_type"),
        ({"intermediate_size": 50}, "tensor layer.mlp.down_proj.weight should be"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(RedrafterError, match=sentence):
            EagleHead.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(RedrafterError, match="made for a model that it does not name"):
        EagleHead.from_pretrained(tmp_path, target=tiny_model(vocab_size=62))
    assert EagleConfig.from_file(tmp_path / "config.json") == head.config
