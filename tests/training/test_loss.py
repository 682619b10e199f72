"""The unrolled loss against one written position by position."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from redrafter import DrafterConfig, RecurrentDrafter
from redrafter.evaluation.windows import windows
from redrafter.heads.medusa import MedusaConfig, MedusaHeads
from redrafter.training.loss import unrolled_loss
from redrafter.training.objective import Objective

VOCABULARY, HIDDEN = 23, 6


def random_drafter(draft: int | None = None, rnn: bool = True) -> RecurrentDrafter:
    torch.manual_seed(0)
    config = DrafterConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, draft_vocab_size=draft, rnn=rnn)
    drafter = RecurrentDrafter(config).double()
    if draft:
        drafter.draft_vocabulary = torch.randperm(VOCABULARY)[:draft].sort().values
    return drafter


def random_batch(seed: int, batch: int, size: int):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.double)
    hidden = torch.randn(batch, size, HIDDEN, generator=generator, dtype=torch.double)
    ids = torch.randint(0, VOCABULARY, (batch, size), generator=generator)
    trained = torch.rand(batch, size, generator=generator) < 0.7
    return embedding, hidden, ids, trained


def plain_loss(drafter, embedding, hidden, ids, trained, length: int) -> torch.Tensor:
    """For every draft position: the mean over all windows with a trained token there and no gap before it."""
    known = list(range(VOCABULARY)) if drafter.draft_vocabulary is None else drafter.draft_vocabulary.tolist()
    total = torch.zeros((), dtype=torch.double)
    for position in range(1, length + 1):
        losses = []
        for row in range(ids.shape[0]):
            for t in range(ids.shape[1] - 1 - position):
                stretch = range(t + 1, t + position + 2)  # the guaranteed token and all drafted tokens
                if not all(trained[row, i] for i in stretch) or int(ids[row, t + 1 + position]) not in known:
                    continue
                state = None
                for i in range(t + 1, t + 1 + position):
                    state = drafter.step(state, embedding[ids[row, i]])
                log = drafter.logits(hidden[row, t], state).log_softmax(-1)
                losses.append(-log[known.index(int(ids[row, t + 1 + position]))])
        total = total + sum(losses) / max(1, len(losses))
    return total


@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4),
    st.sampled_from([None, 9]), st.booleans(), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_agrees_with_the_plain_loss(seed, batch, size, length, draft, rnn, chunk):
    drafter = random_drafter(draft, rnn)
    embedding, hidden, ids, trained = random_batch(seed, batch, size)
    loss = unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained, length=length, chunk=chunk)
    assert loss.item() == pytest.approx(plain_loss(drafter, embedding, hidden, ids, trained, length).item(), abs=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4))
def test_windows_agree_with_a_loop(seed, size, length):
    _, _, ids, trained = random_batch(seed, 2, size)
    rows, positions, tokens, wanted = windows(ids, trained, length=length)
    expected = {}
    for row in range(2):
        for t in range(size - 2):
            if trained[row, t + 1] and trained[row, t + 2]:
                stretch = [bool(i < size and trained[row, t + 1 : i + 1].all()) for i in range(t + 2, t + 2 + length)]
                expected[row, t] = stretch
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == list(expected)
    assert wanted.tolist() == list(expected.values())
    for window, (row, t) in zip(tokens.tolist(), expected, strict=True):
        assert window == [int(ids[row, i]) if i < size else 0 for i in range(t + 1, t + 2 + length)]


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_are_those_of_the_plain_loss(chunk):
    """Also if the loss is scaled, as in accumulation, and added to existing gradients."""
    embedding, hidden, ids, trained = random_batch(1, 3, 12)
    gradients = []
    for scale in (1.0, 2.5, 2.5):
        drafter = random_drafter()
        loss = unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained, length=3, chunk=chunk)
        if scale == 1.0:
            loss = plain_loss(drafter, embedding, hidden, ids, trained, 3)
        (loss * scale).backward()
        if len(gradients) == 2:
            loss = unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained, length=3, chunk=chunk)
            loss.backward()
        gradients.append([parameter.grad for parameter in drafter.parameters()])
    for plain, scaled, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, 2.5 * plain, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(twice, 3.5 * plain, rtol=1e-5, atol=1e-7)


def test_half_precision_gradients_of_many_windows_do_not_underflow():
    """Each of 4,000 windows has the weight 1 / 400,000, which float16 represents badly."""
    embedding, hidden, ids, _ = random_batch(1, 40, 102)
    trained = torch.ones_like(ids, dtype=torch.bool)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        drafter = random_drafter().float()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = unrolled_loss(
                drafter, embedding.float().__getitem__, hidden.float(), ids, trained,
                length=1, chunk=500, objective=Objective(0.01),
            )  # fmt: skip
        loss.backward()
        gradients.append(drafter.lm_head[0].linear.weight.grad)
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()


def test_a_share_of_the_windows():
    """Half of six windows: three random ones each time, and all of them in the mean of many steps."""
    drafter = random_drafter()
    embedding, hidden, ids, _ = random_batch(1, 2, 5)
    trained = torch.ones_like(ids, dtype=torch.bool)

    def loss(share):
        return unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained, length=1, share=share).item()

    rows, positions, tokens, _ = windows(ids, trained, length=1)
    each = []
    for row, t, (root, label) in zip(rows, positions, tokens, strict=True):
        logits = drafter.logits(hidden[row, t], drafter.step(None, embedding[root]))
        each.append(-logits.log_softmax(-1)[label].item())
    possible = [sum(three) / 3 for three in itertools.combinations(each, 3)]
    torch.manual_seed(0)
    drawn = [loss(0.5) for _ in range(200)]
    assert all(min(abs(one - other) for other in possible) < 1e-6 for one in drawn)
    assert len({round(one, 6) for one in drawn}) > 10
    assert sum(drawn) / 200 == pytest.approx(loss(1.0), abs=0.1)
    assert loss(0.01) in [pytest.approx(one, abs=1e-6) for one in each]


def test_a_batch_with_nothing_to_learn_passes_through():
    drafter = random_drafter()
    embedding, hidden, ids, trained = random_batch(1, 2, 5)
    loss = unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained & False, length=3)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in drafter.parameters())


def test_only_a_chunk_of_logits_exists_at_a_time():
    class Largest(TorchDispatchMode):
        """The most elements of any tensor whose last dimension is the vocabulary."""

        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] == VOCABULARY:
                self.size = max(self.size, out.numel())
            return out

    embedding, hidden, ids, trained = random_batch(1, 4, 50)
    drafter = random_drafter()
    with Largest() as largest:
        unrolled_loss(drafter, embedding.__getitem__, hidden, ids, trained, length=3, chunk=16).backward()
    assert largest.size == 16 * 3 * VOCABULARY


def plain_divergence(drafter, head, embedding, hidden, ids, trained, length: int, objective: Objective) -> float:
    """For every draft position: the mean distance of the drafter's distribution from the target's there."""
    known = range(VOCABULARY) if drafter.draft_vocabulary is None else drafter.draft_vocabulary.tolist()
    total = 0.0
    for position in range(1, length + 1):
        losses = []
        for row in range(ids.shape[0]):
            for t in range(ids.shape[1] - 1 - position):
                if not all(trained[row, i] for i in range(t + 1, t + position + 2)):
                    continue
                state = None
                for i in range(t + 1, t + 1 + position):
                    state = drafter.step(state, embedding[ids[row, i]])
                own = dict(zip(known, drafter.logits(hidden[row, t], state).softmax(-1).tolist(), strict=True))
                truth = head(hidden[row, t + position][None])[0].softmax(-1).tolist()
                kl = sum(p * math.log(p / own[v]) for v, p in enumerate(truth) if v in own)
                distance = sum(abs(p - own.get(v, 0)) for v, p in enumerate(truth)) / 2
                losses.append(objective.kl * kl + objective.total_variation * distance)
        total += objective.decay ** (position - 1) * sum(losses) / max(1, len(losses))
    return total


@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 9]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([Objective(0.0, 1.0), Objective(0.0, 0.0, 1.0), Objective(0.0, 0.5, 2.0, decay=0.7)]),
)  # fmt: skip
def test_distances_agree_with_the_plain_ones(seed, batch, size, length, draft, chunk, objective):
    drafter = random_drafter(draft)
    embedding, hidden, ids, trained = random_batch(seed, batch, size)
    weights = torch.randn(HIDDEN, VOCABULARY, dtype=torch.double, generator=torch.Generator().manual_seed(seed))

    def head(states):
        return states @ weights

    loss = unrolled_loss(
        drafter, lambda t: embedding[t], hidden, ids, trained,
        length=length, objective=objective, head=head, chunk=chunk,
    )  # fmt: skip
    expected = plain_divergence(drafter, head, embedding, hidden, ids, trained, length, objective)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([None, 9]))
def test_the_coupled_loss_predicts_the_tokens_that_the_target_samples(seed, size, draft):
    """The target's sample is the label, and the drafter's logits get the same noise, which differs between windows.

    Tokens outside the draft vocabulary share one noise: the maximum of Gumbel variables is one at their total weight.
    """
    drafter = random_drafter(draft)
    embedding, hidden, ids, trained = random_batch(seed, 2, size)
    weights = torch.randn(HIDDEN, VOCABULARY, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    known = list(range(VOCABULARY)) if draft is None else drafter.draft_vocabulary.tolist()
    rows, positions, tokens, wanted = windows(ids, trained, length=1)
    torch.manual_seed(seed)
    loss = unrolled_loss(
        drafter, lambda t: embedding[t], hidden, ids, trained,
        length=1, objective=Objective(0.0, coupled=2.0), head=lambda states: states @ weights,
    )  # fmt: skip
    torch.manual_seed(seed)
    noise = -torch.empty(len(rows), 1, len(known) + 1).exponential_().log()[:, 0]
    expected = 0.0
    for window, (row, t) in enumerate(zip(rows, positions, strict=True)):
        target = (hidden[row, t + 1] @ weights).float().softmax(-1)
        rest = sum(p for v, p in enumerate(target.tolist()) if v not in known)
        drawn = int((torch.cat((target[known], torch.tensor([rest]))).log() + noise[window]).argmax())
        logits = drafter.logits(hidden[row, t], drafter.step(None, embedding[tokens[window, 0]])).float()
        if drawn < len(known):
            expected -= (logits.log_softmax(-1) + noise[window, :-1]).log_softmax(-1)[drawn].item()
    assert loss.item() == pytest.approx(2.0 * expected / max(1, len(rows)), rel=1e-4, abs=1e-6)
    assert wanted.all()


def test_losses_mix():
    drafter = random_drafter()
    embedding, hidden, ids, trained = random_batch(1, 2, 9)

    def loss(objective):
        return unrolled_loss(
            drafter, lambda t: embedding[t], hidden, ids, trained,
            length=3, objective=objective, head=lambda states: states @ torch.eye(HIDDEN, VOCABULARY).double(),
        ).item()  # fmt: skip

    parts = loss(Objective()), loss(Objective(0.0, 1.0)), loss(Objective(0.0, 0.0, 1.0))
    assert loss(Objective(0.5, 2.0, 3.0)) == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 4), st.integers(2, 6))
def test_continuations_replace_the_text(seed, size, length, depth):
    """Drafts start from the text's state at every trained position, whether or not the text continues like them."""
    drafter = random_drafter()
    embedding, hidden, ids, trained = random_batch(seed, 2, size)
    generator = torch.Generator().manual_seed(seed)
    continuations = torch.randint(0, VOCABULARY, (2, size, depth), generator=generator)
    ends = torch.randint(0, depth + 1, (2, size, 1), generator=generator)
    continuations[torch.arange(depth) >= ends] = -1
    loss = unrolled_loss(
        drafter, lambda t: embedding[t], hidden, ids, trained, length=length, continuations=continuations
    )
    expected = 0.0
    for position in range(1, min(length, depth - 1) + 1):
        losses = []
        for row in range(2):
            for t in range(size - 1):
                tokens = continuations[row, t]
                if not trained[row, t + 1] or tokens[position] < 0:
                    continue
                state = None
                for token in tokens[:position]:
                    state = drafter.step(state, embedding[token])
                losses.append(-drafter.logits(hidden[row, t], state).log_softmax(-1)[tokens[position]].item())
        expected += sum(losses) / max(1, len(losses))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([None, 9]), st.sampled_from([None, 2]))
def test_heads_that_ignore_preceding_tokens_have_the_same_loss(seed, size, draft, chunk):
    """As the plain loss, but head i scores position i from the state only."""
    tree, ranks = ((0,),), (1, 1, 1)
    config = MedusaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        draft_vocab_size=draft,
        heads=3,
        beam_length=3,
        ranks=ranks,
        tree=tree,
    )
    torch.manual_seed(seed)
    heads = MedusaHeads(config).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    _, hidden, ids, trained = random_batch(seed, 2, size)
    known = list(range(draft or VOCABULARY))
    expected = torch.zeros((), dtype=torch.double)
    for position in range(1, 4):
        losses = []
        for row in range(2):
            for t in range(size - 1 - position):
                label = int(ids[row, t + 1 + position])
                if all(trained[row, t + 1 : t + position + 2]) and label in known:
                    losses.append(-heads.logits(hidden[row, t])[position - 1].log_softmax(-1)[label])
        expected = expected + sum(losses) / max(1, len(losses))

    def embed(tokens):
        return torch.full((*tokens.shape, HIDDEN), torch.nan, dtype=torch.double)

    loss = unrolled_loss(heads, embed, hidden, ids, trained, length=3, chunk=chunk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    if loss.item():
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in heads.parameters()]
        heads.zero_grad()
        expected.backward()
        for gradient, parameter in zip(gradients, heads.parameters(), strict=True):
            other = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
