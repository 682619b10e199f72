"""Client for an OpenAI-compatible server.

Guarantees that temporary failures are retried, that permanent ones raise one clear sentence, and that the key is sent
to the given server only and never unencrypted without permission.  Does not know rows of data.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from redrafter.data.messages import Message
from redrafter.errors import RedrafterError

T = TypeVar("T")

ATTEMPTS = 6
"""Maximum number of times that a request is sent."""

PAUSE = 1.0
"""Seconds before the second attempt; doubles before each later one, unless the server sends Retry-After."""

MAX_PAUSE = 60.0
"""Maximum number of seconds between attempts."""

TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses after which a request is sent again."""

BAD_PROMPT = {400, 413, 422}
"""HTTP statuses that concern one prompt only."""

HEADERS = {"Accept": "application/json", "User-Agent": "redrafter"}


class BadPrompt(RedrafterError):
    """The server rejects this prompt; others may succeed."""


class TemporaryError(Exception):
    """A failure worth another attempt; `pause` is the number of seconds in Retry-After, or None."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    requested = error.pause if isinstance(error, TemporaryError) else None
    return wait_exponential(PAUSE, MAX_PAUSE)(state) if requested is None else min(requested, MAX_PAUSE)


@dataclass(frozen=True)
class Endpoint:
    """A server at `url`, the base of its paths (`/v1` is added if it has no path), and the name of a model there.

    `key` is sent as a bearer token; `timeout` is in seconds for one answer.  Raises RedrafterError for an invalid
    `url`, and if `key` would be sent unencrypted to another machine, unless `insecure` is set.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 300.0
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise RedrafterError(f"The endpoint must be a URL such as http://localhost:8000/v1, not {self.url}.")
        if self.key and url.scheme == "http" and not is_loopback(url.host) and not self.insecure:
            raise RedrafterError(
                f"OPENAI_API_KEY would be sent unencrypted to {url.host}: use https, unset it, or pass "
                "--insecure-endpoint."
            )
        base = self.url.rstrip("/")
        object.__setattr__(self, "url", base if url.path.strip("/") else f"{base}/v1")

    @cached_property
    def client(self) -> httpx.Client:
        """The HTTP client.  Does not follow redirects, and uses no proxy for this machine: both could leak the key."""
        headers = HEADERS | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            return httpx.Client(
                headers=headers,
                timeout=self.timeout,
                limits=httpx.Limits(max_connections=None),
                verify=ssl.create_default_context(),  # the system's certificates
                trust_env=not is_loopback(httpx.URL(self.url).host),
            )
        except (ValueError, ImportError) as error:  # of a proxy that httpx does not support
            raise RedrafterError(f"The proxy settings of the environment cannot be used: {error}") from None

    def answer(self, prompt: str | list[Message], settings: dict[str, Any]) -> tuple[str | Message, str, int]:
        """The answer to a plain prompt or to messages, the server's finish reason, and the number of tokens.

        The answer is a text, or a message if the server sends reasoning or tool calls.  `settings` are added to the
        request.  Raises BadPrompt if the server rejects this prompt, RedrafterError if it fails for good.
        """
        plain = isinstance(prompt, str)
        path, name = ("completions", "prompt") if plain else ("chat/completions", "messages")
        body = {"model": self.model, name: prompt, **settings}
        return self._retried(lambda: _parse(self.post(path, body), plain=plain))

    def completion(self, prompt: list[int], settings: dict[str, Any]) -> list[int]:
        """The new tokens after a prompt of token ids.  Raises RedrafterError as `answer` does.

        Needs a server with vLLM's extension `return_token_ids`; raises RedrafterError for others.
        """
        body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **settings}
        choice = self._retried(lambda: _first_choice(self.post("completions", body)))
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise RedrafterError(f"{self.url} returns no token ids (return_token_ids), which vLLM's server does.")
        return tokens

    def _retried(self, call: Callable[[], T]) -> T:
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS), wait=_pause, retry=retry_if_exception_type(TemporaryError), reraise=True
        )
        try:
            return retrying(call)
        except TemporaryError as error:
            raise RedrafterError(f"{self.url} failed {ATTEMPTS} times, the last time because {error}.") from None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Sends one request and returns the JSON of the response.  Raises TemporaryError if it may be repeated."""
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        try:
            with self.client.stream("POST", f"{self.url}/{path}", json=body) as response:
                if not response.is_success:
                    raise self._error(response)
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:  # the client's timeout is for each chunk
                        raise httpx.ReadTimeout("")
            return json.loads(content)
        except httpx.TimeoutException:
            raise TemporaryError(f"no answer arrived within {self.timeout:g} s") from None
        except httpx.RemoteProtocolError:
            raise TemporaryError("the connection was closed in the middle of an answer") from None
        except httpx.HTTPError as error:
            raise TemporaryError(str(error) or type(error).__name__) from None
        except ValueError as error:
            if isinstance(error, RedrafterError):
                raise
            raise TemporaryError("its answer is not JSON") from None

    def _error(self, response: httpx.Response) -> Exception:
        """The exception for a response that is not successful."""
        text = b""
        with contextlib.suppress(httpx.HTTPError):
            for chunk in response.iter_bytes(2000):
                text = chunk
                break
        detail = " ".join(text.decode("utf-8", errors="replace").split())[:200]
        sentence = f"it answers {response.status_code} {response.reason_phrase}" + (f" ({detail})" if detail else "")
        if response.status_code in TEMPORARY:
            pause = None
            with contextlib.suppress(ValueError):
                pause = max(0.0, float(response.headers.get("Retry-After", "")))
            return TemporaryError(sentence, pause)
        kind = BadPrompt if response.status_code in BAD_PROMPT else RedrafterError
        return kind(f"{self.url}: {sentence}.")


def _first_choice(body: Any) -> dict[str, Any]:
    with contextlib.suppress(LookupError, TypeError):
        choice = body["choices"][0]
        if isinstance(choice, dict):
            return choice
    raise TemporaryError("its answer holds no text")


def _parse(body: Any, *, plain: bool) -> tuple[str | Message, str, int]:
    try:
        choice = body["choices"][0]
        fields = {"content": choice["text"]} if plain else choice["message"]
        tokens = (body.get("usage") or {}).get("completion_tokens") or 0
        message: Message = {"role": "assistant"}
        for name in ("reasoning_content", "reasoning", "content", "tool_calls"):
            if fields.get(name) is not None:
                message[name] = fields[name]
        for call in message.get("tool_calls", []):  # chat templates expect objects, the protocol has JSON text
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        content = message.get("content")
        if (isinstance(content, str) or message.get("tool_calls")) and isinstance(tokens, int):
            answer: str | Message = message if content is None or len(message) > 2 else content
            return answer, str(choice.get("finish_reason")), tokens
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    raise TemporaryError("its answer holds no text")
