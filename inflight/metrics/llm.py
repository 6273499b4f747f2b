"""Metrics of language models under TGI's names, whose counters do not end in `_total`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inflight.metrics.histograms import Histogram, Histograms
from inflight.metrics.prompts import PromptsShown, prompt_metrics
from inflight.metrics.texts import TextMetrics

SECONDS = tuple(0.00015 * 1.5**power for power in range(35))
"""The buckets of TGI's durations."""
LENGTHS = tuple(float(1 << power) for power in range(18))
SIZES = tuple(float(1 << power) for power in range(11))

_REQUEST_SECONDS = {
    "tgi_request_duration": "Seconds from request to last token.",
    "tgi_request_queue_duration": "Seconds until the first step.",
    "tgi_request_inference_duration": "Seconds from the first step to the last token.",
    "tgi_request_mean_time_per_token_duration": "Seconds for each token.",
}
_REQUEST_LENGTHS = {
    "tgi_request_input_length": "Tokens of the prompt.",
    "tgi_request_generated_tokens": "Tokens generated.",
}
_STEP_SECONDS = {
    "tgi_batch_inference_duration": "Seconds from a step's plan to its answer.",
    "tgi_batch_forward_duration": "Seconds of the step on the first rank.",
    "tgi_batch_decode_duration": "Seconds of turning a step's tokens into text and events.",
}
_PLAN_SECONDS = {
    "tgi_batch_filter_duration": "Seconds of planning a step in which rows leave the batch.",
    "tgi_batch_concat_duration": "Seconds of planning a step in which requests join running ones.",
}


Values = Mapping[tuple[str, ...], float]
"""Numbers by label values."""


@dataclass(frozen=True)
class Load:
    """The load of the language models at one moment.

    Attributes:
        running, waiting: requests with a row in the batch, and without one.
        tokens, room: tokens in used blocks of the KV cache, and in all blocks.
        texts: of those that wait, those of models that only read texts.
    """

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    room: int = 0
    texts: int = 0


@dataclass(frozen=True)
class ReplicaLoad:
    """The load and the history of one replica of a language model.

    Attributes:
        model: its name; replica: the number.
        ready: whether it computes.
        load: now.
        placed, taken_over: requests that were given to it when they came, and that it took over from other replicas.
        prompted, cached: prompt tokens of the former, and those of them that were in its prefix cache.
    """

    model: str
    replica: int
    ready: bool
    load: Load
    placed: int
    taken_over: int
    prompted: int
    cached: int


_REPLICA_GAUGES: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "inflight_generator_replica_ready": ("1 for a replica that computes, else 0.", lambda one: float(one.ready)),
    "inflight_generator_replica_running": ("Rows of a replica's batch.", lambda one: one.load.running),
    "inflight_generator_replica_waiting": ("Generations without a row.", lambda one: one.load.waiting),
    "inflight_generator_replica_cache_tokens": ("Tokens of the cache that rows use.", lambda one: one.load.tokens),
}
_REPLICA_COUNTERS: dict[str, tuple[str, Callable[[ReplicaLoad], float]]] = {
    "inflight_generator_replica_requests": ("Generations given to a replica.", lambda one: one.placed),
    "inflight_generator_replica_taken_over": ("Generations taken over from others.", lambda one: one.taken_over),
    "inflight_generator_replica_prompt_tokens": ("Prompt tokens of the generations given.", lambda one: one.prompted),
    "inflight_generator_replica_cached_tokens": ("Of them, those that were cached.", lambda one: one.cached),
}


class LlmMetrics:
    """Counters of all language models of a server.

    Attributes:
        texts: of those that only read texts.
    """

    def __init__(self) -> None:
        self.texts = TextMetrics()
        self._load: Callable[[], Load] | None = None
        self._replicas: Callable[[], Sequence[ReplicaLoad]] = tuple
        self._prompts: Callable[[], Sequence[PromptsShown]] = tuple
        self._seconds = {name: Histogram(SECONDS) for name in _REQUEST_SECONDS}
        self._lengths = {name: Histogram(LENGTHS) for name in _REQUEST_LENGTHS}
        self._validation = Histogram(SECONDS)
        self._asked = Histogram(LENGTHS)
        self._skipped = Histogram(LENGTHS)
        self._joined = Histogram(SIZES)
        self._failures: dict[str, int] = {}
        self._concats: dict[str, int] = {}
        self._steps = {name: Histograms(SECONDS) for name in _STEP_SECONDS}
        self._plans = {name: Histograms(SECONDS) for name in _PLAN_SECONDS}
        for method in ("prefill", "decode"):  # so that a dashboard has every series from the start
            self._plans["tgi_batch_filter_duration"][method,]
        self._plans["tgi_batch_concat_duration"]["decode",]
        self._lost: dict[str, int] = {}

    def watch(
        self,
        read: Callable[[], Load],
        replicas: Callable[[], Sequence[ReplicaLoad]] = tuple,
        prompts: Callable[[], Sequence[PromptsShown]] = tuple,
    ) -> None:
        """Sets the functions that read the load of all, and of replicas, and what their prompt caches and recurrent
        states are at; they are called at every scrape."""
        self._load, self._replicas, self._prompts = read, replicas, prompts

    def admitted(self, seconds: float, max_new_tokens: int) -> None:
        """Counts a request that was checked and tokenized in `seconds`."""
        self._validation.observe(seconds)
        self._asked.observe(max_new_tokens)

    def done(
        self,
        prompt: int,
        generated: int,
        queued: float,
        inference: float,
        seconds: float,
        failure: str | None = None,
        skipped: Mapping[int, int] = {},
    ) -> None:
        """Counts a generation that ended: tokens of prompt and output; seconds; `failure`: TGI's error type.

        Args:
            skipped: number of steps by the number of tokens that they made beyond the first.
        """
        if failure is not None:
            self._failures[failure] = self._failures.get(failure, 0) + 1
            return
        times = (seconds, queued, inference, inference / max(1, generated))
        for histogram, value in zip(self._seconds.values(), times):
            histogram.observe(value)
        for histogram, length in zip(self._lengths.values(), (prompt, generated)):
            histogram.observe(length)
        several = 0
        for tokens, steps in skipped.items():
            self._skipped.observe(tokens, steps)
            several += (tokens + 1) * steps
        self._skipped.observe(0, max(0, generated - several))

    def refused(self, failure: str) -> None:
        """Counts a request that was refused before it reached a model. `failure`: TGI's error type."""
        self._failures[failure] = self._failures.get(failure, 0) + 1

    def planned(self, method: str, seconds: float, joined: int, left: int, running: int) -> None:
        """Counts a step, planned in `seconds`, in which `joined` requests join `running` rows and `left` rows leave."""
        if joined:
            self._joined.observe(joined)
            if running > joined:
                self._concats["chunking"] = self._concats.get("chunking", 0) + 1
                self._plans["tgi_batch_concat_duration"]["decode",].observe(seconds)  # TGI's label, always
        if left:
            self._plans["tgi_batch_filter_duration"][method,].observe(seconds)

    def step(self, method: str, inference: float, forward: float, host: float) -> None:
        """Counts an answered step; times in seconds. `method`: `prefill` where it computed prompts, else `decode`."""
        for histograms, value in zip(self._steps.values(), (inference, forward, host)):
            histograms[method,].observe(value)

    def step_lost(self, method: str) -> None:
        """Counts a step whose ranks were lost."""
        self._lost[method] = self._lost.get(method, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The metric families with their current values; empty where no language model is served."""
        if self._load is None:
            return
        load = self._load()
        good = sum(next(iter(self._seconds.values())).counts)
        yield _counter("tgi_request_count", "Generations that ended.", {(): good + sum(self._failures.values())})
        yield _counter("tgi_request_success", "Generations that ended well.", {(): good})
        failed: Values = {(kind,): count for kind, count in self._failures.items()}
        yield _counter("tgi_request_failure", "Generations that failed, by what went wrong.", failed, "err")
        for names, histograms in ((_REQUEST_SECONDS, self._seconds), (_REQUEST_LENGTHS, self._lengths)):
            for name, text in names.items():
                yield histograms[name].family(name, text)
        yield self._validation.family("tgi_request_validation_duration", "Seconds of checking and encoding a request.")
        yield self._asked.family("tgi_request_max_new_tokens", "Tokens that requests may generate at most.")
        yield self._skipped.family("tgi_request_skipped_tokens", "Tokens beyond the first that one step made of a row.")
        yield self._joined.family("tgi_batch_next_size", "Requests that join the batch in one step.")
        concats: Values = {(reason,): count for reason, count in self._concats.items()}
        yield _counter("tgi_batch_concat", "Steps in which requests joined running ones.", concats, "reason")
        for name, text in _STEP_SECONDS.items():
            yield self._steps[name].family(name, text, ["method"])
        for name, text in _PLAN_SECONDS.items():
            yield self._plans[name].family(name, text, ["method"])
        answered: Values = {
            names: sum(one.counts) for names, one in self._steps["tgi_batch_inference_duration"].items()
        }
        lost: Values = {(method,): count for method, count in self._lost.items()}
        both: Values = {names: answered.get(names, 0) + lost.get(names, 0) for names in {**answered, **lost}}
        yield _counter("tgi_batch_inference_count", "Steps.", both, "method")
        yield _counter("tgi_batch_inference_success", "Steps that were answered.", answered, "method")
        yield _counter("tgi_batch_inference_failure", "Steps that were lost with their ranks.", lost, "method")
        for name, text, value in (
            ("tgi_queue_size", "Generations without a row.", load.waiting),
            ("tgi_batch_current_size", "Rows of the running batch.", load.running),
            ("tgi_batch_current_max_tokens", "Tokens of the cache in blocks that rows use.", load.tokens),
            ("tgi_batch_max_total_tokens", "Tokens of the cache.", load.room),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield from self.texts.collect(load.texts)
        yield from _of_replicas(self._replicas())
        yield from prompt_metrics(self._prompts())


def _of_replicas(loads: Sequence[ReplicaLoad]) -> Iterator[Metric]:
    """The metrics of replicas; empty where every model has one."""
    labels = ["model", "replica"]
    for kind, table in ((GaugeMetricFamily, _REPLICA_GAUGES), (CounterMetricFamily, _REPLICA_COUNTERS)):
        for name, (text, read) in table.items() if loads else ():
            family = kind(name, text, labels=labels)
            for one in loads:
                family.add_metric([one.model, str(one.replica)], read(one))
            yield family


def _counter(name: str, text: str, values: Values, label: str | None = None) -> Metric:
    """A counter under exactly this name: Prometheus' own would end in `_total`."""
    family = Metric(name, text, "unknown")
    for labels, value in values.items():
        family.add_sample(name, {} if label is None else {label: labels[0]}, value)
    return family
