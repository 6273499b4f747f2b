"""One port, every HTTP protocol: who answers which path, health, metrics."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from inflight.config import RestConfig
from inflight.contract import ServableStatus
from inflight.frontends.app import DOORS
from inflight.frontends.openapi import openapi_document
from tests.unit.http_fakes import Served, serve

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_document_has_every_path() -> None:
    told = json.loads(openapi_document(DOORS, generators=True))["paths"]
    assert {(path, verb.upper()) for path, item in told.items() for verb in item if verb != "parameters"} == {
        (path.replace("*}", "}"), route.verb) for door in DOORS for route in door.routes for path in route.paths
    }
    classic = json.loads(openapi_document(DOORS, generators=False))["paths"]
    assert "/generate" not in classic
    assert "/v2/models/{name}/infer" in classic


def test_the_docs_list_the_routes() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "routes.py"))
    told = (ROOT / "docs" / "serving.md").read_text().partition("<!-- routes: python scripts/routes.py -->\n")[2]
    assert told.partition("\n<!-- end of routes -->")[0] == made["table"]()


def test_the_readme_names_routes_that_there_are() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.count("|") == 4 and "| HTTP |" in line]
    named = {path for row in rows for path in re.findall(r"`(?:GET |POST )?(/[^`]*)`", row)}
    below = {f"{start}..." for door in DOORS for start in door.below}
    assert named - below <= {re.sub(r"{(\w+)}", r"<\1>", route.path) for door in DOORS for route in door.routes}
    assert len(rows) == 6


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


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/v2x",
        "/v2/x",
        "/v1",
        "/v1/nothing",
        "/models",
        "/health/live/",
        "/modelx:y",
        "/generate/",
        "/x/model/echo:predict",
    ],
)
def test_unknown_paths_are_404(served: Served, method: str, path: str) -> None:
    answer = get(served, path, method)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        ("/", "DELETE", "GET, HEAD, POST"),
        ("/metrics", "POST", "GET, HEAD"),
        ("/health/ready", "PUT", "GET, HEAD"),
        ("/health", "POST", "GET, HEAD"),
        ("/info", "POST", "GET, HEAD"),
        ("/generate", "GET", "POST"),
        ("/chat_tokenize", "PATCH", "POST"),
        ("/invocations", "GET", "POST"),
        ("/v1/chat/completions", "GET", "POST"),
        ("/v1/models", "POST", "GET, HEAD"),
        ("/models/any/generate", "GET", "POST"),
        ("/serving/get_bs", "POST", "GET, HEAD"),
        ("/v2", "POST", "GET, HEAD"),
        ("/v2/health/ready", "POST", "GET, HEAD"),
        ("/v2/models/echo/infer", "GET", "POST"),
        ("/v2/models/echo", "DELETE", "GET, HEAD"),
        ("/v2/repository/index", "GET", "POST"),
    ],
)
def test_another_verb_on_a_known_path_is_405(served: Served, path: str, method: str, allow: str) -> None:
    answer = get(served, path, method)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]


def test_openai_clients_tell_a_wrong_path_from_a_wrong_model(served: Served) -> None:
    assert get(served, "/v1/nothing", "POST").json()["error"]["code"] == "unknown_url"
    assert get(served, "/v1/completions", "POST").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "key"), [("/generate", "error_type"), ("/v1/completions", "error"), ("/models/any", "error_type")]
)
def test_without_a_language_model_its_routes_are_404(served: Served, path: str, key: str) -> None:
    answer = get(served, path, "POST")
    assert answer.status_code == 404
    assert "no language model is served here" in str(answer.json())
    assert key in answer.json()


def test_what_is_loading_may_bring_a_language_model(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A servable's file says so only once it was run."""
    one = ServableStatus("talks", 1, (), ready=False, replicas=1, ready_replicas=0, loaded=False)
    monkeypatch.setattr(served.backend, "servables", lambda: [one])
    for verb, path in (
        ("POST", "/generate"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/models/a"),
    ):
        answer = get(served, path, verb)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert get(served, "/v2/models/talks/ready").json() == {"name": "talks", "ready": False}
    assert get(served, "/v2/models/talks").status_code == 503
    assert get(served, "/v2/models/nobody/ready").status_code == 404


def test_below_model_mindspore_servings_habits_hold(served: Served) -> None:
    for verb, path in (("GET", "/model/echo:predict"), ("POST", "/model/nobody:predict"), ("POST", "/model/")):
        answer = get(served, path, verb)
        assert (answer.status_code, list(answer.json())) == (200, ["error_msg"])
    url = f"http://{served.address}/version/1/model/echo:predict"
    assert requests.post(url, json={"instances": {"x": 1}}, timeout=5).json() == {"instances": [{"y": 1}]}


def test_a_percent_encoded_name_is_decoded_once(served: Served) -> None:
    def names(*paths: str, body: object) -> list[int]:
        return [
            len(requests.post(f"http://{served.address}{path}", json=body, timeout=5).json().get("instances", ()))
            for path in paths
        ]

    both = {"instances": [{"a": [1.0, 2.0], "t": "x"}]}
    assert names("/model/my%20model:predict", "/model/my%20model/version/1:predict", body=both) == [1, 1]
    assert names("/model/my%2520model:predict", body=both) == [0], "once"
    one = {"instances": [{"x": 1}]}
    assert names("/model/echo:pr%65dict", "/model/echo%3Apredict", body=one) == [1, 1]
    assert get(served, "/v2/models/my%20model/ready").status_code == 200
    assert get(served, "/v2/models/my%2520model/ready").status_code == 404


def test_health_of_a_server_without_language_models(served: Served) -> None:
    assert (get(served, "/health").status_code, get(served, "/ping").content) == (200, b"")
    try:
        served.backend.ready = False
        assert get(served, "/health").json() == {"error": "unhealthy", "error_type": "healthcheck"}
        assert get(served, "/ping").status_code == 503
    finally:
        served.backend.ready = True


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
    if answer.content or answer.status_code != 200:  # `GET /health` says it with its status alone
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json(), dict)
