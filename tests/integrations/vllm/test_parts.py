"""What the plug-in computes itself, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from vllm_jobs import DRAFTER

from conftest import tiny_model
from redrafter import RecurrentDrafter
from redrafter.core.noise import gumbel
from redrafter.core.rows import Features, RowSettings, SamplingNoise
from redrafter.errors import RedrafterError
from redrafter.integrations.vllm.chain import DraftChains, draft_length
from redrafter.integrations.vllm.sampling import DraftedRows, accepted, constrained
from redrafter.integrations.vllm.settings import Settings, check_shape, read_config
from redrafter.integrations.vllm.versions import check_signature, check_version


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1"])
def test_known_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0", "dev"])
def test_unknown_versions_are_named(version):
    with pytest.raises(RedrafterError, match=version):
        check_version(version)


def test_signatures():
    def known(self, logits, extra=None, *rest, **named): ...

    check_signature(known, ("self", "logits"))
    with pytest.raises(RedrafterError, match="known"):
        check_signature(known, ("self", "scores"))

    def more(self, logits, needed): ...

    with pytest.raises(RedrafterError, match="needed"):
        check_signature(more, ("self", "logits"))


def test_settings_refuse_unknown_and_invalid_fields():
    config = {"method": "redrafter", "model": "folder", "num_speculative_tokens": 3}
    assert Settings.from_speculative_config(config).drafter == "folder"
    for change, word in (
        ({"seedd": True}, "seedd"),
        ({"max_verified_tokens": 0}, "max_verified"),
        ({"model": 3}, "model"),
    ):
        with pytest.raises(RedrafterError, match=word):
            Settings.from_speculative_config(config | change)


def test_a_field_cannot_replace_the_drafter():
    config = {"method": "redrafter", "model": "folder", "drafter": "other"}
    with pytest.raises(RedrafterError, match="drafter"):
        Settings.from_speculative_config(config)


@pytest.mark.parametrize("field", [{"context_layers": [1]}, {"context_positions": 2}])
def test_drafters_that_read_more_are_refused(field, tmp_path):
    drafter = RecurrentDrafter.for_target(tiny_model(), exit_dim=16, num_draft_layers=1, **field)
    drafter.save_pretrained(tmp_path)
    with pytest.raises(RedrafterError, match=next(iter(field))):
        read_config(Settings(drafter=str(tmp_path)))


def test_shapes_are_compared():
    config = read_config(Settings(drafter=DRAFTER))
    check_shape(config, name="served", vocab_size=4096, hidden_size=256)
    with pytest.raises(RedrafterError, match="served"):
        check_shape(config, name="served", vocab_size=4096, hidden_size=512)


def test_drafts_get_shorter_with_load():
    assert [draft_length(4, requests, 64) for requests in (1, 8, 13, 16, 32, 33, 64, 100)] == [4, 4, 3, 3, 1, 0, 0, 0]


def slow_chain(drafter, embed, context, root, length, noise=None):
    """The best token after another, one request and one step at a time."""
    state, tokens = None, []
    for depth in range(length):
        state = drafter.step(state, embed(root))
        scores = drafter.logits(drafter.context(context), state).float()
        if noise is not None:
            scores = scores / noise.settings.temperature[0] + noise.gumbel[0, depth]
        root = drafter.to_target_ids(scores.argmax())
        tokens.append(int(root))
    return tokens


@pytest.fixture(params=[{}, {"gated": True}, {"rnn": False}, {"exit_dim": 64}], ids=str)
def drafter(request, llama):
    torch.manual_seed(1)
    shape = {"exit_dim": 48, "num_draft_layers": 1} | request.param
    return RecurrentDrafter.for_target(llama, draft_vocabulary=torch.arange(3, 50), **shape)


def test_one_chain_for_each_request(drafter, llama):
    embed = nn.Embedding.from_pretrained(llama.get_input_embeddings().weight)
    chains = DraftChains(drafter, embed, capture=True)
    context, root = torch.randn(5, 32), torch.tensor([3, 9, 30, 44, 60])
    drafts = chains.draft(context, root, 4)
    assert drafts.tolist() == [slow_chain(drafter, embed, context[i], root[i], 4) for i in range(5)]
    assert chains.draft(context[2:3], root[2:3], 4).tolist() == drafts[2:3].tolist()


def test_chains_ranked_by_noise(drafter, llama):
    embed = nn.Embedding.from_pretrained(llama.get_input_embeddings().weight)
    context, root = torch.randn(1, 32), torch.tensor([7])
    neutral = torch.zeros(1)
    noise = SamplingNoise(
        gumbel(torch.tensor([5]), torch.tensor([[11, 12, 13]]), 61, drafter.draft_vocabulary),
        Features(sampling=True),
        RowSettings(neutral.long() + 1, neutral.long(), neutral.long(), neutral + 0.7, *[neutral + 1] * 6),
    )
    drafts = DraftChains(drafter, embed, capture=True).draft(context, root, 3, noise)
    assert drafts.tolist() == [slow_chain(drafter, embed, context[0], root[0], 3, noise)]


def test_noise_of_some_tokens_is_that_of_all():
    seed, position, names = torch.tensor([1, 2]), torch.tensor([[3], [4]]), torch.tensor([5, 17, 40])
    assert torch.equal(gumbel(seed, position, 61, names), gumbel(seed, position, 61)[..., names])


def test_drafts_are_kept_as_long_as_they_equal_the_models_tokens():
    lengths, longest = [3, 0, 2, 1, 3], 3
    chosen = torch.tensor([1, 2, 3, 7, 8, 9, 4, 5, 6])
    drafted = torch.tensor([1, 9, 3, 7, 8, -1, 4, 5, 6])
    last = torch.tensor([10, 11, 12, 13, 14])
    expected, begin = [], 0
    for length, end in zip(lengths, last.tolist(), strict=True):
        row = []
        for one in range(begin, begin + length):
            row.append(int(chosen[one]))
            if chosen[one] != drafted[one]:
                break
        else:
            row.append(end)
        begin += length
        expected.append(row + [-1] * (longest + 1 - len(row)))
    assert accepted(chosen, drafted, last, DraftedRows.of(lengths), longest).tolist() == expected


def test_settings_of_each_request_reach_its_drafted_positions():
    torch.manual_seed(0)
    request = torch.tensor([0, 0, 2, 3])
    temperature = torch.tensor([0.5, 1.0, 0.0, 2.0])
    min_p, top_k, top_p = torch.tensor([0.0, 0.0, 0.0, 0.3]), torch.tensor([2, 5, 9, 9]), torch.tensor([1.0, 1, 1, 0.6])
    logits = torch.randn(4, 9)

    def truncate(scores, k, p):
        assert k.tolist() == top_k[request].tolist()
        assert p.tolist() == top_p[request].tolist()
        return scores

    found = constrained(
        logits, request, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, truncate=truncate
    )
    for row, one in enumerate(request.tolist()):
        scores = logits[row] / (temperature[one] or 1)
        chances = scores.softmax(-1)
        scores[chances < min_p[one] * chances.max()] = -torch.inf
        assert torch.equal(found[row], scores)


def test_the_package_registers_one_plug_in_and_needs_no_vllm():
    found = [one.value for one in entry_points(group="vllm.general_plugins") if one.name == "redrafter"]
    assert found == ["redrafter.integrations.vllm:register"]
    program = "import sys, redrafter.integrations.vllm; print([one for one in ('vllm', 'torch') if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
