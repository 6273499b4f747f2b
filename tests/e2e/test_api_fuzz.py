"""Bad input on every documented route (Schemathesis), and readers of streams that are slow, stop, or half close."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import schemathesis.specs.openapi.checks as openapi_checks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction

from inflight.frontends.app import DOORS
from inflight.frontends.openapi import openapi_document
from tests.e2e.running import Served, eventually, request, serve

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
INTENDED = (503, 504)
"""What a server may say of itself: not ready, or a deadline that a request gave itself."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Short answers, so that many can be asked for."""
    options = ["--kv-cache-memory", "8m", "--max-total-tokens", "72", "--max-concurrent-requests", "40"]
    with serve(tmp_path_factory.mktemp("fuzzed"), str(POCKET), *options) as one:
        yield one
        assert one.process.poll() is None


# The library's own pytest plugin does not work with this pytest; its strategies do.
SCHEMA = schemathesis.openapi.from_dict(json.loads(openapi_document(DOORS, generators=True)))
OPERATIONS = {operation.label: operation for operation in (found.ok() for found in SCHEMA.get_all_operations())}


def no_accident(ctx: Any, response: Any, case: Any) -> None:
    """No 5xx but those that are meant."""
    assert response.status_code < 500 or response.status_code in INTENDED, response.text


CHECKS: list[CheckFunction] = [
    no_accident,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.mark.parametrize("count", [40, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_route(label: str, count: int, served: Served) -> None:
    operation = OPERATIONS[label]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def ask(case: Any) -> None:
        response = case.call(base_url=f"http://{served.http}", timeout=60)
        case.validate_response(response, checks=CHECKS)

    ask()


def test_nothing_is_left_of_it(served: Served) -> None:
    """Run after the routes: no row, no waiting request, and the server answers."""
    calm(served)


def lines(served: Served) -> dict[str, float]:
    page = request(served.http, "GET", "/metrics")[1].decode()
    found = {}
    for line in page.splitlines():
        if line and line[0] != "#" and "{" not in line:
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def calm(served: Served) -> None:
    """No rows, blocks or requests are left, and forty fit at once, which a leak of any of them would prevent."""
    left = ["inflight_requests_in_flight", "tgi_queue_size"]
    left += ["tgi_batch_current_size", "tgi_batch_current_max_tokens"]
    eventually(lambda: not any(lines(served)[name] for name in left), 20)
    body = json.dumps({"prompt": ["Once"] * 4, "n": 10, "max_tokens": 4, "ignore_eos": True}).encode()
    status, data = request(served.http, "POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert status == 200, data
    assert len(json.loads(data)["choices"]) == 40


PATHS = {
    "/generate_stream": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 60}},
    "/": {"inputs": "Once", "stream": True, "parameters": {"max_new_tokens": 60}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 2},
    "/v1/completions": {"prompt": ["Once", "One"], "stream": True, "ignore_eos": True, "max_tokens": 60},
    "/v1/responses": {"input": "What is Inflight?", "stream": True},
    "/model/pocket:generated_stream": {"instances": ["Once", "One"]},
    "/models/pocket/generate_stream": {"inputs": "Once"},
    "/v2/models/pocket/generate_stream": {"text_input": "Once"},
}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(PATHS)),
    st.sampled_from(["stops", "resets", "half closes", "is slow", "sends more", "reads a little"]),
    st.integers(0, 3000),
)
def test_readers_of_streams(served: Served, path: str, kind: str, size: int) -> None:
    host, _, port = served.http.rpartition(":")
    body = json.dumps(PATHS[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.closing(socket.create_connection((host, int(port)), 30)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head.encode() + body)
        if kind == "stops":
            connection.recv(max(1, size))
        elif kind == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif kind == "half closes":
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        elif kind == "is slow":
            for _ in range(6):
                connection.recv(200)
                time.sleep(0.01)
        elif kind == "sends more":
            connection.sendall(random.Random(size).randbytes(100))
            connection.recv(100)
        else:
            connection.recv(1)


def test_nothing_is_left_of_the_readers(served: Served) -> None:
    calm(served)
