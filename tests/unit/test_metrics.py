"""What a scrape shows is what happened, and counting is cheap."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from inflight.config import RestartPolicy, ServerConfig
from inflight.metrics import SECONDS, Load, Metrics
from inflight.router.language_models import LanguageModels

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def test_requests_and_failures_by_cause() -> None:
    metrics = Metrics()
    metrics.request_done("s", "m", 0.25, None)
    metrics.request_done("s", "m", 0.75, "model")
    metrics.request_done("s", "m", 0.5, "model")
    metrics.request_done("s", "n", 1.0, "overloaded")
    samples = scrape(metrics)
    assert value(samples, "inflight_requests_total", servable="s", method="m") == 3
    assert value(samples, "inflight_request_failures_total", servable="s", method="m", cause="model") == 2
    assert value(samples, "inflight_request_failures_total", servable="s", method="n", cause="overloaded") == 1
    assert value(samples, "inflight_request_seconds_sum", servable="s", method="m") == 1.5
    assert value(samples, "inflight_request_seconds_bucket", servable="s", method="m", le="0.5") == 2
    assert value(samples, "inflight_request_seconds_bucket", servable="s", method="m", le="+Inf") == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_histogram_counts_each_value_in_its_bucket(values: list[float]) -> None:
    metrics = Metrics()
    for seconds in values:
        metrics.waits("s", "m").observe(seconds)
    samples = scrape(metrics)
    for bound in SECONDS:
        expected = sum(each <= bound for each in values)
        assert (
            value(samples, "inflight_queue_seconds_bucket", servable="s", method="m", le=f"{bound:g}") or 0
        ) == expected
    assert (value(samples, "inflight_queue_seconds_count", servable="s", method="m") or 0) == len(values)


def test_stages_tell_size_and_time() -> None:
    metrics = Metrics()
    for size in (1, 2, 3, 32, 5000):
        metrics.stage("s", "m", "model", size, 0.002)
    samples = scrape(metrics)
    labels = {"servable": "s", "method": "m", "stage": "model"}
    counts = {bound: value(samples, "inflight_batch_size_bucket", **labels, le=bound) for bound in _bounds(samples)}
    assert (counts["1"], counts["2"], counts["4"], counts["1024"], counts["+Inf"]) == (1, 2, 3, 4, 5)
    assert value(samples, "inflight_stage_seconds_bucket", **labels, le="0.0025") == 5


def _bounds(samples: Samples) -> Iterable[str]:
    return {dict(labels)["le"] for name, labels in samples if name == "inflight_batch_size_bucket"}


def test_a_replica_is_in_one_state() -> None:
    metrics = Metrics()
    metrics.replica("s", 1, "device0", "starting")
    metrics.replica("s", 1, "device1", "ready")
    metrics.replica("s", 1, "device0", "ready")
    metrics.replica("s", 1, 'odd "name"\n', "lost")
    samples = scrape(metrics)

    def state(replica: str, name: str) -> float | None:
        return value(samples, "inflight_replica_state", servable="s", version="1", replica=replica, state=name)

    assert [state("device0", name) for name in ("starting", "ready", "lost")] == [0, 1, 0]
    assert state('odd "name"\n', "lost") == 1
    metrics.replica("s", 1, "device0", None)
    samples = scrape(metrics)
    assert state("device0", "ready") is None


def test_in_flight_is_asked_for_at_each_scrape() -> None:
    metrics = Metrics()
    now = [3]
    metrics.watch_in_flight(lambda: now[0])
    assert value(scrape(metrics), "inflight_requests_in_flight") == 3
    now[0] = 0
    assert value(scrape(metrics), "inflight_requests_in_flight") == 0


def test_two_servers_do_not_share_and_both_show_the_process() -> None:
    first, second = Metrics(), Metrics()
    first.request_done("s", "m", 0.1)
    assert value(scrape(second), "inflight_requests_total", servable="s", method="m") is None
    for metrics in (first, second):
        assert (value(scrape(metrics), "process_resident_memory_bytes") or 0) > 1e6


DASHBOARD: dict[str, tuple[str, ...]] = {
    "tgi_batch_concat": (),
    "tgi_batch_concat_duration_bucket": ("decode",),
    "tgi_batch_current_max_tokens": (),
    "tgi_batch_current_size": (),
    "tgi_batch_decode_duration_bucket": ("prefill", "decode"),
    "tgi_batch_filter_duration_bucket": ("prefill", "decode"),
    "tgi_batch_forward_duration_bucket": ("prefill", "decode"),
    "tgi_batch_inference_duration_bucket": ("prefill", "decode"),
    "tgi_queue_size": (),
    "tgi_request_count": (),
    "tgi_request_duration_bucket": (),
    "tgi_request_failure": (),
    "tgi_request_generated_tokens_bucket": (),
    "tgi_request_generated_tokens_count": (),
    "tgi_request_generated_tokens_sum": (),
    "tgi_request_input_length_bucket": (),
    "tgi_request_mean_time_per_token_duration_bucket": (),
    "tgi_request_queue_duration_bucket": (),
    "tgi_request_skipped_tokens_bucket": (),
    "tgi_request_success": (),
}
"""Every series that the 57 expressions of TGI's Grafana dashboard (assets/tgi_grafana.json) read, with its methods."""


def test_tgis_dashboard_finds_every_series() -> None:
    metrics = Metrics()
    generations = metrics.generations
    generations.watch(Load)
    generations.done(3, 2, 0.1, 0.2, 0.3)
    generations.refused("validation")
    for method in ("prefill", "decode"):
        generations.planned(method, 0.001, joined=1, left=1, running=2)
        generations.step(method, 0.1, 0.1, 0.1)
    samples = scrape(metrics)
    for name, methods in DASHBOARD.items():
        for wanted in methods or (None,):
            assert any(
                found == name and (wanted is None or ("method", wanted) in labels) for found, labels in samples
            ), (name, wanted)
    assert value(samples, "tgi_request_count") == 2
    assert value(samples, "tgi_batch_filter_duration_count", method="decode") == 1


def test_the_methods_of_a_language_model_are_counted_together() -> None:
    """An embedder's statistics are those of `embed`, the method that stands for it, whatever door was asked."""
    metrics = Metrics()
    metrics.generated("minilm", 1.0, 0.25, 0.5, failed=False)
    for method in ("generate", "embed", "embed_sparse", "classify", "score"):
        assert metrics.totals("minilm", method).answered == 1
    assert metrics.totals("minilm", "predict").answered == 0


def test_the_queue_of_texts_is_that_of_models_that_only_read_them() -> None:
    class Model:
        def __init__(self, generates: bool, waiting: int) -> None:
            self.info, self.load = SimpleNamespace(generates=generates), Load(waiting=waiting)

    metrics = Metrics()
    models = LanguageModels(ServerConfig(), metrics)
    models._shards.update({cast(Any, Model(True, 5)): [], cast(Any, Model(False, 2)): []})
    metrics.generations.watch(models._load)
    metrics.generations.texts.serve()
    samples = scrape(metrics)
    assert (value(samples, "tgi_queue_size"), value(samples, "te_queue_size")) == (7, 2)


def test_pauses_between_starts_double_up_to_the_longest() -> None:
    policy, pauses = RestartPolicy(first_delay=0.5, max_delay=3.0), [0.0]
    for _ in range(5):
        pauses.append(policy.after(pauses[-1]))
    assert pauses == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
