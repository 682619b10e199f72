"""Beam search against one written with lists, on random drafters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.core.shapes import DraftShape
from redrafter.heads.recurrent import DrafterConfig, RecurrentDrafter
from redrafter.proposers.recurrent import beam_search


def random_drafter(*, seed: int, rnn: bool, exit_dim: int, vocabulary: int = 11, draft: int | None = None):
    torch.manual_seed(seed)
    config = DrafterConfig(
        vocab_size=vocabulary, hidden_size=6, exit_dim=exit_dim, num_draft_layers=1, rnn=rnn, draft_vocab_size=draft
    )
    drafter = RecurrentDrafter(config).double()
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    if draft:
        drafter.draft_vocabulary = torch.randperm(vocabulary)[:draft].sort().values
    return drafter, torch.nn.Embedding(vocabulary, 6).double()


def plain_beam_search(
    drafter, embedding, context, root: int, width: int, length: int, adjust=lambda logits, ids, position: logits
):
    """Plain reference for one row: every beam grown by every token, the best kept; fewer where others are impossible.

    `adjust` changes the logits of the tokens `ids`.
    """
    ids = range(drafter.config.head_size) if drafter.draft_vocabulary is None else drafter.draft_vocabulary.tolist()
    beams = [([], 0.0, drafter.step(None, embedding(torch.tensor(root))))]
    for position in range(length):
        grown = []
        for tokens, score, state in beams:
            log_probabilities = adjust(drafter.logits(context, state), ids, position).log_softmax(-1).tolist()
            for token, gain in zip(ids, log_probabilities, strict=True):
                grown.append(([*tokens, token], score + gain, state))
        grown = sorted((beam for beam in grown if beam[1] > -torch.inf), key=lambda beam: -beam[1])
        beams = [(t, s, drafter.step(state, embedding(torch.tensor(t[-1])))) for t, s, state in grown[:width]]
    return [(tokens, score) for tokens, score, _ in beams]


@given(
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([12, 5]),
    st.sampled_from([None, 7]),
    st.integers(1, 6),
    st.integers(1, 4),
)
@torch.no_grad()
def test_agrees_with_the_plain_search(seed, rnn, exit_dim, draft, width, length):
    drafter, embedding = random_drafter(seed=seed, rnn=rnn, exit_dim=exit_dim, draft=draft)
    context, root = torch.randn(3, 6, dtype=torch.double), torch.tensor([1, 4, 10])
    beams, scores, levels = beam_search(
        drafter, embedding, context, root, DraftShape(beam_width=width, beam_length=length)
    )
    for row in range(3):
        expected = plain_beam_search(drafter, embedding, context[row], int(root[row]), width, length)
        assert beams[row].tolist() == [tokens for tokens, _ in expected]
        assert scores[row].tolist() == pytest.approx([score for _, score in expected], abs=1e-4)
        candidates = [[()]]
        for depth, level in enumerate(levels, start=1):
            above = [candidates[-1][entry] for entry in level.parents[row].tolist()]
            candidates.append([(*path, token) for path, token in zip(above, level.tokens[row].tolist(), strict=True)])
            assert len(set(candidates[-1])) == len(level.tokens[row]) == width * (1 if depth == 1 else width)
            found = plain_beam_search(drafter, embedding, context[row], int(root[row]), width, depth)
            known = dict(zip(candidates[-1], level.scores[row].tolist(), strict=True))
            assert all(known[tuple(tokens)] == pytest.approx(score, abs=1e-4) for tokens, score in found)


def test_wider_than_the_vocabulary_is_refused():
    drafter, embedding = random_drafter(seed=0, rnn=True, exit_dim=12)
    with pytest.raises(ValueError, match="exceeds the 11 tokens"):
        beam_search(
            drafter,
            embedding,
            torch.zeros(1, 6, dtype=torch.double),
            torch.tensor([0]),
            DraftShape(beam_width=12, beam_length=1),
        )
