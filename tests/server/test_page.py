"""The page at `/`, in headless Chromium with a server that streams scripted chunks; skipped without Chromium."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import redrafter

PAGE = Path(redrafter.__file__).parent / "server" / "static" / "index.html"
STEPS = [
    (["Here"], 0),
    ([" is", " a", " loop", ":\n"], 3),
    (["for", " i", " in", " <b>", "range", "</b>"], 5),
    (["(3):", "\n"], 1),
    (["    print", "(i)", " # &amp;", " done"], 3),
    (["."], 0),
]
"""The tokens of each step, and how many of them were drafted and accepted."""
TEXT = "".join("".join(pieces) for pieces, _ in STEPS)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_it_is_small_and_needs_nothing_else():
    page = PAGE.read_text()
    assert len(page.encode()) < 20_000
    assert not re.findall(r"(?:https?:)?//[a-z]", page)
    assert set(re.findall(r"""(?:src|href)=["']([^"']*)""", page)) <= {"data:,"}
    assert "innerHTML" not in page


class FakeServer(ThreadingHTTPServer):
    """Streams `STEPS`, one token per chunk without a drafter; keeps the requests that it received.

    A message can ask for a fault: "refuse", "break", "cut", "wait" or "plain".
    """

    daemon_threads = True

    def __init__(self, pause: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.pause = pause
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/":
            self._answer("text/html", PAGE.read_bytes())
        else:
            self._answer("application/json", json.dumps({"data": [{"id": "my-model"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        alone = all(request.get("done") for request in self.server.requests)
        self.server.requests.append(body | {"authorization": self.headers["Authorization"], "alone": alone})
        fault = body["messages"][-1]["content"]
        if fault == "refuse":
            error = {"error": {"message": "The prompt <b>does not fit</b>."}}
            self._answer("application/json", json.dumps(error).encode(), status=400)
            return
        self._answer("text/event-stream", b"")
        try:
            self._stream(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.server.requests[-1]["closed"] = True

    def _stream(self, body: dict, fault: str) -> None:
        self._send({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        steps = list(STEPS) if body["drafter"] else [([piece], 0) for pieces, _ in STEPS for piece in pieces]
        for index, (pieces, accepted) in enumerate(steps):
            if fault == "wait":
                steps.append((["."], 0))
                time.sleep(0.02)
            time.sleep(self.server.pause)
            if fault in ("break", "cut") and index == 2:
                return self._send({"error": {"message": "The model broke."}}) if fault == "break" else None
            chunk = {"choices": [{"delta": {"content": "".join(pieces)}, "finish_reason": None}]}
            if fault != "plain":
                chunk["redrafter"] = {"tokens": len(pieces), "accepted": accepted, "drafted": 5, "pieces": pieces}
            self._send(chunk)
        self._send({"choices": [{"delta": {}, "finish_reason": "length" if fault == "long" else "stop"}]})
        self.server.requests[-1]["done"] = True
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def server():
    started = FakeServer()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def page(browser, server):
    opened = browser.new_page()
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.goto(server.url)
    yield opened
    opened.close()
    assert not failures


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def wait(page) -> None:
    """Until the answer is complete."""
    page.get_by_role("button", name="Send").wait_for()


def test_an_answer_is_shown_as_text_with_accepted_tokens_tinted(page, server):
    page.get_by_text("my-model").wait_for()
    ask(page, "Hello <i>you</i>")
    wait(page)
    assert page.locator(".question").text_content() == "Hello <i>you</i>"
    assert page.locator(".text").text_content() == TEXT
    assert page.locator(".text mark").all_text_contents() == [
        "".join(pieces[:accepted]).lstrip() for pieces, accepted in STEPS if accepted
    ]
    assert page.locator(".text b, .question i").count() == 0
    tokens = sum(len(pieces) for pieces, _ in STEPS)
    figures = page.locator("dl").inner_text().replace("\n", " ")
    assert f"tokens/step {tokens / len(STEPS):.2f}" in figures
    assert f"tokens {tokens} " in figures
    (request,) = server.requests
    assert request["stream"] is True
    assert request["drafter"] is True
    assert request["model"] == "my-model"
    assert request["temperature"] == 0
    assert request["authorization"] is None


def test_a_chat_continues_until_a_new_one_begins(page, server):
    ask(page, "One")
    wait(page)
    page.get_by_label("Message").fill("Two\n")
    page.get_by_label("Message").press("Enter")
    page.locator(".turn").nth(1).wait_for()
    wait(page)
    roles = [(message["role"], message["content"]) for message in server.requests[1]["messages"]]
    assert roles == [("user", "One"), ("assistant", TEXT), ("user", "Two")]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    ask(page, "Three")
    wait(page)
    assert [message["content"] for message in server.requests[2]["messages"]] == ["Three"]


def test_compare_answers_one_after_the_other_from_the_same_request(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Max tokens").fill("99")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("switch", name="Compare").check()
    ask(page, "Hello")
    page.get_by_text("Same text").wait_for()
    on, off = server.requests
    assert (on.pop("drafter"), off.pop("drafter")) == (True, False)
    assert on == off
    assert off["alone"]  # the first answer was complete, so that both had the machine to themselves
    assert (on["temperature"], on["max_tokens"], on["authorization"]) == (0.7, 99, "Bearer secret")
    assert isinstance(on["seed"], int)
    assert page.locator(".text").all_text_contents() == [TEXT, TEXT]
    assert page.locator(".answer").nth(1).locator("mark").count() == 0
    assert page.get_by_text(str(on["seed"])).is_visible()
    ask(page, "More")
    page.get_by_text("Same text").nth(1).wait_for()
    assert [message["role"] for message in server.requests[3]["messages"]] == ["user", "assistant", "user"]


def test_stop_ends_the_request_and_keeps_the_text(page, server):
    page.get_by_role("switch", name="Compare").check()
    ask(page, "wait")
    page.get_by_text("Here is a loop").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    wait(page)
    for _ in range(100):
        if server.requests[0].get("closed"):
            break
        time.sleep(0.05)
    assert len(server.requests) == 1
    assert server.requests[0]["closed"]
    assert page.locator(".text").text_content().startswith("Here is a loop")


@pytest.mark.parametrize(
    ("fault", "message"),
    [("refuse", "The prompt <b>does not fit</b>."), ("break", "The model broke."), ("cut", "connection ended")],
)
def test_errors_are_shown_in_place_and_the_chat_goes_on(page, server, fault, message):
    ask(page, fault)
    wait(page)
    alert = page.get_by_role("alert")
    assert message in alert.text_content()
    assert alert.locator("b").count() == 0
    ask(page, "Hello")
    page.locator(".text", has_text="done.").wait_for()
    contents = [one["content"] for one in server.requests[-1]["messages"]]
    assert contents[-1] == "Hello"
    assert (fault in contents) == (fault != "refuse")  # a message without an answer leaves the chat


def test_chunks_without_counts_are_plain_text(page):
    ask(page, "plain")
    wait(page)
    assert page.locator(".text").text_content() == TEXT
    assert page.locator(".text mark").count() == 0
    assert "tokens" not in page.locator("dl").inner_text()


def test_invalid_settings_are_not_sent(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("0")
    page.get_by_role("button", name="Settings").click()
    ask(page, "Hello")
    assert page.get_by_label("Max tokens").is_visible()
    assert not server.requests


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(browser, server, width):
    page = browser.new_page(viewport={"width": width, "height": 640})
    page.goto(server.url)
    page.get_by_role("switch", name="Compare").check()
    ask(page, "A" * 500)
    page.get_by_text("Same text").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth")
    page.close()


def test_every_control_has_a_name(page):
    page.get_by_role("button", name="Settings").click()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')].filter((one) => one.checkVisibility() && "
        "!(one.labels?.[0]?.textContent.trim() || one.textContent.trim())).map((one) => one.id)"
    )
    assert unnamed == []
