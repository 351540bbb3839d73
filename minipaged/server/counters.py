"""The server's Prometheus metrics. Without ``prometheus_client`` it counts nothing, and ``/metrics`` says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from minipaged.engine_thread import EngineLoop
from minipaged.features.speculative.drafts import speculation_of
from minipaged.server.protocol import ApiError

prometheus: Any
try:
    import prometheus_client as prometheus
except ModuleNotFoundError:
    prometheus = None

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One server's metrics, in a registry of its own, since one process may run several servers."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry() if prometheus else None
        if prometheus is None:
            return
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self._requests = counter(
            "minipaged_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self._prompt = counter("minipaged_prompt_tokens", "tokens of prompts", registry=registry)
        self._output = counter("minipaged_generation_tokens", "tokens sampled", registry=registry)
        self._first = histogram(
            "minipaged_time_to_first_token_seconds", "arrival to first token (TTFT)", buckets=SECONDS, registry=registry
        )
        self._whole = histogram(
            "minipaged_request_seconds", "from a request's arrival to its end", buckets=SECONDS, registry=registry
        )

    def watch(self, thread: EngineLoop) -> None:
        """Adds gauges, which read the engine at each scrape. They only read counts, so no lock is needed."""
        if prometheus is None:
            return
        gauges: dict[str, tuple[str, Callable[[Any], int]]] = {
            "minipaged_requests_running": ("requests in the running batch", lambda e: len(e.scheduler.running)),
            "minipaged_requests_waiting": ("requests in the waiting queue", lambda e: len(e.scheduler.waiting)),
            "minipaged_kv_blocks": ("blocks in the pool", lambda e: e.num_blocks),
            "minipaged_kv_blocks_free": ("blocks without references", lambda e: e.memory.pool.num_free),
            "minipaged_preemptions": ("requests preempted since the start", lambda e: e.scheduler.num_preemptions),
            "minipaged_draft_tokens": ("draft tokens proposed", lambda e: _speculation(e, "num_proposed")),
            "minipaged_draft_tokens_accepted": ("draft tokens accepted", lambda e: _speculation(e, "num_accepted")),
        }
        for name, (what, read) in gauges.items():
            gauge = prometheus.Gauge(name, what, registry=self.registry)
            gauge.set_function(partial(lambda read: read(thread.engine), read))

    def text(self) -> bytes:
        """The metrics in Prometheus's text format. Raises `ApiError` 501 without ``prometheus_client``."""
        if prometheus is None:
            raise ApiError(501, "metrics need prometheus_client: pip install prometheus-client")
        return prometheus.generate_latest(self.registry)

    def request(self, endpoint: str) -> Stopwatch:
        return Stopwatch(self, endpoint)


def _speculation(engine: Any, count: str) -> int:
    """A counter of speculative decoding; 0 if the engine does not speculate."""
    return getattr(speculation_of(engine), count, 0)


class Stopwatch:
    """Measures one request: its TTFT, its duration, its tokens."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics, self._endpoint = metrics, endpoint
        self._began = time.perf_counter()
        self._waiting = True
        self._done = False

    def token(self) -> None:
        """Call at each output; the first one ends the time to first token."""
        if self._waiting and prometheus is not None:
            self._metrics._first.observe(time.perf_counter() - self._began)
        self._waiting = False

    def done(self, status: int | str, usage: dict[str, Any] | None = None) -> None:
        """Records the end of the request; later calls have no effect."""
        if self._done or prometheus is None:
            return
        self._done = True
        metrics = self._metrics
        metrics._requests.labels(self._endpoint, str(status)).inc()
        metrics._whole.observe(time.perf_counter() - self._began)
        if usage:
            metrics._prompt.inc(usage["prompt_tokens"])
            metrics._output.inc(usage["completion_tokens"])
