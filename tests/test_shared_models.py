"""Models that others trained, where they are at hand: drafted text is what transformers writes."""

from __future__ import annotations

import pytest
import torch
import transformers

from conftest import greedy
from redrafter import RecurrentDrafter, generate


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_greedy_text_is_that_of_transformers(shared_models, name):
    if not (shared_models / name).is_dir():
        pytest.skip(f"{name} is not here")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_models / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_models / name)
    prompts = [
        tokenizer(text).input_ids for text in ("Once upon a time", "Lily had a red ball. One day, she", "The dog")
    ]
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model)
    out = generate(model, drafter, prompts, max_new_tokens=60)
    assert out.new_tokens == [greedy(model, prompt, 60) for prompt in prompts]
