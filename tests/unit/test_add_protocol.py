"""CONTRIBUTING's recipe "Add a protocol", followed with the example in the tree."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis

from inflight.config import ListenConfig, ServerConfig
from inflight.errors import ConfigError
from inflight.frontends import load_protocol
from inflight.frontends.app import DOORS
from inflight.frontends.openapi import openapi_document
from inflight.server import Server
from tests.unit.http_fakes import Served, serve

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "protocol_rows"
NAME = "rows_protocol:RowsRest"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    sys.modules.pop("rows_protocol", None)


@pytest.fixture(scope="module")
def served(_importable: None) -> Iterator[Served]:
    with serve(api_key="secret", protocols=[load_protocol(NAME)]) as served:
        yield served


def ask(served: Served, verb: str, path: str, body: Any = None, key: str = "secret") -> requests.Response:
    headers = {"authorization": f"Bearer {key}"}
    return requests.request(verb, f"http://{served.address}{path}", json=body, headers=headers, timeout=10)


def test_the_table_is_all_that_a_protocol_says(served: Served) -> None:
    body = {"rows": [{"x": [1, 2]}, {"x": 3}]}
    assert ask(served, "POST", "/rows/echo/predict", body).json() == {"rows": [{"y": [1, 2]}, {"y": 3}]}
    assert "/rows/echo/predict" in ask(served, "GET", "/rows").json()["paths"]
    wrong = ask(served, "GET", "/rows/echo/predict")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert ask(served, "POST", "/rows/echo/predict", body, key="other").status_code == 401
    assert ask(served, "GET", "/rows/echo/predict/more").status_code == 404
    unknown = ask(served, "POST", "/rows/nobody/predict", body)
    assert unknown.status_code == 404
    assert "servable nobody is not available" in unknown.json()["error"]
    assert ask(served, "POST", "/rows/echo/predict", {"rows": 3}).status_code == 422
    assert "/rows/{servable}/{method}" in ask(served, "GET", "/").json()["paths"]


def test_its_calls_are_counted(served: Served) -> None:
    ask(served, "POST", "/rows/echo/predict", {"rows": [{"x": 1}]})
    text = ask(served, "GET", "/metrics").text
    labels = 'method="POST",protocol="Rows",route="/rows/{servable}/{method}"'
    assert re.search(rf'inflight_http_requests_total{{code="200",{re.escape(labels)}}} [1-9]', text), text
    assert f"inflight_http_request_seconds_count{{{labels}}}" in text


def test_the_document_is_valid_openapi(served: Served) -> None:
    document = ask(served, "GET", "/openapi.json").json()
    operation = document["paths"]["/rows/{servable}/{method}"]["post"]
    assert operation["tags"] == ["Rows"]
    assert operation["security"]
    schemathesis.openapi.from_dict(document).validate()
    schemathesis.openapi.from_dict(json.loads(openapi_document(DOORS, generators=True))).validate()
    document["paths"]["/rows"]["get"]["parameters"] = [{"name": "x", "in": "nowhere"}]
    with pytest.raises(Exception, match="nowhere"):
        schemathesis.openapi.from_dict(document).validate()


def test_a_server_is_told_its_name() -> None:
    server = Server(ServerConfig(protocols=(NAME,)))
    try:
        address = server.start_http(ListenConfig("127.0.0.1:0"))
        assert requests.get(f"http://{address}/rows", timeout=10).json() == {"paths": []}
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:Class", "cannot be imported: No module named 'nowhere'; write module:Class"),
        ("rows_protocol:Rows", "cannot be imported"),
        ("rows_protocol:RowsBody", "is no class of inflight.frontends.Door"),
    ],
)
def test_what_is_no_protocol_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_protocol(name)


def test_paths_of_other_protocols_are_refused() -> None:
    door = load_protocol(NAME)
    taken = type("Taken", (door,), {"below": ("/v2/",)})
    with (
        pytest.raises(ConfigError, match="'Rows' has the path /v2/, which is 'Open Inference Protocol's"),
        serve(protocols=[taken]),
    ):
        pass
