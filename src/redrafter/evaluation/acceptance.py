"""Acceptance of drafts, counted as vLLM does: in real decoding, and teacher-forced at every position of a text.

Teacher-forced: one run of the target over a text gives its hidden states, so a draft can be made at every position and
compared with the tokens that follow.  Following these results as decoding does, from each draft to the position after
its accepted tokens and one more, gives the counts of decoding, up to rounding.  Does not know files or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from redrafter.core.cache import SlotCache
from redrafter.core.rows import PromptChunk, RowState
from redrafter.core.shapes import ShapeOverrides
from redrafter.data.examples import Row, collate
from redrafter.decoding import state as decoding
from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
from redrafter.decoding.verify import walk
from redrafter.engine.generate import generate
from redrafter.engine.request import Request, request
from redrafter.engine.results import Finished, Generation, Stats
from redrafter.errors import RedrafterError
from redrafter.evaluation.windows import context_at, windows
from redrafter.proposers import Drafter, Proposer, method_of
from redrafter.proposers.base import measured_shape
from redrafter.targets.structure import unwrapped
from redrafter.targets.target import Target

MAX_WINDOWS = 512
"""Windows that are drafted at a time."""

MAX_SCORES = 2**24
"""Scores of one beam over the target's vocabulary that exist at a time: 64 MB in float32."""

MAX_MEMORY_BYTES = 2**28
"""Approximate bytes of proposers' caches, copied for each window, that exist at a time."""

GREEDY = decoding.Row(0, [0], seed=0, budget=1)


@dataclass(frozen=True)
class Acceptance:
    """Counts of drafts.

    A drafted token is accepted if it is in the text.  If a text, or its trained part, ends before a draft does, the
    rest of the draft counts as drafted and not accepted, as in decoding.
    """

    drafts: int
    draft_tokens: int
    """Nodes of all trees without the roots."""
    accepted: int
    by_position: list[int]
    """Drafts whose first, second, … token was accepted."""

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts: tokens per step, including the target's own token."""
        return 1 + self.accepted / max(1, self.drafts)

    @property
    def rates(self) -> list[float]:
        """Fraction of all drafts that was accepted at each position."""
        return [count / max(1, self.drafts) for count in self.by_position]

    @classmethod
    def of(cls, verdicts: Int[Tensor, "M 2"], length: int) -> Acceptance:
        """Sums accepted and drafted tokens of M drafts of depth `length`."""
        accepted, drafted = verdicts.unbind(1)
        by_position = [int((accepted > position).sum()) for position in range(length)]
        return cls(len(verdicts), int(drafted.sum()), int(accepted.sum()), by_position)

    @classmethod
    def total(cls, parts: list[Acceptance]) -> Acceptance:
        """The sum over parts of the same depth."""
        return cls(
            drafts=sum(part.drafts for part in parts),
            draft_tokens=sum(part.draft_tokens for part in parts),
            accepted=sum(part.accepted for part in parts),
            by_position=[sum(counts) for counts in zip(*(part.by_position for part in parts), strict=True)],
        )


@dataclass(frozen=True)
class Measured:
    """One or more generated texts, with drafts counted in three ways."""

    tokens: int
    """New tokens."""
    decoding: Acceptance
    """Counts of decoding."""
    walked: Acceptance
    """The same from teacher-forced drafts; differs by rounding only."""
    teacher_forced: Acceptance
    """At every position of the texts."""

    @classmethod
    def total(cls, parts: list[Measured]) -> Measured:
        """The sum over texts."""
        counts = zip(*((part.decoding, part.walked, part.teacher_forced) for part in parts), strict=True)
        return cls(sum(part.tokens for part in parts), *(Acceptance.total(list(each)) for each in counts))


def acceptance(
    target: Target,
    proposer: Proposer,
    rows: Iterable[Row],
    *,
    sampled_as: decoding.Row = GREEDY,
    seeds: list[int] | None = None,
    batch_size: int = 8,
    chunk: int | None = None,
) -> Acceptance:
    """Teacher-forced acceptance of drafts at every window of the rows (`evaluation.windows`, as in training).

    A draft follows the guaranteed token t+1, and its position i is accepted if t+2 … t+1+i are trained tokens and
    drafted on one path.  Rows with continuations are compared with those.  The sampling settings of `sampled_as` and
    the rows' `seeds` give a proposer the noise of decoding.  `batch_size`: rows per run of the target; `chunk`: windows
    drafted at a time (default: as MAX_WINDOWS and MAX_SCORES allow).
    """
    verdicts = drafted_everywhere(
        target, proposer, list(rows), sampled_as=sampled_as, seeds=seeds, batch_size=batch_size, chunk=chunk
    )
    return Acceptance.of(torch.cat([torch.zeros((0, 2), dtype=torch.long), *verdicts]), proposer.length)


@torch.no_grad()  # not inference mode: a training run continues with tensors that are cached here
def drafted_everywhere(
    target: Target,
    proposer: Proposer,
    rows: list[Row],
    *,
    sampled_as: decoding.Row = GREEDY,
    seeds: list[int] | None = None,
    batch_size: int = 8,
    chunk: int | None = None,
    from_start: bool = False,
) -> list[Tensor]:
    """Accepted and drafted tokens at every window, [M, 2] for each row, by position; arguments as for `acceptance`.

    `from_start`: see `evaluation.windows`.
    """
    chunk = chunk or min(MAX_WINDOWS, max(1, MAX_SCORES // target.vocab_size))
    verdicts: list[Tensor] = []
    length = proposer.length
    for batch in window_batches(target, rows, length=length, batch_size=batch_size, from_start=from_start):
        ids, hidden = batch.ids, batch.hidden
        seed = torch.tensor((seeds or [0] * len(rows))[len(verdicts) :][: len(ids)], device=ids.device)
        parts = [torch.zeros((0, 2), dtype=torch.long, device=ids.device)]
        if hidden is not None:
            ids = pad(ids, (0, proposer.length + proposer.size))  # as many slots as in decoding
            memory = _read_rows(proposer, ids, hidden)
            size = chunk if memory is None else min(chunk, max(1, MAX_MEMORY_BYTES // memory.row_bytes))
            for row, t, tokens, wanted in batch.chunks(size):
                context = context_at(hidden, row, t, proposer.positions).unflatten(1, (proposer.positions, -1))
                texts = ids[row].scatter(1, t[:, None] + 1, tokens[:, :1])  # a continuation has another token there
                settings = decoding.settings_of(
                    sampled_as, count=len(row), vocabulary=target.vocab_size, device=ids.device
                )
                alive = torch.ones_like(row)
                state = RowState(row, seed[row], texts, length=t + 1, alive=alive, settings=settings)
                own = None if memory is None else memory.of_rows(row)
                parts.append(_verdicts(target, proposer, sampled_as, own, state, context, tokens, wanted))
        verdicts += torch.cat(parts).cpu().split(batch.row.bincount(minlength=len(ids)).tolist())
    return verdicts


class WindowBatch(NamedTuple):
    """All windows of some rows (`evaluation.windows`), and the target's states along the rows."""

    ids: Int[Tensor, "B P"]
    hidden: Float[Tensor, "B P1 state"] | None
    """Of all positions but the last, where no draft begins; None if there is no window."""
    row: Int[Tensor, " M"]
    position: Int[Tensor, " M"]
    tokens: Int[Tensor, "M length1"]
    wanted: Bool[Tensor, "M length"]

    def chunks(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """`row`, `position`, `tokens` and `wanted` of `size` windows at a time."""
        yield from zip(*(part.split(size) for part in self[2:]), strict=True)


def window_batches(
    target: Target, rows: list[Row], *, length: int, batch_size: int, from_start: bool = False
) -> Iterator[WindowBatch]:
    """The windows for drafts of `length` tokens, `batch_size` rows at a time.  `from_start`: see `windows`."""
    for begin in range(0, len(rows), batch_size):
        collated = collate(rows[begin : begin + batch_size])
        batch = {name: value.to(target.device) for name, value in collated.items()}
        ids = batch["input_ids"]
        if from_start:  # a collated batch has no first token to learn
            batch["trained"][:, 0] = torch.tensor([row.trained[0] for row in rows[begin : begin + batch_size]])
        continuations = batch.get("continuations")
        found = windows(ids, batch["trained"], length=length, continuations=continuations, from_start=from_start)
        hidden = target.hidden_states(ids[:, :-1], batch["segments"][:, :-1]) if len(found[0]) else None
        yield WindowBatch(ids, hidden, *found)


def _read_rows(proposer: Proposer, ids: Int[Tensor, "B slots"], hidden: Float[Tensor, "B P state"]) -> SlotCache | None:
    """The proposer's cache after reading complete rows; a draft at any position uses only the tokens before it."""
    memory, count = proposer.memory(batch=len(ids), slots=ids.shape[1]), hidden.shape[1]
    rows = torch.arange(len(ids), device=ids.device)
    chunk = PromptChunk(ids[:, :count], ids[:, 1 : count + 1], torch.zeros_like(rows), rows, from_start=True)
    proposer.read(memory, chunk, hidden)
    return memory


def _verdicts(
    target: Target,
    proposer: Proposer,
    sampled_as: decoding.Row,
    memory: SlotCache | None,
    state: RowState,
    context: Float[Tensor, "C positions state"],
    tokens: Int[Tensor, "C length1"],
    wanted: Bool[Tensor, "C length"],
) -> Int[Tensor, "C 2"]:
    """Accepted and drafted tokens of one draft per window; `tokens` are the root and the `wanted` ones that follow."""
    sampler = decoding.sampler_of({0: sampled_as})
    noise = sampler.noise(state, depths=proposer.length + 1, vocabulary=target.vocab_size)
    tree = proposer.propose(memory, state, context, noise)
    following = tokens[:, 1:].masked_fill(~wanted, -1)
    following = pad(following, (0, 1), value=-1)  # nothing follows the deepest nodes
    _, accepted = walk(tree, following.gather(1, tree.depth), length=proposer.length)
    return torch.stack((accepted, tree.valid.sum(dim=1) - 1), dim=1)


def walked(verdicts: Int[Tensor, "M 2"]) -> Int[Tensor, "D 2"]:
    """The results of a row at which decoding would draft: the first, then after the accepted tokens and one more."""
    indices, index = [], 0
    accepted = verdicts[:, 0].tolist()
    while index < len(accepted):
        indices.append(index)
        index += accepted[index] + 1
    return verdicts[torch.tensor(indices, dtype=torch.long)]


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
    lookup: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_row: Callable[[Finished], object] | None = None,
) -> dict[str, list[Measured]]:
    """Generates from every prompt, `greedy` and `sampled`, and counts drafts; one entry per prompt.

    `on_row` is called with each finished text, two per prompt.  Other settings are the model's own, as in `generate`;
    stop strings need the `tokenizer`.  Raises RedrafterError for invalid prompts and settings.
    """
    common: dict[str, Any] = ONE_TEXT | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if tokenizer is not None:
        common = with_stop_strings(unwrapped(model), common, tokenizer)
    batch = min(batch_size, len(prompts))
    overrides = ShapeOverrides(beam_width, beam_length, node_budget, lookup)
    common["shape"] = measured_shape(method_of(drafter), batch, overrides)
    modes: dict[str, dict[str, Any]] = {
        "greedy": common | {"do_sample": False},
        "sampled": common | {"do_sample": True, "temperature": temperature, "seed": seed},
    }
    requests = {mode: request(model, drafter, prompts, **settings) for mode, settings in modes.items()}
    if requests["greedy"].decoder.proposer is None:
        raise RedrafterError("Acceptance cannot be measured without drafting: beam_length must be at least 1.")
    return {
        mode: _measure(requests[mode], generate(model, drafter, prompts, on_row=on_row, **settings), batch_size)
        for mode, settings in modes.items()
    }


def _measure(request: Request, generation: Generation, batch_size: int) -> list[Measured]:
    """Compares generated texts with drafts at every position."""
    proposer, new, seeds = request.decoder.proposer, generation.new_tokens, [row.seed for row in request.rows]
    assert proposer is not None
    length, rows = proposer.length, answered(request, new)
    verdicts = drafted_everywhere(
        request.target,
        proposer,
        rows,
        sampled_as=request.rows[0],
        seeds=seeds,
        batch_size=batch_size,
        from_start=True,
    )
    return [
        Measured(len(tokens), _decoded(stats), Acceptance.of(walked(own), length), Acceptance.of(own, length))
        for tokens, stats, own in zip(new, generation.stats.rows, verdicts, strict=True)
    ]


def answered(request: Request, new: list[list[int]]) -> list[Row]:
    """The rows of a request with their new tokens, which are marked as trained, as is the token that they follow."""
    return [
        Row(row.prompt + tokens, [False] * (len(row.prompt) - 1) + [True] * (1 + len(tokens)))
        for row, tokens in zip(request.rows, new, strict=True)
    ]


def _decoded(row: Stats) -> Acceptance:
    """The counts of one row."""
    return Acceptance(row.steps, row.drafted, row.accepted, row.accepted_by_position)
