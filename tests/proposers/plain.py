"""What tests of methods that search beams share: every draft of a run against a search that knows the text alone."""

from __future__ import annotations

import torch
from test_recurrent import paths

from conftest import Given
from redrafter import generate
from redrafter.core.noise import gumbel
from redrafter.core.rows import SamplingNoise
from redrafter.decoding.state import sampler_of, settings_of
from redrafter.engine.request import request
from redrafter.proposers import Proposer

LAWS = {"greedy": {}, "sampled": {"do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 30}}
SHAPES = [(1, 4, None), (3, 3, None), (4, 3, 6), (2, 1, None), (1, 1, None)]
MANY = [[5, 9, 12], [7], [30, 31, 32, 33, 34], [8, 8], [11], [40, 41, 42], [3] * 9]
VOCABULARY = 9


def shaped(width: int, length: int, budget: int | None) -> dict:
    """The shape of a beam search alone."""
    return {"beam_width": width, "beam_length": length, "node_budget": budget, "lookup": False}


def small(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts of a vocabulary in which drafts are accepted now and then."""
    return [[token % VOCABULARY for token in prompt] for prompt in prompts]


class Watched(Proposer):
    """Records every row's text and draft."""

    def __init__(self, proposer):
        self.watched, self.seen = proposer, []
        self.length, self.size = proposer.length, proposer.size
        self.positions, self.modules = proposer.positions, proposer.modules

    def memory(self, **sizes):
        return self.watched.memory(**sizes)

    def read(self, memory, chunk, states):
        self.watched.read(memory, chunk, states)

    def propose(self, memory, rows, context, noise):
        tree = self.watched.propose(memory, rows, context, noise)
        for slot in rows.alive.nonzero().flatten().tolist():
            text = rows.text[slot, : int(rows.length[slot]) + 1].tolist()
            self.seen.append((int(rows.seed[slot]), text, set(paths(tree, slot).values())))
        return tree


def plain_search(following, width: int, length: int, rank):
    """The beams of one row, and all candidates: [(tokens, score)].  `following(tokens)` returns logits [V]."""
    beams, candidates = [((), 0.0)], []
    for position in range(length):
        grown = []
        for tokens, score in beams:
            logits = rank(following(tokens)[None, None].float(), position)
            best = logits[0, 0].log_softmax(-1).topk(width)
            gains = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            grown += [((*tokens, token), score + gain) for token, gain in gains if gain > -torch.inf]
        candidates += grown
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return beams, candidates


def check_every_draft(model, method, following_of, shape, *, coupled: bool, **told) -> None:
    """Drafts while rows come and go; `following_of(text)` gives what `plain_search` asks."""
    width, length, budget = shape
    prompts = small(MANY)
    asked = request(model, method, prompts, **shaped(*shape), **told)
    watched = Watched(asked.decoder.proposer)
    settings = settings_of(asked.rows[0], count=1, vocabulary=VOCABULARY, device=torch.device("cpu"))
    warp = SamplingNoise(None, sampler_of({0: asked.rows[0]}).features, settings).warp
    out = generate(model, Given(watched), prompts, **told)
    assert 0 < out.stats.accepted < out.stats.drafted
    assert len(watched.seen) > 20
    for seed, text, found in watched.seen:

        def rank(logits, position, seed=seed, text=text):
            if not asked.sampler.features.sampling:
                return logits
            noise = gumbel(torch.tensor([seed]), torch.tensor([[len(text) + position]]), VOCABULARY)
            return warp(logits) + (noise if coupled else 0)

        beams, candidates = plain_search(following_of(text), width, length, rank)
        if budget is None:
            expected = {tokens[:depth] for tokens, _ in beams for depth in range(length + 1)}
        else:
            expected = {(), *(tokens for tokens, _ in sorted(candidates, key=lambda one: -one[1])[: budget - 1])}
        assert found == expected
