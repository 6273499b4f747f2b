"""Counts calls and their durations, by HTTP route or by remote procedure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric

from inflight.metrics.histograms import Histogram, Histograms

_HTTP = ["protocol", "route", "method"]
_GRPC = ["service", "method"]


class Calls:
    """The calls of one route: how many ended with each status, and their durations."""

    __slots__ = ("_seconds", "codes")

    def __init__(self, seconds: Histogram) -> None:
        self.codes: dict[int | str, int] = {}
        self._seconds = seconds

    def done(self, code: int | str, seconds: float) -> None:
        """A call has ended."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self._seconds.observe(seconds)


class RouteMetrics:
    """Calls by route. The labels are those of tables of routes, never a text of a request.

    Args:
        bounds: of the durations' buckets, in seconds.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._http = _Counted(bounds)
        self._grpc = _Counted(bounds)

    def http(self, protocol: str, route: str, method: str) -> Calls:
        """The calls of a route over HTTP. Args: route: its path with the names of its parts: `/v2/models/{name}`."""
        return self._http.of(protocol, route, method)

    def grpc(self, service: str, method: str) -> Calls:
        """The calls of a remote procedure."""
        return self._grpc.of(service, method)

    def collect(self) -> Iterator[Metric]:
        """The metrics with their values of now."""
        yield from self._http.collect("inflight_http_request", "HTTP requests that were answered", _HTTP)
        yield from self._grpc.collect("inflight_grpc_request", "gRPC calls that ended", _GRPC)


class _Counted:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._calls: dict[tuple[str, ...], Calls] = {}
        self._seconds = Histograms(bounds)

    def of(self, *labels: str) -> Calls:
        calls = self._calls.get(labels)
        if calls is None:
            calls = self._calls[labels] = Calls(self._seconds[labels])
        return calls

    def collect(self, name: str, text: str, labels: list[str]) -> Iterator[Metric]:
        counts = CounterMetricFamily(f"{name}s", f"{text}, by status.", labels=[*labels, "code"])
        for values, calls in self._calls.items():
            by_code: Mapping[int | str, int] = calls.codes
            for code, count in by_code.items():
                counts.add_metric([*values, str(code)], count)
        yield counts
        yield self._seconds.family(f"{name}_seconds", f"Seconds of {text}.", labels)
