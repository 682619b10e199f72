"""An EAGLE head in the common trainer: its loss against a plain loop over windows, and the trained result."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import own_text, weights

from conftest import refusal, tiny_model
from redrafter import EagleHead, RedrafterError, generate
from redrafter.data.examples import Row, collate
from redrafter.targets.target import Target
from redrafter.training.checkpointing import held_out_acceptance
from redrafter.training.estimating import estimate
from redrafter.training.loss import unrolled_loss
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.trainer import run
from redrafter.training.unrolled import Unrolled
from test_eagle import continued, random_head

MODEL = tiny_model()
QUICK = {"batch_size": 8, "learning_rate": 5e-3}


def fresh(**form) -> EagleHead:
    torch.manual_seed(0)
    return EagleHead.fresh(MODEL, **({"beam_length": 3, "beam_width": 4} | form))


def plain_loss(head, target, hidden, ids, trained, length: int, objective: Objective) -> torch.Tensor:
    """For every draft position: the mean over all windows that have a token to predict there."""
    total = torch.zeros((), dtype=torch.double)
    for position in range(1, length + 1):
        losses = []
        for row in range(ids.shape[0]):
            for t in range(ids.shape[1] - 1 - position):
                if not trained[row, t + 1 : t + position + 2].all():
                    continue
                text = ids[row, : t + 1 + position].tolist()
                feature = continued(head, lambda x: target.embed(x).detach(), hidden[row, : t + 1], text)
                log = target.logits(feature[None])[0].log_softmax(-1)
                truth = target.logits(hidden[row, t + position][None])[0].log_softmax(-1).detach()
                distance = torch.nn.functional.smooth_l1_loss(feature, hidden[row, t + position])
                losses.append(
                    -objective.cross_entropy * log[ids[row, t + 1 + position]]
                    + objective.kl * (truth.exp() * (truth - log)).sum()
                    + objective.features * distance
                )
        total = total + objective.decay ** (position - 1) * sum(losses) / max(1, len(losses))
    return total


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_loss_and_gradients_are_those_of_a_plain_loop(chunk):
    target = Target(tiny_model().double())
    head = random_head(target.model, spread=0.2).double()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 6), generator=generator)
    trained = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    hidden = target.hidden_states(ids, torch.ones_like(ids)).detach()
    objective = Objective(0.7, kl=0.4, decay=0.8, features=0.5)
    loss = unrolled_loss(
        head, target.embed, hidden, ids, trained, length=3, objective=objective, head=target.logits, chunk=chunk
    )
    found = torch.autograd.grad(loss, list(head.parameters()))
    plain = plain_loss(head, target, hidden, ids, trained, 3, objective)
    expected = torch.autograd.grad(plain, list(head.parameters()))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_head_learns_and_its_drafts_are_accepted_more_often(tmp_path):
    model = tiny_model()
    before = weights(model)
    rows = own_text(16)
    recipe = Recipe(max_steps=120, **QUICK, objective=Objective(features=0.1))
    untrained = held_out_acceptance(Unrolled(fresh(), Target(model)), rows)
    first = run(model, fresh(), rows, tmp_path / "a", Recipe(max_steps=1, **QUICK), resume=False)
    head = fresh()
    last = run(model, head, rows, tmp_path / "b", recipe, held_out=rows, resume=False)
    assert last.loss < first.loss / 2
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    trained = held_out_acceptance(Unrolled(head, Target(model)), rows)
    assert trained.mean_acceptance_length > untrained.mean_acceptance_length + 1
    assert trained.rates[2] > 0.3, "also at positions where it reads its own features"
    again = EagleHead.from_pretrained(tmp_path / "b", target=model)
    prompts = [row.input_ids[:1] for row in rows]
    out = generate(model, again, prompts, max_new_tokens=24)
    assert out.new_tokens == generate(model, None, prompts, max_new_tokens=24).new_tokens
    assert out.stats.tokens_per_step > 2
    card = (tmp_path / "b" / "README.md").read_text()
    for words in ("# An EAGLE head for", "one transformer layer, 4 heads of 8", "features 0.1", "at every position"):
        assert words in card, words


def test_later_positions_are_trained_on_predicted_features(tmp_path):
    rows = own_text(16)
    rates = []
    for length in (1, 3):
        head = fresh(beam_length=length)
        run(MODEL, head, rows, tmp_path / str(length), Recipe(max_steps=40, **QUICK), resume=False)
        head.config = head.config.model_copy(update={"beam_length": 3})
        rates.append(held_out_acceptance(Unrolled(head, Target(MODEL)), rows).rates[2])
    assert rates[1] > rates[0] + 0.05


def test_packing_and_cached_states_do_not_change_the_loss(tmp_path):
    rows = own_text(6)
    losses = [
        run(MODEL, fresh(), rows, tmp_path / name, Recipe(max_steps=1, batch_size=6, **how), resume=False).loss
        for name, how in (("a", {}), ("b", {"packing": 60}), ("c", {"cache_states": tmp_path / "states"}))
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_a_partly_trained_row_needs_the_states_of_its_whole_prefix():
    rows = [Row(list(range(3, 23)), [False] * 12 + [True] * 8)]
    recipe = Recipe(max_steps=1, objective=Objective(kl=0.5, features=0.1))
    batch = collate(rows)
    module = Unrolled(fresh(), Target(MODEL), recipe.objective)
    whole = module.hidden_states(batch["input_ids"], batch["segments"])
    kept = whole.clone()
    kept[:, ~torch.tensor(rows[0].before_learnt(20))] = 0
    assert not torch.equal(kept, whole)
    assert module(**batch, hidden=kept)["loss"] == module(**batch, hidden=whole)["loss"]


def test_half_precision_and_an_estimate(tmp_path):
    head = fresh()
    run(MODEL, head, own_text(4), tmp_path, Recipe(max_steps=2, batch_size=4, precision="bfloat16"), resume=False)
    assert all(weight.isfinite().all() for weight in weights(head))
    before = weights(head)
    assert estimate(MODEL, head, own_text(4), Recipe(epochs=2.0, batch_size=2)).steps == 4
    assert all(torch.equal(a, b) for a, b in zip(before, weights(head), strict=True))
    assert all(parameter.grad is None for parameter in [*MODEL.parameters(), *head.parameters()])


def test_continuations_have_no_states(tmp_path):
    rows = [Row([3, 4, 5], [True] * 3, [[4, 5], [5, 6], [6, 7]])]
    with pytest.raises(RedrafterError, match="EAGLE"):
        run(MODEL, fresh(), rows, tmp_path, Recipe(), resume=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} sheep went over the fence, then {n + 1}"}) for n in range(40)))
    return path


def test_from_the_command_line(say, model_folder, texts, tmp_path):
    words = ("train", "--method", "eagle", "--model", model_folder, "--data", texts, "--output", tmp_path / "d")
    shape = ("--beam-length", "3", "--beam-width", "4", "--node-budget", "9")
    status, _, err = say(*words, *shape, "--max-steps", "3", "--learning-rate", "0.005")
    assert status == 0, err
    made = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (made["model_type"], made["node_budget"], made["target"]) == ("redrafter_eagle", 9, model_folder.name)
    assert "cross-entropy 1, features 0.1" in (tmp_path / "d" / "README.md").read_text()
    pair = ("--model", model_folder, "--drafter", tmp_path / "d")
    status, out, _ = say("generate", *pair, "--prompt", "9 sheep", "--max-new-tokens", "20")
    plain = say("generate", "--model", model_folder, "--no-drafter", "--prompt", "9 sheep", "--max-new-tokens", "20")
    assert (status, out) == plain[:2]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{n} sheep"}) for n in range(4)))
    status, out, _ = say("check", *pair, "--prompts", prompts, "--max-new-tokens", "8")
    assert (status, out.split(",")[0]) == (0, "4 of 4 texts equal")
    status, out, _ = say("eval", *pair, "--prompts", prompts, "--limit", "2", "--max-new-tokens", "8", "--json")
    assert status == 0
    assert json.loads(out)["greedy"]["decoding"] == json.loads(out)["greedy"]["walked"]
    status, out, _ = say("info", tmp_path / "d")
    assert status == 0
    assert "one transformer layer" in out
    again = (*words[:-1], tmp_path / "e")
    assert "--gated is an option of --method recurrent" in refusal(say(*again, "--gated"))
    assert "recurrent" in refusal(say(*again, "--method", "hydra"))
    recurrent = (*again, "--method", "recurrent", "--features", "1")
    assert "--features is an option of --method eagle" in refusal(say(*recurrent))
