"""`redrafter serve`: an HTTP server with OpenAI's API."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import AUTO, check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.core.shapes import DraftShape
    from redrafter.engine.engine import Engine
    from redrafter.proposers import Drafter
    from redrafter.server.service import ServerSettings

API_KEY = "REDRAFTER_API_KEY"
"""Environment variable with the API key."""


@dataclass(kw_only=True)
class HttpOptions:
    """Where and to whom the server answers."""

    PANEL: ClassVar[str] = "HTTP"

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests.  \\[default: the Hub id, or the folder's name]"),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"Key that clients must send.  Prefer the environment variable {API_KEY}, which other users of the "
            "machine cannot see."
        ),
    ] = None
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of a request's body.")] = 8 * 2**20
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin whose pages may call the server from a browser (CORS)."),
    ] = None


@dataclass(kw_only=True)
class ServeOptions(opt.ShapeOptions, HttpOptions, opt.LoadingOptions):
    """Options of `redrafter serve`."""

    model: Annotated[str | None, typer.Option(help=opt.MODEL)] = None
    drafter: Annotated[str | None, typer.Option(help=f"{opt.DRAFTER}  \\[default: auto]")] = None
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Serve without drafting.")] = False
    demo: Annotated[bool, typer.Option("--demo", help="Serve the bundled model with its drafter.")] = False
    slots: Annotated[int, typer.Option(min=1, help="Number of requests decoded together.")] = 32
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum number of tokens per request, prompt included.  \\[default: what model and memory allow]",
        ),
    ] = None
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Number of requests that may wait for a slot; others are answered with 429.")
    ] = 256
    fast: opt.Fast = True
    compile: opt.Compile = False

    def paths(self) -> tuple[str, str | None]:
        """The model and its drafter.  Raises RedrafterError for options that do not go together."""
        from redrafter.cli.loading import demo_folder

        if self.demo == (self.model is not None):
            raise RedrafterError("Give either --model or --demo.")
        if self.demo and self.drafter is not None:
            raise RedrafterError("--demo has its own drafter: leave --drafter out.")
        model = str(demo_folder() / "redrafter-demo-12m") if self.model is None else self.model
        drafter: str | None = str(demo_folder() / "drafter") if self.demo else self.drafter or AUTO
        if self.no_drafter:
            drafter = None
        if drafter is None and self.overrides():
            raise RedrafterError("--beam-width, --beam-length and --node-budget need a drafter.")
        check_model_path(model)
        check_drafter_path(drafter)
        return model, drafter

    def server_settings(self, model: str) -> ServerSettings:
        """How the server answers."""
        from redrafter.server.service import ServerSettings

        own_name = Path(model).resolve().name if Path(model).is_dir() else model
        return ServerSettings(
            model_name=self.served_model_name or own_name,
            api_key=self.api_key or os.environ.get(API_KEY) or None,
            max_body_bytes=self.max_body_bytes,
            max_answers=self.max_waiting,
            allowed_origins=self.allow_origin or (),
        )


@command("Generate text")
def serve(options: ServeOptions) -> None:
    """Serve a model over HTTP with OpenAI's API, with a drafter or without.

    SIGTERM or Ctrl-C lets requests in progress finish, then ends the server; a second signal ends it at once.
    """
    _check_packages()
    model_path, drafter_path = options.paths()
    from redrafter.cli.loading import load_drafter, load_model, show_log
    from redrafter.engine.engine import Engine
    from redrafter.server.lifecycle import DrainingServer, bind, url_of
    from redrafter.server.service import Service

    with bind(options.host, options.port) as bound:  # before the model, so that a used port is reported at once
        show_log()
        settings = options.server_settings(model_path)
        model, tokenizer = load_model(model_path, options.dtype, options.device, dequantize=options.dequantize)
        drafter = None
        if drafter_path is not None:
            drafter = load_drafter(drafter_path, model, any_target=options.any_target)
        engine = Engine(
            model,
            drafter,
            tokenizer=tokenizer,
            slots=options.slots,
            max_length=options.max_length,
            max_waiting=options.max_waiting,
            shape=_shape(options, drafter),
            lookup=options.lookup,
            fast=options.fast,
            compile=options.compile,
        )
        described = {"model": model_path, "drafter": drafter_path or "none"} | _description(engine)
        chats = bool(tokenizer.chat_template)
        server = DrainingServer(
            Service(engine, tokenizer, settings),
            on_ready=lambda: _print_start(described, url_of(bound), settings, chats=chats),
        )
        # A full garbage collection would visit all that was loaded and stop every request for about 0.25 s.
        gc.collect()
        gc.freeze()
        server.serve_on(bound)  # after a second signal the engine is closed by it, or hangs
        engine.close()


def _check_packages() -> None:
    """Raises RedrafterError if a package of the extra `server` is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RedrafterError(f"serve needs {error.name}: run pip install 'redrafter[server]'.") from None


def _shape(options: ServeOptions, drafter: Drafter | None) -> DraftShape | None:
    """The draft shape that the user set; None leaves it to the engine."""
    from redrafter.proposers import method_of
    from redrafter.proposers.base import resolved_shape

    overrides = options.overrides()
    if drafter is None or not overrides:
        return None  # `lookup` alone leaves the shape to the load
    return resolved_shape(method_of(drafter), options.slots, overrides)


def _description(engine: Engine) -> dict[str, str]:
    """What is loaded and how it runs."""
    import psutil

    memory = psutil.Process().memory_info().rss / 2**30
    return {
        "slots": f"{engine.slots} requests decoded together",
        "max length": f"{engine.max_length:,} tokens per request, prompt included",
        "process memory": f"{memory:.2f} GiB",
        **engine.describe(),
    }


def _print_start(described: dict[str, str], url: str, settings: ServerSettings, *, chats: bool) -> None:
    """Prints what is served, where, and an example request, on stderr."""
    from rich.console import Console

    from redrafter.cli.tables import description

    console = Console(stderr=True, highlight=False)
    console.print(description(described))
    console.print(f"Serving [bold]{settings.model_name}[/bold] at {url}.  Try:\n")
    console.print(_example(url, settings, chats=chats), markup=False, soft_wrap=True)


def _example(url: str, settings: ServerSettings, *, chats: bool) -> str:
    """A curl command."""
    body: dict[str, Any] = {"model": settings.model_name, "max_tokens": 64}
    body |= {"messages": [{"role": "user", "content": "Hello!"}]} if chats else {"prompt": "Once upon a time"}
    path = "/v1/chat/completions" if chats else "/v1/completions"
    key = "" if settings.api_key is None else f' -H "Authorization: Bearer ${API_KEY}"'
    data = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {url}{path}{key} -H 'Content-Type: application/json' -d '{data}'"
