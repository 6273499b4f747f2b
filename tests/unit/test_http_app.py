"""One port, every HTTP protocol: who answers which path, health, metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from inflight.config import RestConfig
from tests.unit.http_fakes import Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve() as served:
        yield served


def get(served: Served, path: str, method: str = "GET") -> requests.Response:
    return requests.request(method, f"http://{served.address}{path}", timeout=10)


def test_every_protocol_on_one_connection(served: Served) -> None:
    with requests.Session() as session:
        url = f"http://{served.address}"
        for _ in range(3):
            mindspore = session.post(f"{url}/model/echo:predict", json={"instances": [{"x": [1, 2]}]}, timeout=5)
            assert mindspore.json() == {"instances": [{"y": [1, 2]}]}
            tensor = {"name": "x", "shape": [1, 2], "datatype": "INT32", "data": [1, 2]}
            oip = session.post(f"{url}/v2/models/echo/infer", json={"inputs": [tensor]}, timeout=5)
            assert oip.json()["outputs"][0]["data"] == [1, 2]
            assert session.get(f"{url}/health/ready", timeout=5).json() == {"ready": True, "not_ready": []}


def test_health_follows_the_backend(served: Served) -> None:
    try:
        served.backend.ready = False
        ready = get(served, "/health/ready")
        assert ready.status_code == 503
        assert "echo/1" in ready.json()["not_ready"]
        assert get(served, "/health/live").status_code == 200
        served.backend.live = False
        live = get(served, "/health/live")
        assert (live.status_code, live.json()) == (503, {"live": False})
        assert get(served, "/v2/health/live").status_code == 503
    finally:
        served.backend.ready = served.backend.live = True


def test_metrics_are_what_was_counted(served: Served) -> None:
    served.metrics.request_done("echo", "predict", 0.2, "model")
    answer = get(served, "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, sample.labels.get("cause")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["inflight_request_failures_total", "model"] == 1
    assert get(served, "/metrics", "HEAD").content == b""


def test_the_overview_names_what_is_served(served: Served) -> None:
    overview = get(served, "/").json()
    echo = next(each for each in overview["servables"] if each["name"] == "echo")
    assert (echo["version"], echo["ready"], echo["methods"]) == (1, True, ["predict"])
    assert "/metrics" in overview["paths"]


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("GET", "/nothing", "error_msg"),
        ("POST", "/metrics", "error_msg"),
        ("DELETE", "/", "error_msg"),
        ("GET", "/v2x", "error_msg"),
        ("GET", "/v2/x", "error"),
        ("POST", "/v2", "error"),
        ("GET", "/health/live/", "error_msg"),
    ],
)
def test_unknown_paths_are_the_protocols_own_errors(served: Served, method: str, path: str, key: str) -> None:
    assert get(served, path, method).json()[key]


def test_mindspore_errors_have_a_status_only_where_configured(served: Served) -> None:
    assert get(served, "/model/echo:predict").status_code == 200
    with serve(rest=RestConfig(status_codes=True)) as strict:
        assert get(strict, "/model/echo:predict").status_code == 400


pieces = ["v2", "models", "echo", "infer", "health", "live", "%2e", "%", "%zz", "", "é", "?", ":"]


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    path=st.lists(st.sampled_from(pieces)),
    body=st.binary(max_size=20),
)
def test_any_request_gets_one_json_answer(served: Served, method: str, path: list[str], body: bytes) -> None:
    answer = requests.request(method, f"http://{served.address}/{'/'.join(path)}", data=body, timeout=10)
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json(), dict)
