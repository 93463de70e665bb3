"""Metrics of one replica in Prometheus's format: requests, latencies, tokens, and what the engine holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nexus_ray.generation.engine import Engine
from serve.guard.record import Record

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """Counts what a replica does.

    Args:
        engine: whose state is shown.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "nexus_ray_requests", "Answered requests; 499: the client went away", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "nexus_ray_request_seconds", "Time to the end of an answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "nexus_ray_first_piece_seconds", "Time to the first text of a stream", buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter("nexus_ray_tokens", "Tokens of answered requests", ["model", "kind"], registry=registry)
        self._open = Gauge("nexus_ray_requests_in_flight", "Requests being answered", registry=registry)
        for name, text, read in (
            ("nexus_ray_engine_running", "Requests that generate or wait to", lambda: engine.state().running),
            ("nexus_ray_engine_scoring", "Scoring requests that run or wait", lambda: engine.state().scoring),
            ("nexus_ray_engine_step_seconds", "Age of the present forward pass", lambda: engine.state().step_seconds),
            (
                "nexus_ray_engine_generated_tokens",
                "Tokens generated since the start, abandoned ones among them",
                lambda: engine.state().generated_tokens,
            ),
            (
                "nexus_ray_engine_prompt_tokens",
                "Tokens of prompts taken in since the start",
                lambda: engine.state().prompt_tokens,
            ),
            ("nexus_ray_engine_scored_tokens", "Tokens scored since the start", lambda: engine.state().scored_tokens),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request as being answered within the block."""
        self._open.inc()
        try:
            yield
        finally:
            self._open.dec()

    def count(self, route: str, status: int, seconds: float, record: Record) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if record.first_piece is not None:
            self._first.observe(record.first_piece)
        if record.model is not None and status < 400:
            for kind in ("prompt_tokens", "completion_tokens"):
                self._tokens.labels(record.model, kind.removesuffix("_tokens")).inc(record.usage.get(kind, 0))

    def exposition(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)
