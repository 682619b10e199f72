"""LangChain's OpenAI client, if it is installed."""

from __future__ import annotations

import asyncio
import warnings

import pytest
from fake_engine import FakeEngine
from pydantic import BaseModel

from serving import TOOL_CALL, TOOL_TEMPLATE, listening

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    langchain = pytest.importorskip("langchain_openai")

TEXT = "Hello you"


class Sum(BaseModel):
    """A number."""

    a: int


def add(a: int) -> int:
    """Adds one."""
    return a + 1


@pytest.fixture
def engine(byte_tokenizer, monkeypatch) -> FakeEngine:
    monkeypatch.setattr(byte_tokenizer, "chat_template", TOOL_TEMPLATE)
    engine = FakeEngine(byte_tokenizer, TEXT)
    engine.max_length = 8192
    return engine


@pytest.fixture
def chat(engine):
    with listening(engine) as (_, url):
        yield langchain.ChatOpenAI(
            model="tiny", base_url=f"{url}/v1", api_key="none", max_retries=0, temperature=0.5, seed=1
        )


def test_answers_and_streams(chat):
    answer = chat.invoke("Hi")
    assert answer.content == TEXT
    assert answer.usage_metadata["output_tokens"] == len(TEXT) + 1
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == TEXT
    assert asyncio.run(chat.ainvoke("Hi")).content == TEXT


def test_tools(chat, engine):
    engine.answer = TOOL_CALL
    for answer in (chat.bind_tools([add]).invoke("Hi"), sum_of(chat.bind_tools([add]).stream("Hi"))):
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", {"a": 1})]
    engine.answer = TEXT
    results = [{"role": "tool", "content": "2", "tool_call_id": answer.tool_calls[0]["id"]}]
    assert chat.bind_tools([add]).invoke([("user", "Hi"), answer, *results]).content == TEXT


def sum_of(chunks):
    total = None
    for chunk in chunks:
        total = chunk if total is None else total + chunk
    return total


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, engine, method):
    engine.answer = '{"a": 1}' if method == "json_schema" else TOOL_CALL.replace("add", "Sum")
    assert chat.with_structured_output(Sum, method=method).invoke("Hi") == Sum(a=1)
    assert "logits_processor" in engine.submissions[-1].settings
