"""Whatever comes in, the server answers soon, lives on and does not grow."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inflight.client import Client
from inflight.proto import ms_service_pb2, open_inference_pb2
from tests.e2e.running import Served, ask, connect, eventually, get, in_flight, request, serve, workers, write_servable

SOON = 5.0
"""Seconds; an idle machine needs milliseconds."""
MIB = 1 << 20

TYPED = """
    import numpy as np
    from inflight.servable import add_stage, register_method

    def add(x1, x2):
        return x1 + x2

    @register_method(output_names=["y"])
    def predict(x1, x2):
        return add_stage(add, x1, x2, outputs_count=1)

    @register_method(output_names=["y"])
    def other(x1, x2):
        return add_stage(add, x1, x2, outputs_count=1)
"""

fuzz = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for every test, in a process of its own; it must come through all of them."""
    directory = tmp_path_factory.mktemp("bad")
    write_servable(directory, "sum", TYPED)
    with serve(directory, str(directory / "sum"), "--max-message-mb", "2", "--device-type", "cpu") as it:
        before = workers(it.pid)
        yield it
        check_well(it)
        assert workers(it.pid) == before, "a worker died"
        # Functions of the servable fail, and the log says where; nothing of the server does.
        assert not re.search(r'File ".*/inflight/.*", line', it.stderr.read_text())


def check_well(served: Served) -> None:
    answer = ask(served.http, "sum", "predict", x1=1, x2=2)
    assert answer == {"instances": [{"y": 3}]}
    with Client(served.grpc, "sum", "predict", timeout=60) as client:
        assert client.infer({"x1": 1, "x2": 2})[0]["y"] == 3
    eventually(lambda: in_flight(served.http) == 0)


def exchange(address: str, data: bytes, seconds: float = SOON) -> bytes:
    """Sends bytes, and no more after them; everything that comes back until the server closes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        with contextlib.suppress(OSError):  # the server may have closed by now
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


# Requests that are HTTP

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["x1", "x2", "instances", "b64", "type", "shape", ""])
NEAR = st.recursive(
    JSON | st.sampled_from(["AAAA", "float32", "int8", "bytes", "str", [1], [0], [-1], 2**40]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    NEAR.map(lambda value: json.dumps({"instances": value}).encode()),
    st.lists(st.fixed_dictionaries({"x1": NEAR, "x2": NEAR}), max_size=3).map(
        lambda value: json.dumps({"instances": value}).encode()
    ),
)
TENSORS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["x1", "x2", ""]) | JSON,
            "datatype": st.sampled_from(["FP32", "INT64", "BOOL", "BYTES", "FP16", "?"]) | JSON,
            "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
            "data": st.lists(st.integers(-1, 300), max_size=4) | JSON,
            "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "classification"]), JSON) | JSON,
        },
    ),
    max_size=3,
)
INFERS = st.one_of(
    BODIES,
    st.fixed_dictionaries(
        {"inputs": TENSORS | JSON},
        optional={"outputs": TENSORS | JSON, "parameters": JSON, "id": JSON},
    ).map(lambda value: json.dumps(value).encode()),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["content-encoding", "accept-encoding", "inference-header-content-length", "content-type", "connection"]
    ),
    st.sampled_from(["gzip", "deflate", "br", "0", "7", "100000", "-1", "close", "x", "application/json"]),
    max_size=2,
)
SEGMENTS = st.sampled_from(
    ["model", "sum", "version", "1", "0", "-1", "99999999999", ":", "predict", "/", "%", "%2f", "%00", "?", "..", "v2"]
    + ["models", "versions", "infer", "ready", "@call_x_0", "health", "metrics", "é", "repository", "index"]
)


def answered(served: Served, verb: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    connection = connect(served.http, SOON)
    try:
        connection.putrequest(verb, path, skip_accept_encoding=True)
        connection.putheader("content-length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        assert response.status in (200, 400, 404, 405, 413, 429, 500)
        if response.status == 500:
            assert b"internal server error" not in content
        if path.startswith("/v2") and response.status != 200:
            assert json.loads(content)["error"]
    finally:
        connection.close()


@fuzz
@given(body=BODIES, headers=HEADERS)
def test_any_body_of_a_rest_request(served: Served, body: bytes, headers: dict[str, str]) -> None:
    answered(served, "POST", "/model/sum:predict", body, headers)


@fuzz
@given(body=INFERS, headers=HEADERS)
def test_any_body_of_an_inference(served: Served, body: bytes, headers: dict[str, str]) -> None:
    answered(served, "POST", "/v2/models/sum/infer", body, headers)


@fuzz
@given(
    verb=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    path=st.lists(SEGMENTS, max_size=8).map(lambda parts: "/" + "".join(parts).encode().decode("latin-1")),
)
def test_any_url(served: Served, verb: str, path: str) -> None:
    head = f"{verb} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
    answer = exchange(served.http, head.encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 "), answer


# Bytes that are nothing


@fuzz
@given(data=st.binary(min_size=1, max_size=200) | st.text(max_size=50).map(lambda text: f"POST {text}\r\n".encode()))
def test_any_bytes_at_the_http_door(served: Served, data: bytes) -> None:
    start = time.monotonic()
    exchange(served.http, data)
    assert time.monotonic() - start < SOON


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAMES = st.lists(
    st.builds(
        lambda kind, flags, stream, payload: (
            len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
        ),
        st.integers(0, 12),
        st.integers(0, 255),
        st.integers(0, 5),
        st.binary(max_size=40),
    ),
    max_size=6,
).map(b"".join)


@fuzz
@given(data=st.binary(max_size=100) | FRAMES.map(lambda frames: PREFACE + frames))
def test_any_bytes_at_the_grpc_door(served: Served, data: bytes) -> None:
    start = time.monotonic()
    exchange(served.grpc, data)
    assert time.monotonic() - start < SOON


# Messages that are something else

MESSAGES: dict[str, Callable[[], Any]] = {
    "/mindspore.serving.proto.MSService/Predict": lambda: ms_service_pb2.PredictRequest(
        servable_spec={"name": "sum", "method_name": "predict"},
        instances=[
            {
                "items": {
                    "x1": {"shape": {"dims": [2]}, "dtype": 11, "data": bytes(8)},
                    "x2": {"shape": {"dims": [1]}, "dtype": 13, "bytes_val": [b"text"]},
                }
            }
        ],
    ),
    "/inference.GRPCInferenceService/ModelInfer": lambda: open_inference_pb2.ModelInferRequest(
        model_name="sum",
        inputs=[{"name": name, "datatype": "FP32", "shape": [1, 2]} for name in ("x1", "x2")],
        raw_input_contents=[bytes(8), bytes(8)],
    ),
}


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as it:
        yield it


@fuzz
@given(path=st.sampled_from(sorted(MESSAGES)), seed=st.integers(0, 2**32), blank=st.binary(max_size=60) | st.none())
def test_any_message_of_a_call(channel: grpc.Channel, path: str, seed: int, blank: bytes | None) -> None:
    """Messages of random bytes, and good ones with a few bytes changed, cut or doubled."""
    data = blank if blank is not None else damaged(MESSAGES[path]().SerializeToString(), random.Random(seed))
    call = channel.unary_unary(path).future(data, timeout=SOON)
    code, details = call.code(), call.details() or ""  # waits
    late = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
    assert code not in late, details
    assert "server's log" not in details


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed))
        kind = rng.randrange(3)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1 and len(changed) > 2:
            del changed[at : at + rng.randint(1, 4)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 8)]
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


# Sizes and speeds


def test_bodies_over_the_limit(served: Served) -> None:
    for path in ("/model/sum:predict", "/v2/models/sum/infer"):
        for length in (2 * MIB + 1, 10 * MIB):
            status, answer = request(served.http, "POST", path, bytes(length))
            assert status in (200, 413)
            assert b"http message is bigger than 2097152 bytes" in answer
    head = b"POST /model/sum:predict HTTP/1.1\r\nhost: x\r\n"
    assert b"bigger than" in exchange(served.http, head + b"content-length: 99999999999999\r\n\r\n{}")
    chunks = b"".join(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)) for _ in range(3))
    assert b"bigger than" in exchange(served.http, head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert b" 400 " in exchange(served.http, head + b"content-length: -5\r\n\r\n{}")[:20]
    assert b" 431 " in exchange(served.http, head + b"x: " + b"y" * MIB + b"\r\n\r\n")[:20]


def test_compressed_bodies_do_not_explode(served: Served) -> None:
    bomb = gzip.compress(bytes(200 * MIB), 9)
    assert len(bomb) < MIB
    server = psutil.Process(served.pid)
    before = server.memory_info().rss
    for _ in range(5):
        status, answer = request(served.http, "POST", "/v2/models/sum/infer", bomb, {"content-encoding": "gzip"})
        assert status == 413, answer
    assert server.memory_info().rss - before < 50 * MIB


def test_truncated_bodies_and_slow_ones(served: Served) -> None:
    body = json.dumps({"instances": {"x1": [1.0] * 300, "x2": [1.0] * 300}}).encode()
    head = b"POST /model/sum:predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    for cut in (0, 1, len(body) // 2, len(body) - 1):
        exchange(served.http, head + body[:cut])
    host, _, port = served.http.rpartition(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for connection in slow:
        connection.sendall(head)
    for start in range(0, len(body), 300):
        for connection in slow:
            connection.sendall(body[start : start + 300])
        check_well(served)  # nobody else waits for them
    for connection in slow:
        connection.settimeout(SOON)
        assert b"HTTP/1.1 200" in connection.recv(65536)
        connection.close()


def test_idle_and_abandoned_connections(served: Served) -> None:
    server = psutil.Process(served.pid)
    check_well(served)
    before = server.num_fds() if sys.platform == "linux" else 0
    hosts = [address.rpartition(":") for address in (served.http, served.grpc)]
    idle = [socket.create_connection((host, int(port))) for host, _, port in hosts for _ in range(200)]
    half = b"POST /model/sum:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n" + bytes(300_000)
    for connection in idle[:50]:
        connection.sendall(half)  # abandoned in the middle of a body
    start = time.monotonic()
    check_well(served)
    assert time.monotonic() - start < SOON
    assert get(served.http, "/health/live") == {"live": True}
    for connection in idle:
        connection.close()
    if sys.platform == "linux":
        eventually(lambda: server.num_fds() <= before)


# Growth


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_thousands_of_bad_requests_do_not_make_it_grow(served: Served, channel: grpc.Channel) -> None:
    server = psutil.Process(served.pid)
    processes = [server, *server.children()]
    call = channel.unary_unary("/mindspore.serving.proto.MSService/Predict")
    rng = random.Random(3)
    good = MESSAGES["/mindspore.serving.proto.MSService/Predict"]().SerializeToString()
    bodies = [
        b"",
        b"{",
        b'{"instances": [{"x1": 1}]}',
        b'{"instances": [{"x1": [1, "a"], "x2": 2}]}',
        b'{"instances": [{"x1": [1, 2], "x2": [1, 2, 3]}]}',
        b'{"instances": [{"x1": "text", "x2": 2}]}',
        b'{"instances": [{"x1": {"b64": "?"}, "x2": 2}]}',
        b"[" * 2000,
    ]

    def some(count: int) -> None:
        connection = connect(served.http)
        for number in range(count):
            path = f"/model/sum:predict{number % 7 or ''}" if number % 2 else f"/v2/models/sum/infer?{number}"
            connection.request("POST", path, bodies[number % len(bodies)] or b"\0")
            connection.getresponse().read()
            if number % 4 == 0:
                with contextlib.suppress(grpc.RpcError):
                    call(damaged(good, rng), timeout=SOON)
        connection.close()

    some(1000)
    before = [process.memory_info().rss for process in processes]
    some(4000)
    growth = [process.memory_info().rss - size for process, size in zip(processes, before)]
    assert max(growth) < 8 * MIB, growth
    check_well(served)
