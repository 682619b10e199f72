"""Answers of a target that is served elsewhere, by the protocol that OpenAI made common.

Promises several requests at a time, patience with a server that fails now and then, and one sentence where it fails
for good.  Token ids are not known here, so rows hold text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

from redrafter.data.files import Skip
from redrafter.data.messages import Message
from redrafter.errors import RedrafterError
from redrafter.training.answers import Law, Plan, plan
from redrafter.training.distillation import Done, Prompt, Tally, named

ATTEMPTS = 6
"""Times that a request is sent at most."""

PAUSE = 1.0
"""Seconds before the second time; twice as many before each later one, or as many as the server asks for."""

LONGEST_PAUSE = 60.0

LOOK_AHEAD = 64
"""Prompts, for each request at a time, that are begun after the oldest one without an answer."""

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses that may pass."""

_BAD_PROMPT = {400, 413, 422}
"""Statuses that are about the one prompt."""


class BadPrompt(RedrafterError):
    """The server takes no such prompt; others may do."""


class _Failed(Exception):
    """What may pass; `pause` is what the server asks for, in seconds."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _Unredirected(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: the key is for the server that was named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_opener = urllib.request.build_opener(_Unredirected)
_direct = urllib.request.build_opener(_Unredirected, urllib.request.ProxyHandler({}))
"""For this machine itself: what is sent there must not go through a proxy elsewhere."""


def is_loopback(host: str | None) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Endpoint:
    """A server at `url`, the base of its paths (`/v1` where it has no path), and the name of a model there.

    `key` is sent as a bearer token, `timeout` is in seconds for one answer.  Raises RedrafterError for a bad `url`, and
    if `key` would be sent unencrypted to another machine, unless `insecure` allows that.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 300.0
    insecure: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RedrafterError(f"The endpoint must be a URL such as http://localhost:8000/v1, not {self.url}.")
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname) and not self.insecure:
            raise RedrafterError(
                f"OPENAI_API_KEY would be sent unencrypted to {parts.hostname}: use https, unset it, or pass "
                "--insecure-endpoint."
            )
        base = self.url.rstrip("/")
        object.__setattr__(self, "url", base if parts.path.strip("/") else f"{base}/v1")

    def answer(self, asked: str | list[Message], settings: dict[str, Any]) -> tuple[str | Message, str, int]:
        """The answer to a plain prompt or messages, why it ends (the server's word), and how many tokens it has.

        The answer is a text, or a message where the server gives reasoning apart or tool calls.

        `settings` join the body.  Raises BadPrompt where the server refuses this prompt, RedrafterError where it fails.
        """
        path, prompt = ("completions", "prompt") if isinstance(asked, str) else ("chat/completions", "messages")
        body = {"model": self.model, prompt: asked, **settings}
        for attempt in range(ATTEMPTS):
            try:
                return _read(self._post(path, body), plain=isinstance(asked, str))
            except _Failed as failed:
                last = failed
            if attempt + 1 < ATTEMPTS:
                pause = PAUSE * 2**attempt if last.pause is None else last.pause
                time.sleep(min(pause, LONGEST_PAUSE))
        raise RedrafterError(f"{self.url} failed {ATTEMPTS} times, the last time so: {last}.")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers, as JSON."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "redrafter"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout
        try:
            opener = _direct if is_loopback(urlsplit(self.url).hostname) else _opener
            with opener.open(request, timeout=self.timeout) as response:
                pieces = []
                while piece := response.read1(2**16):
                    pieces.append(piece)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                if response.length:  # what was promised did not come
                    raise _Failed("it broke off in the middle of an answer")
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
        except TimeoutError:
            raise _Failed(f"no answer within {self.timeout:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Failed(f"no answer within {self.timeout:g} s") from None
            raise _Failed(str(reason) or type(reason).__name__) from None
        try:
            return json.loads(b"".join(pieces))
        except ValueError:
            raise _Failed("its answer is not JSON") from None

    def _refuse(self, error: urllib.error.HTTPError) -> NoReturn:
        try:
            said = " ".join(error.read(2000).decode("utf-8", errors="replace").split())[:200]
        except (OSError, http.client.HTTPException):
            said = ""
        sentence = f"it answers {error.code} {error.reason}" + (f" ({said})" if said else "")
        if error.code in _AGAIN:
            pause: float | None = None
            with contextlib.suppress(ValueError):
                pause = max(0.0, float(error.headers.get("Retry-After", "")))
            raise _Failed(sentence, pause) from None
        kind = BadPrompt if error.code in _BAD_PROMPT else RedrafterError
        raise kind(f"{self.url}: {sentence}.") from None


def _read(body: Any, *, plain: bool) -> tuple[str | Message, str, int]:
    try:
        choice = body["choices"][0]
        said = {"content": choice["text"]} if plain else choice["message"]
        tokens = (body.get("usage") or {}).get("completion_tokens") or 0
        message: Message = {"role": "assistant"}
        for name in ("reasoning_content", "reasoning", "content", "tool_calls"):
            if said.get(name) is not None:
                message[name] = said[name]
        for call in message.get("tool_calls", []):  # templates take objects, the protocol has JSON text
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        content = message.get("content")
        if (isinstance(content, str) or message.get("tool_calls")) and isinstance(tokens, int):
            answer: str | Message = message if content is None or len(message) > 2 else content
            return answer, str(choice.get("finish_reason")), tokens
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    raise _Failed("its answer holds no text where one belongs")


def by_endpoint(
    prompts: Iterator[Prompt],
    endpoint: Endpoint,
    law: Law,
    *,
    seeds: Sequence[int],
    concurrency: int,
    chat: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    tally: Tally | None = None,
    skip: Skip | None = None,
) -> Iterator[Done]:
    """Answers of a served model, `concurrency` prompts at a time, each as soon as it is there, in any order.

    `seeds` are `law.seeds` of all prompts.  A first turn that the server refuses is told to `skip`, or without it
    raises BadPrompt; a later one ends its conversation.
    """
    tally = tally or Tally()
    gate, stopped = threading.Semaphore(concurrency), threading.Event()

    def work(prompt: Prompt) -> Done:
        rows, counts = [], Counter[str]()
        for variant, temperature in enumerate(law.temperatures):
            seed = seeds[prompt.number * len(law.temperatures) + variant]
            asked = plan(prompt.record, prompt.where, chat=chat, template_kwargs=template_kwargs)
            row, tokens = _answered(prompt, asked, endpoint, law, temperature, seed)
            cut = sum(reason == "length" for reason in row["finish_reasons"])
            rows.append(row)
            counts += Counter(rows=1, answers=len(row["finish_reasons"]), cut=cut, tokens=tokens)
        return Done(prompt, rows, counts)

    def start(prompt: Prompt) -> Future[Done]:
        future: Future[Done] = Future()

        def run() -> None:
            with gate:
                if stopped.is_set():
                    return
                try:
                    future.set_result(work(prompt))
                except Exception as error:
                    future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # an interrupt does not wait for answers on their way
        return future

    def result(prompt: Prompt, future: Future[Done]) -> Done:
        try:
            return future.result()
        except BadPrompt as error:
            if skip is None:
                raise RedrafterError(f"{prompt.where}: {error}") from None
            skip(f"{prompt.where}: {error}")
            return Done(prompt, [], Counter())

    begun: dict[Future[Done], Prompt] = {}  # in the order of the prompts

    def may_begin() -> bool:
        numbers = [one.number for one in begun.values()] or [0]
        return len(begun) < 4 * concurrency and numbers[-1] - numbers[0] < LOOK_AHEAD * concurrency

    try:
        while True:
            while may_begin() and (prompt := next(prompts, None)) is not None:
                begun[start(prompt)] = prompt
            if not begun:
                return
            ended, _ = wait(begun, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in sorted(ended, key=lambda one: (one.exception() is not None, begun[one].number)):
                done = result(begun.pop(future), future)
                tally.tokens += done.counts["tokens"]
                yield done
            tally.tick()
    finally:
        stopped.set()


def _answered(
    prompt: Prompt, asked: Plan, endpoint: Endpoint, law: Law, temperature: float, seed: int
) -> tuple[dict[str, Any], int]:
    """One row, and how many tokens of it the server wrote."""
    settings: dict[str, Any] = {"max_tokens": law.max_new_tokens, "temperature": float(temperature)}
    if temperature > 0:
        told = {"top_p": law.top_p, "top_k": law.top_k, "seed": seed % 2**31}  # servers differ in the seeds they take
        settings |= {name: value for name, value in told.items() if value is not None}
    row = named(prompt, temperature)
    if asked.chat is None:
        text, reason, tokens = endpoint.answer(str(asked.prompt), settings)
        whole = reason == "stop"  # `completion` is learnt with its end, `text` without
        row |= {"prompt": asked.prompt, "completion" if whole else "text": text, "finish_reasons": [reason]}
        return row, tokens
    inputs = asked.chat.columns([])
    settings |= {name: value for name, value in inputs.items() if name != "messages"}
    messages: list[Message] = []
    reasons: list[str] = []
    total = 0
    for stretch in asked.stretches:
        try:
            said, reason, tokens = endpoint.answer([*messages, *stretch], settings)
        except BadPrompt:
            if not messages:
                raise
            break
        message = {"role": "assistant", "content": said} if isinstance(said, str) else said
        messages += [*stretch, message]
        reasons.append(reason)
        total += tokens
        if message.get("tool_calls"):  # the row's next turn does not answer them
            break
    return row | {**inputs, "messages": messages, "finish_reasons": reasons}, total
