"""The application: routes, authentication and limits."""

from __future__ import annotations

import secrets
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redrafter import __version__
from redrafter.server.errors import ApiError, ErrorBody, install_handlers
from redrafter.server.protocol import ChatRequest, CompletionRequest
from redrafter.server.responses import ChatCompletion, Completion, Health, Model, ModelList
from redrafter.server.service import Service

_PAGE = (files("redrafter.server") / "static" / "index.html").read_bytes()
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
}
"""The page may call this server only, and no other page may contain it."""

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a server."""
    # no pages of FastAPI, which load scripts from other hosts
    app = FastAPI(title="redrafter", version=__version__, responses=_ERRORS, docs_url=None, redoc_url=None)
    install_handlers(app)
    _add_completions(app, service)
    _add_information(app, service)
    settings = service.settings
    app.add_middleware(Guard, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True)
    async def chat(body: ChatRequest, request: Request) -> object:
        """Answers a chat; with `stream`, as server-sent events."""
        return await service.respond(body, request)

    @app.post("/v1/completions", response_model=Completion, response_model_exclude_unset=True)
    async def complete(body: CompletionRequest, request: Request) -> object:
        """Continues one or several prompts; with `stream`, as server-sent events."""
        return await service.respond(body, request)


def _add_information(app: FastAPI, service: Service) -> None:
    name = service.settings.model_name
    model = Model(id=name, object="model", created=service.created, max_model_len=service.engine.max_length)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page for trying the model."""
        return Response(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The served model, by its name."""
        service.check_model(name)
        return model

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the server accepts requests."""
        if service.draining or not service.engine.alive:
            response.status_code = 503
            return Health(status="draining" if service.engine.alive else "dead")
        return Health(status="ok")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


class Guard:
    """Checks the API key under `/v1` and the size of the body, before the body is read or while it is."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int):
        self._app, self._limit = app, max_body_bytes
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with an error, or passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._is_unauthorized(scope["path"], headers):
            error = ApiError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            await ApiError(413, self._too_large()).response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _is_unauthorized(self, path: str, headers: Headers) -> bool:
        if self._expected is None or not path.startswith("/v1"):
            return False
        given = headers.get("authorization", "").encode("latin-1")
        return not secrets.compare_digest(given, self._expected)

    def _limited(self, receive: Receive) -> Receive:
        """Raises an HTTPException for a body without a length that is too long."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"The body exceeds the server's limit of {self._limit:,} bytes."
