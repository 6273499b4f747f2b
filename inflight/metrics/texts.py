"""Metrics of models that only read texts, under text-embeddings-inference's names, which do not end in `_total`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import GaugeMetricFamily, Metric

from inflight.metrics.histograms import Histogram

SECONDS = tuple(0.00001 * 1.5**power for power in range(1, 36))
LENGTHS = tuple(float(1 << power) for power in range(20))
SIZES = tuple(float(1 << power) for power in range(13))
TOKENS = tuple(float(1 << power) for power in range(21))
"""The buckets of text-embeddings-inference."""

TextKind = Literal["embed", "predict"]
_PARTS = ("", "tokenization_", "queue_", "inference_")
_ABOUT = {
    "": "Seconds from request to result.",
    "tokenization_": "Seconds of checking and encoding.",
    "queue_": "Seconds until the first step.",
    "inference_": "Seconds from the first step to the result.",
}


@dataclass(frozen=True)
class TextTimes:
    """Seconds of one text, or of one request: in all; until it was encoded; until its first step; from there on."""

    whole: float
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


class _Durations:
    """The four histograms of texts of a kind, or of requests."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._parts = {part: Histogram(SECONDS) for part in _PARTS}

    def observe(self, times: TextTimes) -> None:
        for histogram, value in zip(
            self._parts.values(), (times.whole, times.tokenization, times.queue, times.inference)
        ):
            histogram.observe(value)

    def collect(self) -> Iterator[Metric]:
        for part, histogram in self._parts.items():
            yield histogram.family(f"te_{self._subject}_{part}duration", _ABOUT[part])


class TextMetrics:
    """Counters of all models of a server that only read texts. A request is a body, of one text or of several."""

    def __init__(self) -> None:
        self._served = False
        self._asked: dict[str, int] = {"single": 0, "batch": 0}
        self._answered: dict[str, int] = {"single": 0, "batch": 0}
        self._failures: dict[str, int] = {}
        self._begun: dict[TextKind, int] = {"embed": 0, "predict": 0}
        self._done: dict[TextKind, int] = {"embed": 0, "predict": 0}
        self._durations: dict[TextKind, _Durations] = {"embed": _Durations("embed"), "predict": _Durations("predict")}
        self._requests = _Durations("request")
        self._lengths, self._sizes, self._tokens = Histogram(LENGTHS), Histogram(SIZES), Histogram(TOKENS)

    def serve(self) -> None:
        """From now on there is such a model, and the metrics are shown."""
        self._served = True

    def asked(self, texts: int | None) -> str:
        """Counts a request. Args: texts: their number; None: it has one alone. Returns: what `answered` takes."""
        method = "single" if texts is None else "batch"
        self._asked[method] += 1
        return method

    def answered(self, method: str, times: TextTimes) -> None:
        """Counts a request that was answered."""
        self._answered[method] += 1
        self._requests.observe(times)

    def refused(self, failure: str) -> None:
        """Counts what failed: a text, or a request before its texts were looked at."""
        self._failures[failure] = self._failures.get(failure, 0) + 1

    def began(self, kind: TextKind) -> None:
        """Counts a text that came."""
        self._begun[kind] += 1

    def done(self, kind: TextKind, tokens: int, times: TextTimes) -> None:
        """Counts a text that was computed."""
        self._done[kind] += 1
        self._lengths.observe(tokens)
        self._durations[kind].observe(times)

    def batch(self, texts: int, tokens: int) -> None:
        """Counts a step in which so many texts began."""
        self._sizes.observe(texts)
        self._tokens.observe(tokens)

    def collect(self, waiting: int) -> Iterator[Metric]:
        """The metric families; empty where no such model is served. Args: waiting: texts that no step has begun."""
        if not self._served:
            return
        yield _counter("te_request_count", "Requests.", list(self._asked.items()), "method")
        yield _counter("te_request_success", "Requests that were answered.", list(self._answered.items()), "method")
        yield _counter("te_request_failure", "Requests and texts that failed.", list(self._failures.items()), "err")
        yield from self._requests.collect()
        for kind, durations in self._durations.items():
            yield _counter(f"te_{kind}_count", "Texts.", [("", self._begun[kind])])
            yield _counter(f"te_{kind}_success", "Texts that were computed.", [("", self._done[kind])])
            yield from durations.collect()
        yield self._lengths.family("te_request_input_length", "Tokens of a text.")
        yield self._sizes.family("te_batch_next_size", "Texts that begin in one step.")
        yield self._tokens.family("te_batch_next_tokens", "Their tokens.")
        yield GaugeMetricFamily("te_queue_size", "Texts that no step has begun.", value=waiting)


def _counter(name: str, text: str, values: Sequence[tuple[str, int]], label: str | None = None) -> Metric:
    """A counter under exactly this name: Prometheus' own would end in `_total`."""
    family = Metric(name, text, "unknown")
    for named, value in values:
        family.add_sample(name, {} if label is None else {label: named}, value)
    return family
