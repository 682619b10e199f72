"""`redrafter check`: compares drafted with undrafted text, on this machine or of servers."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redrafter.evaluation.checking import Divergence
    from redrafter.training.endpoint import Endpoint

SERVER_SETTINGS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""Settings of `--set` that have the same name and meaning in vLLM's API."""


@dataclass(kw_only=True)
class ServerOptions:
    """Servers to compare."""

    PANEL: ClassVar[str] = "Servers"

    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="vLLM server with drafts, instead of --drafter; the key is in OPENAI_API_KEY. Without --against, its "
            "texts are compared with those of --model on this machine.",
        ),
    ] = None
    against: Annotated[
        str | None,
        typer.Option(metavar="URL", help="vLLM server of the same model without drafts, to compare --endpoint with."),
    ] = None
    endpoint_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name at the servers.  \\[default: --model]")
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests to a server.")] = 8
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for an answer of a server.")] = 300.0
    insecure_endpoint: Annotated[
        bool, typer.Option("--insecure-endpoint", help="Allow sending OPENAI_API_KEY unencrypted to another machine.")
    ] = False


@dataclass(kw_only=True)
class CheckOptions(ServerOptions, opt.ShapeOptions, opt.SamplingOptions, opt.LoadingOptions):
    """Options of `redrafter check`."""

    model: opt.Model
    drafter: Annotated[str | None, typer.Option(help=opt.DRAFTER)] = None
    prompts: opt.Prompts
    limit: opt.Limit = None
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 128
    batch_size: opt.BatchSize = 8
    settings: opt.Set = None

    def check(self) -> None:
        """Raises RedrafterError for options that contradict each other or have no effect."""
        if (self.drafter is None) == (self.endpoint is None):
            raise RedrafterError("Give either --drafter or --endpoint.")
        if self.endpoint is None:
            for name in ("against", "endpoint_model"):
                if getattr(self, name) is not None:
                    raise RedrafterError(f"--{name.replace('_', '-')} has no effect without --endpoint: leave it out.")
        elif self.overrides():
            raise RedrafterError("The draft shape is the server's: leave --beam-* and --node-budget out.")


@command("Measure")
def check(options: CheckOptions) -> None:
    """Generate with and without the drafter and compare the texts.

    Exit status 1 if texts differ and rounding does not explain it.  With --endpoint, a vLLM server is compared with
    another one or with the model on this machine, which must be the served model.
    """
    options.check()
    check_model_path(options.model)
    if options.drafter is not None:
        check_drafter_path(options.drafter)
    from redrafter.cli.loading import tokenized_prompts
    from redrafter.data.prompts import read_prompts

    records = read_prompts(*options.prompts, limit=options.limit)
    ids = tokenized_prompts(records, options.model, options.template_kwargs)
    divergences, description = (_compare_here if options.endpoint is None else _compare_servers)(options, ids)
    for one in divergences:
        verdict = "within rounding" if one.explained else "NOT explained by rounding"
        typer.echo(
            f"prompt {one.row + 1}: the texts differ from new token {one.position + 1} on; the two largest logits are "
            f"{one.margin:.3g} apart, rounding explains {one.rounding:.3g}: {verdict}"
        )
    unexplained = sum(not one.explained for one in divergences)
    verdict = "drafting changes nothing"
    if divergences:
        verdict = f"{unexplained} differ beyond rounding" if unexplained else "the others differ within rounding"
    typer.echo(f"{len(ids) - len(divergences)} of {len(ids)} texts equal, {description}: {verdict}.")
    if unexplained:
        raise typer.Exit(1)


def _compare_here(options: CheckOptions, ids: list[list[int]]) -> tuple[Sequence[Divergence], str]:
    """The divergences of drafted from undrafted text of this package, and what was generated."""
    from redrafter.cli.loading import load_drafter, load_model
    from redrafter.cli.parsing import read_settings
    from redrafter.decoding.settings import with_stop_strings
    from redrafter.evaluation.checking import compare
    from redrafter.utils.progress import Progress

    values = opt.values_of(options, opt.ShapeOptions, opt.SamplingOptions)
    sizes = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    settings = read_settings(options.settings, **values, **sizes)
    target, tokenizer = load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)
    assert options.drafter is not None
    drafter = load_drafter(options.drafter, target, any_target=options.any_target)
    settings = with_stop_strings(target, settings, tokenizer)
    with Progress("texts", 2 * len(ids)) as progress:
        report = compare(target, drafter, ids, on_row=progress.advance, **settings)
    return report.divergences, f"{report.tokens} tokens, {report.tokens_per_step:.2f} per step"


def _compare_servers(options: CheckOptions, ids: list[list[int]]) -> tuple[Sequence[Divergence], str]:
    """The divergences of a server's texts from those of another, or of this package; and what was generated."""
    from redrafter.cli.loading import load_model
    from redrafter.engine.generate import generate
    from redrafter.evaluation.checking import compare_texts
    from redrafter.utils.progress import Progress

    settings = _server_settings(options, len(ids))
    local = {**settings, "max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(load_model(options.model, options.dtype, options.device)[0])
        return loaded[0]

    urls = [url for url in (options.endpoint, options.against) if url is not None]
    endpoints = [_endpoint(options, url) for url in urls]
    with Progress("texts", 2 * len(ids)) as progress:
        bodies = _bodies(options, settings, len(ids))
        texts = [_server_texts(one, ids, bodies, options.concurrency, progress.advance) for one in endpoints]
        if options.against is None:
            texts.append(generate(model(), None, ids, on_row=progress.advance, **local).new_tokens)
    divergences = compare_texts(model, ids, texts[1], texts[0], local)
    return divergences, f"{sum(map(len, texts[0]))} tokens"


def _endpoint(options: CheckOptions, url: str) -> Endpoint:
    from redrafter.training.endpoint import Endpoint

    return Endpoint(
        url,
        options.endpoint_model or options.model,
        key=os.environ.get("OPENAI_API_KEY") or None,
        timeout=options.timeout,
        insecure=options.insecure_endpoint,
    )


def _server_settings(options: CheckOptions, rows: int) -> dict[str, Any]:
    """The settings that are sent, under the names that `generate` gives them; if sampled, a seed for each row."""
    from redrafter.cli.parsing import read_settings
    from redrafter.core.noise import row_seeds

    settings = read_settings(options.settings, **opt.values_of(options, opt.SamplingOptions))
    known = (*opt.values_of(options, opt.SamplingOptions), *SERVER_SETTINGS)
    for name in settings:
        if name not in known:
            raise RedrafterError(f"--set {name} is not supported with --endpoint; {', '.join(SERVER_SETTINGS)} are.")
    if settings["do_sample"]:
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
        settings["seed"] = row_seeds(settings.get("seed"), rows)
    return settings


def _bodies(options: CheckOptions, settings: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """The settings of each request, under the names of vLLM's API."""
    shared = {name: value for name, value in settings.items() if name not in ("do_sample", "seed")}
    shared |= {"max_tokens": options.max_new_tokens}
    if not settings["do_sample"]:
        return [shared | {"temperature": 0.0}] * rows
    return [shared | {"seed": seed} for seed in settings["seed"]]


def _server_texts(
    endpoint: Endpoint,
    ids: list[list[int]],
    bodies: list[dict[str, Any]],
    concurrency: int,
    on_row: Callable[[], object],
) -> list[list[int]]:
    """The new tokens after each prompt, of `concurrency` requests at a time."""

    def text(prompt: list[int], body: dict[str, Any]) -> list[int]:
        tokens = endpoint.completion(prompt, body)
        on_row()
        return tokens

    pool = ThreadPoolExecutor(concurrency)
    try:
        return list(pool.map(text, ids, bodies))
    finally:
        pool.shutdown(cancel_futures=True)
        endpoint.client.close()
