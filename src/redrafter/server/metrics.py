"""Prometheus metrics with vLLM's names, so that dashboards for vLLM show this server too.

Counters and gauges are read from the engine when they are scraped; latencies are measured where the server receives the
engine's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from redrafter.engine.engine import Engine

_FINISHED = {"stop": ("eos", "stop"), "length": ("length",), "abort": ("cancelled",), "error": ("error",)}
"""vLLM's finish reasons, and the engine's."""

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class _EngineCollector(Collector):
    """The engine's counts at the moment of a scrape."""

    def __init__(self, engine: Engine, labels: dict[str, str]):
        self._engine, self._names, self._values = engine, list(labels), list(labels.values())

    def collect(self) -> Iterator[Metric]:
        now = self._engine.statistics()
        yield self._gauge("num_requests_running", "Requests that are being decoded.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a slot.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", now.cache_usage)
        yield self._counter("prompt_tokens", "Tokens of prompts.", now.prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens.", now.generated_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", now.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits)
        yield self._counter("spec_decode_num_drafts", "Drafts.", now.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Drafted tokens.", now.drafted_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Accepted tokens.", now.accepted_tokens)
        yield self._counters(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafts of which the token at a position was accepted.",
            "position",
            {str(position): count for position, count in enumerate(now.accepted_by_position)},
        )
        yield self._counters(
            "request_success",
            "Ended requests.",
            "finished_reason",
            {name: sum(now.requests.get(own, 0) for own in reasons) for name, reasons in _FINISHED.items()},
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counters(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine, model_name: str):
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry.register(_EngineCollector(engine, self._labels))
        self.first_token = self._histogram("time_to_first_token_seconds", "Time to the first token.", _FIRST_TOKEN)
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds",
            "Time between two tokens; the tokens of one step share its time equally.",
            _BETWEEN_TOKENS,
        )
        self.queue = self._histogram("request_queue_time_seconds", "Time until a request has a slot.", _REQUEST)
        self.request = self._histogram("e2e_request_latency_seconds", "Time of a complete request.", _REQUEST)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, labelnames=list(self._labels), buckets=buckets, registry=self._registry
        )
        return histogram.labels(**self._labels)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def timer(self) -> Timer:
        """Starts to measure a request."""
        return Timer(self)


class Timer:
    """The latencies of one request, from its creation on."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._begin = time.perf_counter()
        self._last: float | None = None

    def tokens(self, count: int, *, queued: float | None) -> None:
        """`count` tokens arrived, of a request that waited `queued` seconds for its slot."""
        if not count:
            return
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first_token.observe(now - self._begin)
            self._metrics.queue.observe(queued or 0.0)
        else:
            for _ in range(count):
                self._metrics.between_tokens.observe((now - self._last) / count)
        self._last = now

    def finished(self) -> None:
        """The request is complete."""
        self._metrics.request.observe(time.perf_counter() - self._begin)
