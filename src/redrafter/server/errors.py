"""Errors as OpenAI's API reports them: `{"error": {"message", "type", "param", "code"}}` with an HTTP status.

Guarantees that every error response of the server has this form, and that a request that is not valid is answered with
400 and one sentence (FastAPI's own status 422 is not used).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from redrafter.engine.engine import EngineClosed, EngineFull
from redrafter.errors import RedrafterError

log = logging.getLogger("redrafter.server")

RETRY_SECONDS = 1
"""Seconds after which a client may try again if the server is full."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""Error types by status; others are "invalid_request_error"."""


class ErrorDetail(BaseModel):
    """What is wrong; `param` is the field, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error response."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with the status of its response.  `message` is one sentence; `param` and `code` as in `ErrorDetail`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _TYPES.get(status, "invalid_request_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        """The response to send."""
        return JSONResponse(self.body.model_dump(), self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """The error to report for an exception; one of the package itself tells the client no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFull):
        return ApiError(429, str(error), code="engine_full", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, RedrafterError):
        return ApiError(400, str(error))
    return ApiError(500, "The server failed to process the request; its log has the details.")


def install_handlers(app: FastAPI) -> None:
    """Makes the application report all errors in OpenAI's form."""

    async def report(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def report_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()).response()

    async def report_status(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = error.detail
        if error.status_code == 400:  # raised by FastAPI: bytes that are not UTF-8, or too deep nesting
            message = "The body is not valid JSON."
        if error.status_code in (404, 405):
            phrase = HTTPStatus(error.status_code).phrase
            message = f"{request.method} {request.url.path}: {phrase.lower()}; /openapi.json lists what exists."
        return ApiError(error.status_code, message, headers=error.headers).response()

    for kind in (ApiError, RedrafterError, Exception):
        app.add_exception_handler(kind, report)
    app.add_exception_handler(RequestValidationError, report_invalid)
    app.add_exception_handler(HTTPException, report_status)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """One sentence about the first error that pydantic found; unsupported fields come first."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON ({first['ctx']['error']}).")
    where = _field(first["loc"][1:])
    if not where and first["type"] == "value_error":  # of the request as a whole
        return ApiError(400, f"{_message(first)}.")
    if not where:
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    return ApiError(400, _sentence(where, first), param=where)


def _field(location: Sequence[int | str]) -> str:
    """The name of a field, such as `messages[0].content`."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in location).lstrip(".")


def _sentence(where: str, error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"{where} is not supported: leave it out."
    if error["type"] == "missing":
        return f"{where} is missing."
    message = _message(error)
    return f"{where} {message[0].lower()}{message[1:]}."


def _message(error: Mapping[str, Any]) -> str:
    message: str = error["msg"].removeprefix("Value error, ").rstrip(".")
    return message.replace("Input should be", "must be").replace(" should have", " must have")
