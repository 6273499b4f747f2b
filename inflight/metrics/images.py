"""Metrics of the images that language models read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inflight.metrics.histograms import Histograms

OUTCOMES = ("encoded", "cached", "skipped", "shared", "refused", "overloaded", "failed", "cancelled")
"""What becomes of an image: the worker encoded it; its rows were in the cache; its keys were in the prefix cache, so
that nobody needs its rows; the same image was on its way already; it is wrong or over a limit; too many waited; nothing
was wrong with it; its caller left."""


class ImageMetrics:
    """Counters of the images of all language models of a server.

    Args:
        seconds: upper bounds of the time buckets.
    """

    def __init__(self, seconds: tuple[float, ...]) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._tokens: dict[str, int] = {}
        self._encoding = Histograms(seconds)
        self._fetching = Histograms(seconds)
        self._waiting: dict[str, Callable[[], int]] = {}
        self._kept: dict[str, Callable[[], int]] = {}

    def watch(self, model: str, waiting: Callable[[], int], kept: Callable[[], int]) -> None:
        """Sets the functions that count a model's images in front of the worker, and the bytes in its cache; they are
        called at every scrape."""
        self._waiting[model], self._kept[model] = waiting, kept

    def forget(self, model: str) -> None:
        """The model has ended: its gauges are no longer shown."""
        self._waiting.pop(model, None)
        self._kept.pop(model, None)

    def count(self, model: str, outcome: str, count: int = 1) -> None:
        """Counts images by what became of them (`OUTCOMES`)."""
        self._counts[model, outcome] = self._counts.get((model, outcome), 0) + count

    def got(self, model: str, tokens: int) -> None:
        """Counts tokens of images that a request got."""
        self._tokens[model] = self._tokens.get(model, 0) + tokens

    def encoded(self, model: str, seconds: float) -> None:
        """One image was encoded in `seconds`, from the head of the queue to its rows."""
        self._encoding[model,].observe(seconds)

    def fetched(self, model: str, seconds: float) -> None:
        """One image was fetched, or refused, after `seconds`."""
        self._fetching[model,].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The metric families with their current values; empty where no model reads images."""
        if not self._waiting and not self._counts:
            return
        images = CounterMetricFamily(
            "inflight_images", "Images of requests, by what became of them.", labels=["model", "outcome"]
        )
        for key, count in self._counts.items():
            images.add_metric(key, count)
        yield images
        tokens = CounterMetricFamily("inflight_image_tokens", "Tokens of images in prompts.", labels=["model"])
        for model, total in self._tokens.items():
            tokens.add_metric([model], total)
        yield tokens
        for name, text, numbers in (
            ("inflight_image_queue_size", "Images that are fetched or wait to be encoded.", self._waiting),
            ("inflight_image_cache_bytes", "Memory of encoded images that are kept.", self._kept),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, read in numbers.items():
                gauge.add_metric([model], read())
            yield gauge
        yield self._encoding.family("inflight_image_encode_seconds", "Seconds of encoding an image.", ["model"])
        yield self._fetching.family("inflight_image_fetch_seconds", "Seconds of fetching an image.", ["model"])
