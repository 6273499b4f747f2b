"""Counts of requests by the name of their API key; the key itself is nowhere in them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric


class KeyMetrics:
    """The counters. Names come from the server's own file, so they are few."""

    def __init__(self) -> None:
        self._entered: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._refused: dict[tuple[str, str], int] = {}

    def entered(self, name: str) -> None:
        """A request was let in."""
        self._entered[name] = self._entered.get(name, 0) + 1

    def spent(self, name: str, tokens: int) -> None:
        """A request to a language model read and wrote these tokens."""
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def refused(self, name: str, reason: str) -> None:
        """A request was refused: `unknown`, `disabled`, `model`, or the limit that was reached."""
        self._refused[name, reason] = self._refused.get((name, reason), 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The metric families; none where no key was ever asked for."""
        if not (self._entered or self._refused):
            return
        entered = CounterMetricFamily("inflight_key_requests", "Requests let in, by API key's name.", labels=["key"])
        for name, count in self._entered.items():
            entered.add_metric([name], count)
        yield entered
        tokens = CounterMetricFamily("inflight_key_tokens", "Tokens of prompts and answers.", labels=["key"])
        for name, count in self._tokens.items():
            tokens.add_metric([name], count)
        yield tokens
        refused = CounterMetricFamily("inflight_key_refusals", "Requests refused.", labels=["key", "reason"])
        for (name, reason), count in self._refused.items():
            refused.add_metric([name, reason], count)
        yield refused
