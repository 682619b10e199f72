"""`redrafter generate`: text for one prompt or a file of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import (
    Device,
    DoSample,
    Dtype,
    Length,
    MinP,
    Model,
    NewTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
    Width,
)
from redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from redrafter.decoding import Stats


def generate(
    model: Model,
    drafter: Annotated[str | None, typer.Option(help="The drafter: a folder or hub id.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, as plain text.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL rows of `prompt`, `messages` or `turns`.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take plain prompts for the user's turn of a chat.")] = False,
    max_new_tokens: NewTokens = 256,
    beam_width: Width = None,
    beam_length: Length = None,
    do_sample: DoSample = False,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Decode autoregressively, for comparison.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line for every prompt.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Write a model's continuation of prompts, greedy or sampled, drafted unless told otherwise."""
    if (prompt is None) == (prompts is None):
        raise RedrafterError("Give either --prompt or --prompts.")
    if drafter is None and not no_drafter:
        raise RedrafterError("Give a --drafter, or --no-drafter to decode without one.")

    from redrafter.cli.loading import load_drafter, load_model
    from redrafter.decoding import generate as decode
    from redrafter.prompts import conversation, prompt_ids, read_prompts
    from redrafter.sampling import Sampler, row_seeds

    sampler = Sampler(do_sample, temperature, top_k, top_p, min_p)
    records = [("--prompt", {"prompt": prompt})] if prompts is None else read_prompts(prompts)
    if chat:
        records = [
            (where, {"messages": [{"role": "user", "content": record["prompt"]}]} if "prompt" in record else record)
            for where, record in records
        ]
    target, tokenizer = load_model(model, dtype, device)
    head = None if no_drafter or drafter is None else load_drafter(drafter, target)
    ids = [prompt_ids(record, tokenizer, where) for where, record in records]

    seeds = row_seeds(seed, len(ids))

    def batches() -> Iterator[tuple[dict[str, Any], str, str, Stats]]:
        for start in range(0, len(ids), batch_size):
            out = decode(
                target,
                head,
                ids[start : start + batch_size],
                max_new_tokens=max_new_tokens,
                beam_width=beam_width,
                beam_length=beam_length,
                seed=seeds[start : start + batch_size] if do_sample or seed is not None else None,
                **asdict(sampler),
            )
            for row, (new, reason) in enumerate(zip(out.new_tokens, out.finish_reasons, strict=True)):
                where, record = records[start + row]
                text = tokenizer.decode(new, skip_special_tokens=True)
                if "prompt" not in record:  # what is written can be trained on as it is
                    answer = {"role": "assistant", "content": text}
                    record = {**record, "messages": [*conversation(record, where), answer]}
                yield record, text, reason, out.stats.rows[row]

    begin, total = time.perf_counter(), [0, 0]
    for record, text, reason, stats in batches():
        total = [total[0] + stats.tokens, total[1] + stats.steps]
        if not as_json:
            typer.echo(text)
            continue
        typer.echo(
            json.dumps(
                {
                    **record,
                    "text": text,
                    "finish_reason": reason,
                    "tokens": stats.tokens,
                    "steps": stats.steps,
                    "tokens_per_step": round(stats.tokens_per_step, 4),
                    "drafted": stats.drafted,
                    "accepted": stats.accepted,
                    "accepted_by_position": stats.accepted_by_position,
                    "seconds": round(stats.seconds, 4),
                },
                ensure_ascii=False,
            )
        )
    seconds = time.perf_counter() - begin
    typer.echo(
        f"{total[0]} tokens, {total[0] / max(1, total[1]):.2f} per step, {seconds:.1f} s, "
        f"{total[0] / seconds:.0f} tokens/s",
        err=True,
    )
