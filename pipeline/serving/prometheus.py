"""The counters of the serving process and of the ring, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.ring.audit import ACTIVE, FOUND, AuditSums
from pipeline.ring.counters import KEPT, layer_and_name
from pipeline.serving.client_messages import Done
from pipeline.serving.observer import Observer
from pipeline.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)  # seconds


class PrometheusObserver(Observer):
    """Adds histograms of the latencies."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"flashring_{name}_seconds", text, buckets=buckets, registry=self.registry)

        self._first = histogram("first_token", "From a request's receipt to its first token", REQUEST_BUCKETS)
        self._token = histogram("token", "From one token to the next", TOKEN_BUCKETS)
        self._request = histogram("request", "From a request's receipt to its end", REQUEST_BUCKETS)
        self._queue = histogram("queue", "Time spent waiting for the ring", REQUEST_BUCKETS)
        self._prefill = histogram("prefill", "Time spent on the prompt", REQUEST_BUCKETS)

    def token(self, seconds: float, *, first: bool) -> None:
        super().token(seconds, first=first)
        (self._first if first else self._token).observe(seconds)

    def answered(self, done: Done, seconds: float) -> None:
        super().answered(done, seconds)
        self._request.observe(seconds)
        self._queue.observe(done.queue_seconds)
        self._prefill.observe(done.prefill_seconds)

    def watch(self, scheduler: Scheduler) -> None:
        """Add what the scheduler and its ring know; once."""
        self.registry.register(_RingCollector(self, scheduler))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _RingCollector(Collector):
    """Reads the counters when the page is asked for."""

    def __init__(self, observer: Observer, scheduler: Scheduler) -> None:
        self._observer = observer
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        yield from self._serving()
        yield from self._ring(self._scheduler.ring.stats())

    def _serving(self) -> Iterator[Metric]:
        observer = self._observer
        yield _counter("generated_tokens", "Tokens written", observer.generated_tokens)
        yield _counter("prompt_tokens", "Tokens of answered prompts", observer.prompt_tokens)
        yield _counter(
            "cached_tokens", "Prompt tokens whose keys and values were reused", observer.cached_tokens
        )
        yield _counter("ring_deaths", "Times that the ring died", observer.ring_deaths)
        yield _counter("malformed_frames", "Frames that were no message", observer.malformed_frames)
        yield _counter("dropped_clients", "Clients gone or not reading", observer.dropped_clients)
        requests = CounterMetricFamily("flashring_requests", "Requests by outcome", labels=["outcome"])
        for outcome, count in sorted(observer.requests.items()):
            requests.add_metric([outcome], count)
        yield requests
        yield _gauge("queue_length", "Requests that wait", self._scheduler.waiting)
        yield _gauge("ring_up", "Whether the ring runs", float(self._scheduler.ring.is_up))

    def _ring(self, stats: dict[str, dict[str, float]]) -> Iterator[Metric]:
        """Counters of the current ring: they begin at 0 again when it is restarted."""
        prefetcher, cache, compute = (stats.get(name, {}) for name in ("prefetcher", "cache", "compute"))
        read = CounterMetricFamily("flashring_flash_read_bytes", "Bytes read from flash", labels=["phase"])
        for phase, name in (("decode", "decode_bytes"), ("prefill", "stream_bytes")):
            read.add_metric([phase], prefetcher.get(name, 0.0))
        yield read
        hits = cache.get("decode_hits", 0.0) + compute.get(KEPT, 0.0)
        misses = cache.get("decode_misses", 0.0)
        yield _counter("cache_hits", "Wanted neurons found in DRAM", hits)
        yield _counter("cache_misses", "Neurons read from flash, wrong guesses included", misses)
        yield _gauge("cache_hit_ratio", "Share of hits", hits / (hits + misses) if hits + misses else 0.0)
        if compute.get(ACTIVE, 0.0):
            recall = compute.get(FOUND, 0.0) / compute[ACTIVE]
            yield _gauge("predictor_recall", "Share of truly active neurons that were predicted", recall)
            yield _layer_recall(compute)


def _layer_recall(compute: dict[str, float]) -> Metric:
    """Of the layers that were audited so far."""
    text = "Share of a layer's truly active neurons that were predicted"
    family = GaugeMetricFamily("flashring_predictor_layer_recall", text, labels=["layer"])
    layers = sorted({of[0] for of in map(layer_and_name, compute) if of is not None})
    for layer in layers:
        sums = AuditSums.of_layer(layer, lambda name: compute.get(name, 0.0))
        if sums.active:
            family.add_metric([str(layer)], 1 - sums.missed / sums.active)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"flashring_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"flashring_{name}", text, value=value)
