"""What a server counts, for Prometheus, in a registry of its own: two servers in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..blocks import Blocks, Compressed
from ..engines.request import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _States(Collector):
    """What engine and blocks say of themselves at the time they are asked."""

    def __init__(self, engine: Engine, blocks: Blocks) -> None:
        self._engine, self._blocks = engine, blocks

    def collect(self) -> Iterable[Any]:
        engine, blocks = state_of(self._engine.state), state_of(self._blocks.state)
        yield from _gauges(
            ("voco_engine_ready", "1 while the engine answers", engine.get("ready")),
            ("voco_engine_running", "answers being generated", engine.get("running")),
            ("voco_engine_waiting", "answers waiting for the engine", engine.get("waiting")),
            ("voco_stage1_waiting", "images waiting for stage 1", blocks.get("waiting")),
            ("voco_kept_bytes", "bytes of blocks that are kept", blocks.get("kept_bytes")),
        )
        yield from _counters(
            ("voco_engine_restarts", "times the engine was started again", engine.get("restarts")),
            ("voco_cache_hits", "images and videos that were kept", blocks.get("hits")),
            ("voco_cache_misses", "images and videos that were compressed", blocks.get("misses")),
            ("voco_stage1_busy_seconds", "time spent in stage 1", blocks.get("compressed_seconds")),
        )


def state_of(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``ask`` says, or what kept it from saying so: whoever asks for a state wants one."""
    try:
        return dict(ask())
    except Exception as problem:
        return {"ready": False, "error": f"{type(problem).__name__}: {problem}"}


class Metrics:
    """The server's counters.

    Args:
        engine, blocks: asked for their state when the metrics are read.
    """

    def __init__(self, engine: Engine, blocks: Blocks) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "voco_requests", "requests by route and outcome", ["route", "outcome"], registry=registry
        )
        self.rejected = Counter(
            "voco_rejected", "requests refused before they were read", ["reason"], registry=registry
        )
        self.tokens = Counter("voco_tokens", "tokens by kind", ["kind"], registry=registry)
        self.saved_bytes = Counter(
            "voco_saved_bytes", "bytes of keys and values that prompts did not need", registry=registry
        )
        self.stage_one = _histogram(
            "voco_stage1_seconds", "an image that was not kept, waiting included", registry
        )
        self.stage_two = _histogram("voco_stage2_seconds", "an answer, from submission to its end", registry)
        self.first_token = _histogram(
            "voco_first_token_seconds", "from a request to its first token", registry
        )
        self.queued = _histogram(
            "voco_queued_seconds", "from submission to where the engine began it", registry
        )
        registry.register(_States(engine, blocks))

    def compressed(self, found: Compressed) -> None:
        """An image or video was asked for."""
        if not found.hit:
            self.stage_one.observe(found.seconds)

    def read(self, caches: Iterable[Any]) -> None:
        """A prompt was built on these blocks."""
        for block in caches:
            per_token = block.nbytes / max(block.num_tokens, 1)
            self.saved_bytes.inc(max(0.0, per_token * (block.num_vision - block.num_tokens)))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


def _histogram(name: str, what: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, f"seconds: {what}", registry=registry, buckets=_SECONDS)


def _gauges(*rows: tuple[str, str, Any]) -> Iterator[GaugeMetricFamily]:
    for name, what, value in rows:
        if value is not None:
            yield GaugeMetricFamily(name, what, value=float(value))


def _counters(*rows: tuple[str, str, Any]) -> Iterator[CounterMetricFamily]:
    for name, what, value in rows:
        if value is not None:
            yield CounterMetricFamily(name, what, value=float(value))


__all__ = ["CONTENT_TYPE", "Metrics", "state_of"]
