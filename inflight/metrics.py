"""What a server counts, in Prometheus' text format.

The numbers are kept in plain lists and read out when somebody scrapes: prometheus_client's own counters take a lock
and several microseconds per observation, which is what a small request costs in all. Every method belongs to the
server's event loop; nothing here locks. Each server has its own `Metrics`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
"""Upper bounds of the time buckets. A quantile is known to within a factor of 2.5, and the sum gives exact means."""
SIZES = tuple(float(1 << power) for power in range(11))
TGI_SECONDS = tuple(0.00015 * 1.5**power for power in range(35))
"""The buckets of TGI's durations."""
LENGTHS = tuple(float(1 << power) for power in range(18))


class _Histogram:
    """Counts by bucket (the last one is what lies above all bounds) and their sum."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus has them."""
        total = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip([*(f"{bound:g}" for bound in self._bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """What Prometheus sees of a histogram without labels."""
        return HistogramMetricFamily(name, text, buckets=self.buckets(), sum_value=self.sum)


class _Histograms(dict[tuple[str, ...], _Histogram]):
    """One histogram for each combination of labels, made when it is first seen."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, labels: tuple[str, ...]) -> _Histogram:
        made = self[labels] = _Histogram(self._bounds)
        return made

    def family(self, name: str, text: str, labels: list[str]) -> HistogramMetricFamily:
        """What Prometheus sees: cumulative buckets."""
        family = HistogramMetricFamily(name, text, labels=labels)
        for values, histogram in self.items():
            family.add_metric(values, buckets=histogram.buckets(), sum_value=histogram.sum)
        return family


class Metrics(Collector):
    """The counters and histograms of one server.

    The hot methods (`request_done`, `queued`, `stage`) cost less than a microsecond each.
    """

    def __init__(self) -> None:
        self._requests = _Histograms(SECONDS)
        self._failures: dict[tuple[str, str, str], int] = {}
        self._queue = _Histograms(SECONDS)
        self._batches = _Histograms(SIZES)
        self._stages = _Histograms(SECONDS)
        self._replicas: dict[tuple[str, str, str], str] = {}
        self._states: dict[str, None] = {}
        self._in_flight: Callable[[], int] = lambda: 0
        self._generating: Callable[[], tuple[int, int]] | None = None
        self._generations = {name: _Histogram(TGI_SECONDS) for name in _GENERATION_SECONDS}
        self._lengths = {name: _Histogram(LENGTHS) for name in _GENERATION_LENGTHS}
        self._generation_failures: dict[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def content_type(self) -> str:
        """The media type of `render`."""
        return CONTENT_TYPE

    def request_done(self, servable: str, method: str, seconds: float, cause: str | None = None) -> None:
        """One request was answered after `seconds`; `cause` is its error's `InflightError.cause`, None for none."""
        self._requests[servable, method].observe(seconds)
        if cause is not None:
            key = (servable, method, cause)
            self._failures[key] = self._failures.get(key, 0) + 1

    def queued(self, servable: str, method: str, seconds: float) -> None:
        """One instance, or one request's instances, waited this long in the server before a replica took them."""
        self._queue[servable, method].observe(seconds)

    def stage(self, servable: str, method: str, stage: str, size: int, seconds: float) -> None:
        """A stage or model ran once, on `size` instances, and took `seconds`."""
        key = (servable, method, stage)
        self._batches[key].observe(size)
        self._stages[key].observe(seconds)

    def replica(self, servable: str, version: int, replica: str | int, state: str | None) -> None:
        """A replica is now in this state; None: it is gone and no longer shown."""
        key = (servable, str(version), str(replica))
        if state is None:
            self._replicas.pop(key, None)
        else:
            self._replicas[key] = state
            self._states[state] = None

    def watch_in_flight(self, read: Callable[[], int]) -> None:
        """Who knows how many requests are in the server now; asked at every scrape."""
        self._in_flight = read

    def watch_generations(self, read: Callable[[], tuple[int, int]]) -> None:
        """Who knows the running rows and the waiting requests of the language models; asked at every scrape."""
        self._generating = read

    def generation(
        self, prompt: int, generated: int, queued: float, inference: float, seconds: float, failure: str | None = None
    ) -> None:
        """One generation ended: tokens of its prompt and output, seconds; `failure` in TGI's words, None for none."""
        if failure is not None:
            self._generation_failures[failure] = self._generation_failures.get(failure, 0) + 1
            return
        times = (seconds, queued, inference, inference / max(1, generated))
        for histogram, value in zip(self._generations.values(), times):
            histogram.observe(value)
        for histogram, length in zip(self._lengths.values(), (prompt, generated)):
            histogram.observe(length)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing ahead of time, so that registering does not read the numbers."""
        return []

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's side: the families as they stand."""
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
        if self._generating is not None:
            yield from self._collect_generations(*self._generating())

    def _collect_generations(self, running: int, waiting: int) -> Iterator[Metric]:
        """What TGI shows of itself, under its names, which have no `_total`."""
        good = sum(next(iter(self._generations.values())).counts)
        failed = sum(self._generation_failures.values())
        for name, text, value in (
            ("tgi_request_count", "Generations that ended.", good + failed),
            ("tgi_request_success", "Generations that ended well.", good),
        ):
            family = Metric(name, text, "unknown")
            family.add_sample(name, {}, value)
            yield family
        failures = Metric("tgi_request_failure", "Generations that failed, by what went wrong.", "unknown")
        for kind, count in self._generation_failures.items():
            failures.add_sample("tgi_request_failure", {"err": kind}, count)
        yield failures
        for names, histograms in ((_GENERATION_SECONDS, self._generations), (_GENERATION_LENGTHS, self._lengths)):
            for name, text in names.items():
                yield histograms[name].family(name, text)
        yield GaugeMetricFamily("tgi_queue_size", "Generations without a row.", value=waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Rows of the running batch.", value=running)


_GENERATION_SECONDS = {
    "tgi_request_duration": "Seconds from request to last token.",
    "tgi_request_queue_duration": "Seconds until the first step.",
    "tgi_request_inference_duration": "Seconds from the first step to the last token.",
    "tgi_request_mean_time_per_token_duration": "Seconds for each token.",
}
_GENERATION_LENGTHS = {
    "tgi_request_input_length": "Tokens of the prompt.",
    "tgi_request_generated_tokens": "Tokens generated.",
}
