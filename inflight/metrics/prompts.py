"""Metrics of the prompt cache in files, and of the slots of recurrent states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass
class PromptCacheCounts:
    """What happened to the files of one replica.

    Attributes:
        hits, missed: prompts of which a part was read, and of which nothing was there.
        passed: prompts that were computed though files had them: that was faster, or no blocks were free.
        late: prompts that were computed because reading took too long.
        tokens: tokens that were read; read, written: bytes.
        reading: seconds of reading; waited: seconds that requests waited for it.
        unwritten: pages that could not be written; dropped: pages that were evicted before they were.
    """

    hits: int = 0
    missed: int = 0
    passed: int = 0
    late: int = 0
    tokens: int = 0
    read: int = 0
    written: int = 0
    reading: float = 0.0
    waited: float = 0.0
    unwritten: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class StateSlots:
    """The slots of recurrent states of one replica now. Attributes: rows, saved, free: slots; waiting: requests for
    which there is none."""

    rows: int = 0
    saved: int = 0
    free: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class PromptsShown:
    """One replica. Attributes: counts: None without a prompt cache; slots: None without recurrent states."""

    model: str
    replica: int
    counts: PromptCacheCounts | None
    slots: StateSlots | None


_COUNTERS: dict[str, tuple[str, Callable[[PromptCacheCounts], float]]] = {
    "inflight_prompt_cache_tokens": ("Tokens of prompts that were read from files.", lambda one: one.tokens),
    "inflight_prompt_cache_read_bytes": ("Bytes read.", lambda one: one.read),
    "inflight_prompt_cache_written_bytes": ("Bytes written.", lambda one: one.written),
    "inflight_prompt_cache_read_seconds": ("Seconds of reading.", lambda one: one.reading),
    "inflight_prompt_cache_wait_seconds": ("Seconds that requests waited for it.", lambda one: one.waited),
    "inflight_prompt_cache_unwritten_pages": ("Files that could not be written.", lambda one: one.unwritten),
    "inflight_prompt_cache_dropped_pages": ("Pages evicted before they were written.", lambda one: one.dropped),
}
_OUTCOMES: dict[str, Callable[[PromptCacheCounts], float]] = {
    "hit": lambda one: one.hits,
    "miss": lambda one: one.missed,
    "passed": lambda one: one.passed,
    "late": lambda one: one.late,
}
_USES: dict[str, Callable[[StateSlots], float]] = {
    "rows": lambda one: one.rows,
    "saved": lambda one: one.saved,
    "free": lambda one: one.free,
}
_LABELS = ["model", "replica"]


def prompt_metrics(replicas: Sequence[PromptsShown]) -> Iterator[Metric]:
    """The metric families; those that no replica has are absent."""
    kept = [(one, one.counts) for one in replicas if one.counts is not None]
    if kept:
        lookups = CounterMetricFamily(
            "inflight_prompt_cache_lookups",
            "Prompts of a page or more that the cache in memory did not have, by what files had.",
            labels=[*_LABELS, "outcome"],
        )
        for one, counts in kept:
            for outcome, read in _OUTCOMES.items():
                lookups.add_metric([one.model, str(one.replica), outcome], read(counts))
        yield lookups
    for name, (text, number) in _COUNTERS.items() if kept else ():
        family = CounterMetricFamily(name, text, labels=_LABELS)
        for one, counts in kept:
            family.add_metric([one.model, str(one.replica)], number(counts))
        yield family
    held = [(one, one.slots) for one in replicas if one.slots is not None]
    if held:
        slots = GaugeMetricFamily(
            "inflight_generator_states", "Slots of recurrent states, by who has them.", labels=[*_LABELS, "use"]
        )
        waiting = GaugeMetricFamily(
            "inflight_generator_states_waiting", "Requests that wait for a slot.", labels=_LABELS
        )
        for one, now in held:
            for use, value in _USES.items():
                slots.add_metric([one.model, str(one.replica), use], value(now))
            waiting.add_metric([one.model, str(one.replica)], now.waiting)
        yield slots
        yield waiting
