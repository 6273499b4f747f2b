"""Histograms that take less than a microsecond per observation."""

from __future__ import annotations

from bisect import bisect_left

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Counts by bucket (the last bucket is above all bounds), and the sum of the values."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus has them."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*(f"{bound:g}" for bound in self._bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """Prometheus' metric family of a histogram without labels."""
        return HistogramMetricFamily(name, text, buckets=self.buckets(), sum_value=self.sum)


class Histograms(dict[tuple[str, ...], Histogram]):
    """One histogram for each combination of labels, made when it is first seen."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, labels: tuple[str, ...]) -> Histogram:
        histogram = self[labels] = Histogram(self._bounds)
        return histogram

    def family(self, name: str, text: str, labels: list[str]) -> HistogramMetricFamily:
        """Prometheus' metric family, with cumulative buckets."""
        family = HistogramMetricFamily(name, text, labels=labels)
        for values, histogram in self.items():
            family.add_metric(values, buckets=histogram.buckets(), sum_value=histogram.sum)
        return family
