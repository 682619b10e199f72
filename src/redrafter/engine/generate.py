"""`generate` and `stream`: the target's own text, in fewer forward passes.

Guarantees that drafted and undrafted decoding are the same loop over the same step.  The loop reads the device once per
step.  Does not know files, prompts as text or commands.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from redrafter.decoding.settings import CompleteConfig
from redrafter.engine.inputs import check_padding
from redrafter.engine.kept import borrowed
from redrafter.engine.request import Request, request
from redrafter.engine.results import Event, Finished, Generation, Stats, finished
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.engine.text import with_text
from redrafter.errors import RedrafterError
from redrafter.proposers import Drafter
from redrafter.utils.memory import within_memory


def stream(
    model: nn.Module,
    drafter: Drafter | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Decodes a batch and yields one event per row and step.

    `model` is a transformers causal language model, or a wrapper of PEFT or `torch.compile` around one.  `drafter` is a
    `RecurrentDrafter` or another head, a `TwoModel`, a `PromptLookup`, a custom `Method`, or a name: the folder or hub
    id of a head or model, "prompt-lookup", or "auto": the model's own drafter if one lies in its folder or is
    published, else prompt lookup where it is likely to pay.  What a name refers to is loaded once per model.  None, or
    `beam_length=0`, decodes autoregressively.  `input_ids` is a padded tensor or NumPy array [B, P] with its
    `attention_mask`, or a list of unpadded rows of any lengths.  Without `attention_mask`, padding is inferred as in
    `model.generate`: from the padding token, unless it is also an end token.  `settings` are all fields of a
    `GenerationConfig`, and

    - `generation_config`: such a config.  Unset fields come from the model's own config, as in `model.generate`;
    - `beam_width`, `beam_length` (drafted tokens only), `node_budget`: the draft shape.  If all are None, uses the
      tuned shape for the batch size, or the shape that the drafter was trained for;
    - `lookup`: whether continuations found in the text itself (prompt lookup) join the drafts.  By default they do, for
      heads and draft models;
    - `shape`: a complete `DraftShape` instead of these four;
    - `batch_size`: maximum number of rows decoded together (default: all); a waiting row enters a slot that becomes
      free;
    - `seed`: one for each row, or one from which the rows' seeds are derived (default: from torch's generator).  A
      sample depends on the row's seed, the position and the model only, never on the drafter or on other rows;
    - `logits_processor`, `stopping_criteria`: lists of transformers' objects; `prefix_allowed_tokens_fn`;
    - `presence_penalty`, `frequency_penalty`: of the new tokens, as OpenAI defines them; `logit_bias`: numbers by token
      id, which are added to the logits;
    - `logprobs`: number of most likely tokens whose log-probabilities `Event.logprobs` lists beside that of each token;
    - `tokenizer`: adds text to the events; required for `stop_strings`;
    - `fast=False`: PyTorch only, without the optimisations of `docs/speed.md`; the text is the same;
    - `compile=True`: also compiles the target's layers with torch.compile, if the kernels for tree attention run.  The
      first step of a shape then takes seconds, which the logger "redrafter" reports.

    A row finishes with an end token or a stop string (both are kept), by a stopping criterion, after `max_new_tokens`,
    or when the model's context is full.  `docs/settings.md` lists all settings.

    Arguments are checked by this call, not at the first event.  Raises RedrafterError.
    """
    return _stream(_checked(model, drafter, input_ids, attention_mask, **settings))


def describe_backend(model: nn.Module) -> dict[str, str]:
    """How a model's steps run on its device, in words.  Takes a few undrafted steps to find out."""
    checked = request(model, None, [[0]], generation_config=CompleteConfig(max_new_tokens=4))
    with _runner(checked) as runner:
        scheduler = Scheduler(runner)
        scheduler.add(checked.tasks[0])
        while not scheduler.idle:
            scheduler.step()
        return runner.describe()


def generate(
    model: nn.Module,
    drafter: Drafter | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    streamer: BaseStreamer | None = None,
    on_row: Callable[[Finished], object] | None = None,
    **settings: Any,
) -> Generation:
    """Decodes a batch: the text that the model writes alone, in fewer forward passes.

    Arguments as for `stream`.  `streamer` is one of transformers' streamers: it receives the prompts and then one token
    of every row at a time, as from `model.generate`; its `end()` is called after errors too, so that no reader waits
    forever.  `on_row` is called with each row when it finishes.
    """
    begin = time.perf_counter()
    rows: list[Finished] = []
    with ExitStack() as ending:
        if streamer is not None:
            ending.callback(streamer.end)
        checked = _checked(model, drafter, input_ids, attention_mask, **settings)
        events = _stream(checked) if streamer is None else _feeding(streamer, checked)
        for row in finished(events, rows=len(checked.rows), positions=checked.decoder.length):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    rows.sort(key=lambda row: row.row)
    new = [row.new_tokens for row in rows]
    written = [torch.tensor(row.prompt + tokens) for row, tokens in zip(checked.rows, new, strict=True)]
    sequences = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=checked.pad)
    return Generation(
        sequences.to(checked.target.device),
        new,
        [row.finish_reason for row in rows],
        Stats.total([row.stats for row in rows], seconds=time.perf_counter() - begin),
        texts=None if checked.tokenizer is None else [row.text for row in rows],
        scores=[row.scores for row in rows] if checked.output_scores else None,
        logits=[row.logits for row in rows] if checked.output_logits else None,
        logprobs=None if checked.rows[0].logprobs is None else [row.logprobs or [] for row in rows],
    )


def _checked(model: nn.Module, drafter: Any, input_ids: Any, attention_mask: Any, **settings: Any) -> Request:
    checked = request(model, drafter, input_ids, attention_mask, **settings)
    check_padding([row.prompt for row in checked.rows], checked.inferred_padding, input_ids)
    return checked


def _stream(checked: Request) -> Iterator[Event]:
    events = _decoded(checked)
    return events if checked.tokenizer is None else with_text(events, checked.tokenizer)


def _decoded(checked: Request) -> Iterator[Event]:
    """Decodes all rows.  Raises RedrafterError if memory runs out, with the settings to lower."""
    remedy = f"lower batch_size (now {checked.batch}), max_new_tokens or the beams that are drafted"
    device = checked.target.device
    with ExitStack() as stack:
        with within_memory(device, remedy):
            runner = stack.enter_context(_runner(checked))
        scheduler = Scheduler(
            runner, slots=checked.batch, ahead=not checked.output_scores and not checked.output_logits
        )
        for task in checked.tasks:
            scheduler.add(task)
        while not scheduler.idle:
            with within_memory(device, remedy):  # left before each event: the caller may never resume
                outcomes = scheduler.step()
            for _, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome


def _runner(checked: Request) -> AbstractContextManager[Runner]:
    longest = max(len(row.prompt) + row.budget for row in checked.rows)
    return borrowed(
        {1: checked.decoder}, batch=checked.batch, slots=longest, fast=checked.fast, compile=checked.compile
    )


def _feeding(streamer: BaseStreamer, checked: Request) -> Iterator[Event]:
    """Yields the events and passes the prompts [B, P], then the next token of every row [B], to a streamer.

    Finished rows are padded.  Raises RedrafterError if the streamer does not support several rows.
    """
    prompts = [torch.tensor(row.prompt) for row in checked.rows]
    try:
        streamer.put(torch.nn.utils.rnn.pad_sequence(prompts, True, checked.pad, padding_side="left"))
    except ValueError as error:
        raise RedrafterError(f"The streamer refuses {len(prompts)} rows: {error}; use stream() instead.") from error
    tokens: list[deque[int]] = [deque() for _ in prompts]
    active = set(range(len(prompts)))
    for event in _stream(checked):
        tokens[event.row].extend(event.tokens)
        if event.finish_reason is not None:
            active.discard(event.row)
        while any(tokens) and all(tokens[row] for row in active):
            streamer.put(torch.tensor([row.popleft() if row else checked.pad for row in tokens]))
        yield event
