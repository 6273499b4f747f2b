"""The metrics of a server, in Prometheus' text format.

The numbers are kept in plain lists and read at each scrape: prometheus_client's own counters take a lock and several
microseconds per observation, as much as a small request costs in all. Every method runs on the server's event loop;
nothing here locks. Each server has its own `Metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inflight.metrics.histograms import Histogram, Histograms
from inflight.metrics.images import ImageMetrics
from inflight.metrics.keys import KeyMetrics
from inflight.metrics.llm import LlmMetrics
from inflight.metrics.routes import RouteMetrics
from inflight.metrics.totals import Runs, Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
"""Upper bounds of the time buckets. A quantile is known to within a factor of 2.5, and the sum gives exact means."""
SIZES = tuple(float(1 << power) for power in range(11))


MODEL_METHODS = ("generate", "embed", "embed_sparse", "classify", "score")
"""The methods of language models, which are counted together."""


class Metrics(Collector):
    """The counters and histograms of one server.

    The hot methods (`request_done`, `queued`, `stage`) cost less than a microsecond each.

    Attributes:
        generations: the metrics of language models.
        images: the metrics of the images that they read.
        keys: counts by the names of API keys.
        routes: the metrics of HTTP routes and of remote procedures.
    """

    def __init__(self) -> None:
        self._requests = Histograms(SECONDS)
        self._failures: dict[tuple[str, str, str], int] = {}
        self._failed_seconds: dict[tuple[str, str], float] = {}
        self._queue = Histograms(SECONDS)
        self._batches = Histograms(SIZES)
        self._stages = Histograms(SECONDS)
        self._runs: dict[tuple[str, str, str], dict[int, Runs]] = {}  # by batch size
        self._last: dict[tuple[str, str], float] = {}
        self._generated: dict[str, Totals] = {}  # of language models
        self._replicas: dict[tuple[str, str, str], str] = {}
        self._states: dict[str, None] = {}
        self._in_flight: Callable[[], int] = lambda: 0
        self.generations = LlmMetrics()
        self.images = ImageMetrics(SECONDS)
        self.keys = KeyMetrics()
        self.routes = RouteMetrics(SECONDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def request_done(self, servable: str, method: str, seconds: float, cause: str | None = None) -> None:
        """One request was answered after `seconds`; `cause` is its error's `InflightError.cause`, None for none."""
        self._requests[servable, method].observe(seconds)
        if cause is not None:
            key = (servable, method, cause)
            self._failures[key] = self._failures.get(key, 0) + 1
            self._failed_seconds[servable, method] = self._failed_seconds.get((servable, method), 0.0) + seconds

    def waits(self, servable: str, method: str) -> Histogram:
        """How many seconds requests waited in the server before a replica took their first instances."""
        return self._queue[servable, method]

    def stage(self, servable: str, method: str, stage: str, size: int, seconds: float, count: int = 1) -> None:
        """A stage or model ran `count` times, each time on `size` instances, and took `seconds` for it."""
        key = (servable, method, stage)
        self._batches[key].observe(size, count)
        self._stages[key].observe(seconds, count)
        sizes = self._runs.setdefault(key, {})
        before = sizes.get(size)
        took = seconds * count
        sizes[size] = Runs(size, count, took) if before is None else Runs(size, before[1] + count, before[2] + took)
        self._last[servable, method] = time.time()

    def generated(self, model: str, seconds: float, queued: float, inference: float, failed: bool) -> None:
        """A generation of a language model ended after `seconds`, of which it waited for `queued` and was computed for
        `inference`."""
        before = self._generated.get(model, Totals())
        if failed:
            self._generated[model] = before._replace(
                failed=before.failed + 1, failed_seconds=before.failed_seconds + seconds
            )
            return
        answered = before.answered + 1
        busy = before.busy_seconds + (inference - before.busy_seconds) / answered
        self._generated[model] = Totals(
            answered,
            before.answered_seconds + seconds,
            before.failed,
            before.failed_seconds,
            answered,
            before.queued_seconds + queued,
            (Runs(1, answered, busy * answered),),
            busy,
            time.time(),
        )

    def totals(self, servable: str, method: str) -> Totals:
        """What a method has done since the start."""
        key = (servable, method)
        generated = self._generated.get(servable) if method in MODEL_METHODS else None
        if generated is not None and key not in self._requests:
            return generated
        requests, queue = self._requests.get(key), self._queue.get(key)
        failed = sum(count for (*names, _), count in self._failures.items() if tuple(names) == key)
        failed_seconds = self._failed_seconds.get(key, 0.0)
        stages = [sizes for (*names, _), sizes in self._runs.items() if tuple(names) == key]
        busy = 0.0
        for sizes in stages:
            # A request is in a run for as long as the run takes, however many share it.
            rows = sum(runs.size * runs.times for runs in sizes.values())
            busy += sum(runs.seconds * runs.size for runs in sizes.values()) / rows if rows else 0.0
        return Totals(
            answered=sum(requests.counts) - failed if requests is not None else 0,
            answered_seconds=requests.sum - failed_seconds if requests is not None else 0.0,
            failed=failed,
            failed_seconds=failed_seconds,
            queued=sum(queue.counts) if queue is not None else 0,
            queued_seconds=queue.sum if queue is not None else 0.0,
            runs=tuple(sizes[size] for sizes in stages[-1:] for size in sorted(sizes)),
            busy_seconds=busy,
            last=self._last.get(key, 0.0),
        )

    def replica(self, servable: str, version: int, replica: str | int, state: str | None) -> None:
        """A replica is now in this state; None: it has ended and is no longer shown."""
        key = (servable, str(version), str(replica))
        if state is None:
            self._replicas.pop(key, None)
        else:
            self._replicas[key] = state
            self._states[state] = None

    def watch_in_flight(self, read: Callable[[], int]) -> None:
        """Sets the function that counts the requests in the server; it is called at every scrape."""
        self._in_flight = read

    def render(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Empty, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metric families with their current values, for prometheus_client."""
        labels = ["servable", "method"]
        requests = CounterMetricFamily("inflight_requests", "Requests answered, failed ones included.", labels=labels)
        for names, histogram in self._requests.items():
            requests.add_metric(names, sum(histogram.counts))
        yield requests
        failures = CounterMetricFamily(
            "inflight_request_failures", "Requests that ended in an error, by its cause.", labels=[*labels, "cause"]
        )
        for key, count in self._failures.items():
            failures.add_metric(key, count)
        yield failures
        yield self._requests.family("inflight_request_seconds", "Seconds from request to answer.", labels)
        yield self._queue.family("inflight_queue_seconds", "Seconds in the server's queue.", labels)
        yield self._batches.family("inflight_batch_size", "Instances in one run of a stage.", [*labels, "stage"])
        yield self._stages.family("inflight_stage_seconds", "Seconds of one run of a stage.", [*labels, "stage"])
        replicas = GaugeMetricFamily(
            "inflight_replica_state",
            "1 for the state that a replica is in, 0 for the others.",
            labels=["servable", "version", "replica", "state"],
        )
        for key, current in self._replicas.items():
            for state in self._states:
                replicas.add_metric([*key, state], float(state == current))
        yield replicas
        yield GaugeMetricFamily("inflight_requests_in_flight", "Requests in the server.", value=self._in_flight())
        yield from self.routes.collect()
        yield from self.generations.collect()
        yield from self.images.collect()
        yield from self.keys.collect()
