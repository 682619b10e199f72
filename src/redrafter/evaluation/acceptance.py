"""How far drafts are accepted, in vLLM's words: in real decoding, and at every place of a text at once.

Teacher-forced: one run of the target over a text gives its hidden states everywhere, so a draft can be made at every
place and held against the tokens that follow there.  From those verdicts, walked as decoding walks (on by the accepted
tokens and one more), come decoding's own counts, up to rounding.  Does not know files or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState
from redrafter.core.shapes import ShapeOverrides
from redrafter.data.examples import Row, collate
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
from redrafter.decoding.step import PREFILL_CHUNK
from redrafter.decoding.verify import walk
from redrafter.engine.generate import generate
from redrafter.engine.request import Request, request
from redrafter.engine.results import Finished, Generation, Stats
from redrafter.errors import RedrafterError
from redrafter.proposers import Drafter, Proposer, method_of
from redrafter.proposers.base import measured_shape
from redrafter.targets.structure import unwrapped
from redrafter.targets.target import Target
from redrafter.training.loss import context_at, windows

CHUNK = 512
"""Places that are drafted at together, at most."""

SCORES = 2**24
"""Scores of one beam over the target's vocabulary that exist at one time: 64 MB in float32."""

MEMORIES = 2**28
"""Bytes of what proposers keep, copied for each place, that exist at one time, about."""

GREEDY = Sampler()


@dataclass(frozen=True)
class Acceptance:
    """Counts of drafts.

    An accepted token is one that stands in the text: where a text ends, or stops being trained, before its draft does,
    the rest of the draft counts as drafted and not as accepted, as in decoding.
    """

    drafts: int
    draft_tokens: int
    """Nodes of all trees, the roots not counted."""
    accepted: int
    by_position: list[int]
    """Drafts whose first, second, … token was accepted."""

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts: the tokens that a step writes, the target's own one counted."""
        return 1 + self.accepted / max(1, self.drafts)

    @property
    def rates(self) -> list[float]:
        """The share of all drafts that was accepted at each position."""
        return [count / max(1, self.drafts) for count in self.by_position]

    @classmethod
    def of(cls, verdicts: Int[Tensor, "M 2"], length: int) -> Acceptance:
        """Counts accepted and drafted tokens of M drafts that reach `length` deep."""
        accepted, drafted = verdicts.unbind(1)
        by_position = [int((accepted > position).sum()) for position in range(length)]
        return cls(len(verdicts), int(drafted.sum()), int(accepted.sum()), by_position)

    @classmethod
    def total(cls, parts: list[Acceptance]) -> Acceptance:
        """The sum over parts with the same positions."""
        return cls(
            drafts=sum(part.drafts for part in parts),
            draft_tokens=sum(part.draft_tokens for part in parts),
            accepted=sum(part.accepted for part in parts),
            by_position=[sum(counts) for counts in zip(*(part.by_position for part in parts), strict=True)],
        )


@dataclass(frozen=True)
class Measured:
    """One text that was written, or several together, and its drafts counted in three ways."""

    tokens: int
    """New ones."""
    decoding: Acceptance
    """Where decoding drafted, as it counted."""
    walked: Acceptance
    """The same from the teacher-forced drafts; differs by rounding alone."""
    teacher_forced: Acceptance
    """At every place of the text."""

    @classmethod
    def total(cls, parts: list[Measured]) -> Measured:
        """The sum over texts."""
        return cls(
            sum(part.tokens for part in parts),
            Acceptance.total([part.decoding for part in parts]),
            Acceptance.total([part.walked for part in parts]),
            Acceptance.total([part.teacher_forced for part in parts]),
        )


def acceptance(
    target: Target,
    proposer: Proposer,
    rows: Iterable[Row],
    *,
    sampler: Sampler = GREEDY,
    seeds: list[int] | None = None,
    batch_size: int = 8,
    chunk: int | None = None,
) -> Acceptance:
    """Teacher-forced acceptance of drafts at every window of the rows.

    A window is as in training (`loss.windows`): the draft begins after the guaranteed token t+1, which must be a
    trained token as t+2 must, and position i is accepted where all of t+2 … t+1+i are trained tokens and drafted on one
    path.  Rows with continuations are held against those.  `sampler` and the rows' `seeds` give a proposer the noise
    that decoding would give it; `batch_size` rows go through the target together, and `chunk` windows are drafted at,
    by default as many as CHUNK and SCORES allow.
    """
    verdicts = drafted_everywhere(
        target, proposer, list(rows), sampler=sampler, seeds=seeds, batch_size=batch_size, chunk=chunk
    )
    return Acceptance.of(torch.cat([torch.zeros((0, 2), dtype=torch.long), *verdicts]), proposer.length)


@torch.no_grad()  # not inference mode: a run of training goes on afterwards with what was cached here
def drafted_everywhere(
    target: Target,
    proposer: Proposer,
    rows: list[Row],
    *,
    sampler: Sampler = GREEDY,
    seeds: list[int] | None = None,
    batch_size: int = 8,
    chunk: int | None = None,
) -> list[Tensor]:
    """Accepted and drafted tokens at every window, [M, 2] for each row, by position; arguments as for `acceptance`."""
    chunk = chunk or min(CHUNK, max(1, SCORES // target.vocab_size))
    verdicts: list[Tensor] = []
    for places in everywhere(target, rows, length=proposer.length, batch_size=batch_size):
        ids, hidden = places.ids, places.hidden
        seed = torch.tensor((seeds or [0] * len(rows))[len(verdicts) :][: len(ids)], device=ids.device)
        found = [torch.zeros((0, 2), dtype=torch.long, device=ids.device)]
        if hidden is not None:
            ids = torch.nn.functional.pad(ids, (0, proposer.length + proposer.size))  # as many slots as in decoding
            memory = _remembered(proposer, ids, hidden, seed)
            at_once = chunk if memory is None else min(chunk, max(1, MEMORIES // memory.row_bytes))
            for at, t, text, wanted in places.chunks(at_once):
                context = context_at(hidden, at, t, proposer.positions).unflatten(1, (proposer.positions, -1))
                texts = ids[at].scatter(1, t[:, None] + 1, text[:, :1])  # a continuation has its own
                place = RowState(at, seed[at], texts, length=t + 1, alive=torch.ones_like(at))
                own = None if memory is None else memory.of_rows(at)
                found.append(_verdicts(target, proposer, sampler, own, place, context, text, wanted))
        verdicts += torch.cat(found).cpu().split(places.row.bincount(minlength=len(ids)).tolist())
    return verdicts


class Places(NamedTuple):
    """Every window of some rows (`loss.windows`), and the target's states along them."""

    ids: Int[Tensor, "B P"]
    hidden: Float[Tensor, "B P1 state"] | None
    """Of all positions but the last, at which no draft begins and the model may have no room; None without windows."""
    row: Int[Tensor, " M"]
    position: Int[Tensor, " M"]
    tokens: Int[Tensor, "M length1"]
    known: Bool[Tensor, "M length"]

    def chunks(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Rows, positions, tokens and which are known, of so many windows at a time."""
        yield from zip(*(part.split(size) for part in self[2:]), strict=True)


def everywhere(target: Target, rows: list[Row], *, length: int, batch_size: int) -> Iterator[Places]:
    """All places where drafts of `length` tokens can begin, `batch_size` rows at a time."""
    for begin in range(0, len(rows), batch_size):
        collated = collate(rows[begin : begin + batch_size])
        batch = {name: value.to(target.device) for name, value in collated.items()}
        ids = batch["input_ids"]
        found = windows(ids, batch["trained"], length=length, continuations=batch.get("continuations"))
        some = len(found[0]) > 0
        yield Places(ids, target.hidden_states(ids[:, :-1], batch["segments"][:, :-1]) if some else None, *found)


def _remembered(
    proposer: Proposer, ids: Int[Tensor, "B slots"], hidden: Float[Tensor, "B P state"], seed: Int[Tensor, " B"]
) -> SlotCache | None:
    """What a proposer keeps of whole rows: a draft at any place of them sees what lies before it alone."""
    memory = proposer.memory(batch=len(ids), slots=ids.shape[1])
    last = torch.full_like(seed, hidden.shape[1] - 1)
    place = RowState(torch.arange(len(ids), device=ids.device), seed, ids, last, torch.ones_like(seed))
    for start in range(0, hidden.shape[1], PREFILL_CHUNK):
        proposer.read(memory, place, hidden[:, start : start + PREFILL_CHUNK], start)
    return memory


def _verdicts(
    target: Target,
    proposer: Proposer,
    sampler: Sampler,
    memory: SlotCache | None,
    place: RowState,
    context: Float[Tensor, "C positions state"],
    tokens: Int[Tensor, "C length1"],
    wanted: Bool[Tensor, "C length"],
) -> Int[Tensor, "C 2"]:
    """Accepted and drafted tokens; `tokens` are the root and what follows it, of which `wanted` is known."""
    noise = sampler.noise(place, depths=proposer.length + 1, vocabulary=target.vocab_size)
    tree = proposer.propose(memory, place, context, noise)
    following = tokens[:, 1:].masked_fill(~wanted, -1)
    following = torch.nn.functional.pad(following, (0, 1), value=-1)  # nothing is drafted after the deepest nodes
    _, accepted = walk(tree, following.gather(1, tree.depth), length=proposer.length)
    return torch.stack((accepted, tree.valid.sum(dim=1) - 1), dim=1)


def walked(verdicts: Int[Tensor, "M 2"]) -> Int[Tensor, "D 2"]:
    """Those of a row at which decoding would draft: the first, then on by the accepted tokens and one more."""
    places, place = [], 0
    accepted = verdicts[:, 0].tolist()
    while place < len(accepted):
        places.append(place)
        place += accepted[place] + 1
    return verdicts[torch.tensor(places, dtype=torch.long)]


def evaluate(
    model: nn.Module,
    drafter: Drafter,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_row: Callable[[Finished], object] | None = None,
) -> dict[str, list[Measured]]:
    """Writes from every prompt, `greedy` and `sampled`, and counts drafts; one entry for each prompt.

    `on_row` is called with each of these texts, two for each prompt, as it is written.  Other settings are the model's
    own, as in `generate`; stop strings need the `tokenizer`.

    Raises RedrafterError for bad prompts and settings.
    """
    common: dict[str, Any] = ONE_TEXT | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if tokenizer is not None:
        common = with_stop_strings(unwrapped(model), common, tokenizer)
    batch = min(batch_size, len(prompts))
    overrides = ShapeOverrides(beam_width, beam_length, node_budget)
    common["shape"] = measured_shape(method_of(drafter), batch, overrides)
    ways: dict[str, dict[str, Any]] = {
        "greedy": common | {"do_sample": False},
        "sampled": common | {"do_sample": True, "temperature": temperature, "seed": seed},
    }
    asked = {way: request(model, drafter, prompts, **settings) for way, settings in ways.items()}
    if asked["greedy"].decoder.proposer is None:
        raise RedrafterError("Without drafting there is nothing to measure: beam_length must be at least 1.")
    return {
        way: _measured(asked[way], generate(model, drafter, prompts, on_row=on_row, **ways[way]), batch_size)
        for way in ways
    }


def _measured(asked: Request, written: Generation, batch_size: int) -> list[Measured]:
    """Holds what was written against drafts at every place of it."""
    proposer = asked.decoder.proposer
    assert proposer is not None
    new = written.new_tokens
    texts = answered(asked, new)
    seeds = [row.seed for row in asked.rows]
    verdicts = drafted_everywhere(
        asked.target, proposer, texts, sampler=asked.sampler, seeds=seeds, batch_size=batch_size
    )
    length = proposer.length
    return [
        Measured(len(tokens), _decoded(stats), Acceptance.of(walked(found), length), Acceptance.of(found, length))
        for tokens, stats, found in zip(new, written.stats.rows, verdicts, strict=True)
    ]


def answered(asked: Request, new: list[list[int]]) -> list[Row]:
    """The rows of a call with what was written to them, the new tokens to be learnt."""
    return [
        Row(row.prompt + tokens, [False] * len(row.prompt) + [True] * len(tokens))
        for row, tokens in zip(asked.rows, new, strict=True)
    ]


def _decoded(row: Stats) -> Acceptance:
    """The counts of one row; the prompt's own run drafts nothing."""
    return Acceptance(row.steps - 1, row.drafted, row.accepted, row.accepted_by_position)
