"""Metrics have vLLM's names and the engine's values."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from redrafter.server.protocol import ChatRequest, CompletionRequest

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
LABELS = {"model_name": "tiny", "engine": "0"}


def samples(server) -> dict[tuple[str, str], float]:
    """Values by name and the label that is not common to all."""
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels.items() >= LABELS.items()
            own = [value for name, value in sample.labels.items() if name not in LABELS]
            values[sample.name, own[0] if own else ""] = sample.value
    return values


def test_counts(make_server):
    server = make_server("Hello")
    server.chat()
    server.complete(max_tokens=3, drafter=False)
    values = samples(server)
    prompts = sum(len(one.prompt) for one in server.engine.submissions)
    expected = {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens_total": prompts,
        "generation_tokens_total": 9,
        "prefix_cache_queries_total": 7,
        "prefix_cache_hits_total": 3,
        "spec_decode_num_draft_tokens_total": 9,
        "spec_decode_num_accepted_tokens_total": 3,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 9 - 2 - 2,  # without the tokens of the two first steps
        "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 2,
        "request_queue_time_seconds_sum": 0.5,
    }
    assert {name: values[f"vllm:{name}", ""] for name in expected} == expected
    assert values["vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"] == 3
    reasons = {"stop": 1, "length": 1, "abort": 0, "error": 0}
    assert {name: values["vllm:request_success_total", name] for name in reasons} == reasons


def test_failed_requests_are_not_latencies(make_server):
    server = make_server("Hello")
    server.engine.failure = "It failed."
    server.chat()
    values = samples(server)
    assert values["vllm:request_success_total", "error"] == 1
    assert values["vllm:e2e_request_latency_seconds_count", ""] == 0


def test_waiting_requests_are_counted(make_server):
    server = make_server("Hello")
    for _ in range(3):
        server.engine.submit([70], max_new_tokens=5)
    values = samples(server)
    assert values["vllm:num_requests_running", ""] == 2
    assert values["vllm:num_requests_waiting", ""] == 1


def test_the_docs_list_all_metrics(make_server):
    text = make_server().get("/metrics").text
    families = [one for one in text_string_to_metric_families(text) if not one.name.endswith("_created")]
    exposed = {(family.name, family.type) for family in families}
    assert set(re.findall(r"^\| `(vllm:\w+)` \| (\w+) \|", DOCS, re.MULTILINE)) == exposed


def test_the_docs_list_all_fields_of_requests():
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    table = DOCS[DOCS.index("| field |") : DOCS.index("Any other field")]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row)))
    assert named == fields
