"""HTTP/1.1 with real sockets: bodies, the protocol's corners, slow and broken clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import requests
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.http_fakes import MB, Served, echo, limits, read_all, read_answer, serve


def exchange(served: Served, data: bytes, seconds: float = 5.0) -> bytes:
    """Sends raw bytes and reads until the server closes or says no more for a while."""
    with socket.create_connection((served.host, served.port), timeout=seconds) as raw:
        raw.sendall(data)
        raw.settimeout(0.3)
        return read_all(raw)


# Bodies


@pytest.fixture(scope="module", params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(app=echo, limits=limits(), factory=request.param) as served:
        yield served


@pytest.mark.parametrize("size", [0, 1, 65_536, 128 * 1024 - 1, 128 * 1024, 1_000_003, 17 * MB])
def test_bodies_come_back_whole(served: Served, size: int) -> None:
    body = os.urandom(size)
    with requests.Session() as session:
        for _ in range(3):  # on one connection: it must stay in step
            answer = session.post(f"http://{served.address}/", data=body, timeout=20)
            assert answer.content == body
            assert answer.headers["x-body"].startswith("memoryview" if size >= 128 * 1024 else "bytes")


def test_chunked_bodies(served: Served) -> None:
    parts = [os.urandom(size) for size in (1, 200_000, 3, 70_000)]
    answer = requests.post(f"http://{served.address}/", data=iter(parts), timeout=10)
    assert answer.content == b"".join(parts)


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    bodies = [b"first", b"", os.urandom(300_000), b"last"]
    request = b"".join(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(b), b) for b in bodies)
    with socket.create_connection((served.host, served.port), timeout=10) as raw:
        raw.sendall(request)
        reader = raw.makefile("rb")
        for body in bodies:
            assert read_answer(reader) == body
        reader.close()


@pytest.fixture(scope="module")
def kept(served: Served) -> Iterator[socket.socket]:
    with socket.create_connection((served.host, served.port), timeout=10) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield raw


@given(st.lists(st.integers(1, 200), max_size=30), st.integers(0, 400_000))
def test_any_split_of_the_bytes_is_the_same_request(kept: socket.socket, cuts: list[int], size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    data = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    at = 0
    for cut in cuts:
        kept.sendall(data[at : at + cut])
        at += cut
    kept.sendall(data[at:])
    with closing(kept.makefile("rb")) as reader:
        assert read_answer(reader) == body


def test_large_bodies_land_in_the_given_buffer() -> None:
    arena = memoryview(bytearray(20 * MB))
    asked: list[int] = []
    seen: list[int] = []

    def allocate(size: int) -> memoryview | None:
        asked.append(size)
        return arena[:size] if size < 8 * MB else None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        assert not message["more_body"]
        seen.append(np.frombuffer(body, np.uint8).ctypes.data)
        await echo(scope, lambda: _immediately(message), send)

    with serve(app=app, limits=limits(allocate=allocate)) as served:
        base = np.frombuffer(arena, np.uint8).ctypes.data
        for size in (2 * MB, 9 * MB):
            body = os.urandom(size)
            headers = {"inference-header-content-length": "37"}
            answer = requests.post(f"http://{served.address}/", data=body, headers=headers, timeout=10)
            assert answer.content == body
            assert (seen[-1] + 37) % 64 == 0
        assert base <= seen[0] < base + 64
        assert not base <= seen[1] < base + 20 * MB
        assert all(asked_for >= size for asked_for, size in zip(asked, (2 * MB, 9 * MB), strict=True))


async def _immediately(message: Any) -> Any:
    return message


def test_a_body_over_the_limit_is_refused_and_the_connection_lives_on() -> None:
    with serve(limits=limits(max_body_bytes=1 * MB)) as served, requests.Session() as session:
        for _ in range(2):  # a client that sends everything before it reads still sees the answer
            answer = session.post(f"http://{served.address}/model/echo:predict", data=bytes(8 * MB), timeout=10)
            assert f"http message is bigger than {1 * MB}" in answer.json()["error_msg"]
            answer = session.post(f"http://{served.address}/v2/models/echo/infer", data=bytes(8 * MB), timeout=10)
            assert answer.status_code == 413
            assert f"http message is bigger than {1 * MB}" in answer.json()["error"]
        chunks = iter([bytes(MB)] * 8)
        answer = session.post(f"http://{served.address}/v2/models/echo/infer", data=chunks, timeout=10)
        assert answer.status_code == 413


def test_expect_continue() -> None:
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    with serve(limits=limits(max_body_bytes=1000)) as served:
        with socket.create_connection((served.host, served.port), timeout=5) as raw:
            raw.sendall(head % 2)
            assert raw.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.sendall(b"{}")
            assert raw.recv(1000).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    with serve(app=echo) as served, socket.create_connection((served.host, served.port), timeout=5) as raw:
        raw.sendall(head % MB)  # one that is read in place
        assert raw.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(bytes(MB))
        with closing(raw.makefile("rb")) as reader:
            assert read_answer(reader) == bytes(MB)
    with serve(limits=limits(max_body_bytes=1000)) as served:
        refused = exchange(served, head % 2000)  # not asked for: the answer comes first
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close\r\n" in refused


# The protocol's corners


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_requests_get_one_json_answer(served: Served, data: bytes) -> None:
    answer = exchange(served, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 4\d\d ", head), answer
    assert json.loads(body)["error"] == json.loads(body)["error_msg"]


@given(st.binary(max_size=200))
def test_any_bytes_leave_the_server_serving(served: Served, data: bytes) -> None:
    for sent in (data, b"POST / HTTP/1.0\r\ncontent-length: 2\r\n\r\nok"):
        with socket.create_connection((served.host, served.port), timeout=5) as raw:
            raw.sendall(sent)
            if sent is data:
                raw.shutdown(socket.SHUT_WR)
            answer = read_all(raw)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert answer.endswith(b"ok")


def test_heads_have_a_limit(served: Served) -> None:
    many = b"".join(b"x-%d: %s\r\n" % (i, b"v" * 1000) for i in range(400))
    assert exchange(served, b"GET / HTTP/1.1\r\n" + many + b"\r\n").startswith(b"HTTP/1.1 431 ")
    assert exchange(served, b"GET /" + b"a" * 400_000).startswith(b"HTTP/1.1 431 ")


def test_old_clients_and_heads_and_upgrades(served: Served) -> None:
    old = exchange(served, b"POST / HTTP/1.0\r\ncontent-length: 2\r\n\r\nhi")
    assert old.endswith(b"\r\n\r\nhi")
    assert b"connection: close" in old
    head = exchange(served, b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert head.endswith(b"\r\n\r\n")
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    first = b"GET / HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n"
    second = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 5\r\n\r\nafter"
    assert exchange(served, first + second).endswith(b"\r\n\r\nafter")


def test_streams_without_a_length() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"", b"b" * 100_000):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    with serve(app=app) as served:
        answer = requests.get(f"http://{served.address}/", timeout=5)
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.content == b"a" + b"b" * 100_000
        old = exchange(served, b"GET / HTTP/1.0\r\n\r\n")
        assert old.endswith(b"\r\n\r\na" + b"b" * 100_000)


def test_an_application_that_fails_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        if scope["path"] != "/nothing":
            raise ValueError("secret")

    with serve(app=app) as served, requests.Session() as session:
        for path in ("/early", "/nothing"):
            answer = session.get(f"http://{served.address}{path}", timeout=5)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert answer.json()["error_msg"]
        with pytest.raises(requests.exceptions.RequestException):
            session.get(f"http://{served.address}/late", timeout=5)
    assert "ValueError: secret" in caplog.text


# Slow clients


def test_a_request_that_dribbles_in_is_cut() -> None:
    bounds = limits(read_timeout=0.4, min_rate=1e6)
    with serve(app=echo, limits=bounds) as served:
        for start in (
            b"POST /",
            b"POST / HTTP/1.1\r\nx: y\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 300000\r\n\r\n",
        ):
            with socket.create_connection((served.host, served.port), timeout=5) as raw:
                begin = time.monotonic()
                raw.sendall(start)
                answer = b""
                while not answer and time.monotonic() - begin < 4:
                    raw.settimeout(0.05)
                    try:
                        answer = raw.recv(1000)
                    except TimeoutError:
                        raw.sendall(b"x")  # never still for long, and yet too slow
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert 0.3 < time.monotonic() - begin < 4


@pytest.mark.alone
def test_a_slow_but_steady_sender_is_served() -> None:
    with serve(app=echo, limits=limits(read_timeout=0.5, min_rate=1000)) as served:
        with socket.create_connection((served.host, served.port), timeout=5) as raw:
            raw.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            for _ in range(10):
                raw.sendall(b"y" * 100)
                time.sleep(0.1)
            assert raw.recv(10_000).endswith(b"y" * 1000)


def test_a_client_that_does_not_take_its_answer_is_cut() -> None:
    with serve(app=echo, limits=limits(write_timeout=0.3)) as served:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.settimeout(5)
            raw.connect((served.host, served.port))
            raw.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (16 * MB) + bytes(16 * MB))
            time.sleep(1.2)
            assert len(read_all(raw)) < 16 * MB


@pytest.mark.alone
def test_idle_connections_are_closed_after_a_while_and_not_before() -> None:
    with serve(app=echo, limits=limits(idle_timeout=0.5)) as served:
        with socket.create_connection((served.host, served.port), timeout=5) as raw:
            for _ in range(4):
                time.sleep(0.25)
                raw.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nok")
                assert raw.recv(1000).endswith(b"ok")
            begin = time.monotonic()
            assert raw.recv(1000) == b""
            assert 0.3 < time.monotonic() - begin < 4


def test_nothing_runs_while_connections_are_idle() -> None:
    with serve(app=echo) as served:
        idle = [socket.create_connection((served.host, served.port)) for _ in range(200)]
        try:
            assert requests.post(f"http://{served.address}/", data=b"x", timeout=5).content == b"x"
            clock = time.pthread_getcpuclockid(served.loop.thread_id)
            before = time.clock_gettime(clock)
            time.sleep(1)
            assert time.clock_gettime(clock) - before < 0.002
        finally:
            for each in idle:
                each.close()
