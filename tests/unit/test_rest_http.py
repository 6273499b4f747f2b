"""The REST application on real sockets: under uvicorn's httptools protocol, and under the server's own connections."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
import pytest
import requests
import uvicorn
import uvloop

from inflight.config import ListenConfig, RestConfig
from inflight.contract import MethodInfo, Row
from inflight.frontends.mindspore import MindSporeRest
from inflight.wire.http.asgi import App
from inflight.wire.listen import listen_http
from tests.unit.http_fakes import Done

from .rest_fakes import PATH, Echo

LIMIT = 100_000
GOOD = b'{"instances":[{"x":[1,2]}]}'
ANSWER = {"instances": [{"y": [1, 2]}]}


class Gated(Echo):
    """Answers texts only after `gate`; counts what was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.cancelled = threading.Event()

    def submit(
        self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: Any = None
    ) -> Callable[[], None]:
        answer = super().submit
        if not isinstance(rows[0][0], str):
            return answer(method, rows, done, timeout=timeout)

        async def wait() -> None:
            try:
                while not self.gate.is_set():
                    await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            answer(method, rows, done, timeout=timeout)

        task = asyncio.get_running_loop().create_task(wait())
        self.waiting.set()

        def cancel() -> None:
            task.cancel()  # which leaves one that is done alone

        return cancel


class Server:
    """One application on a port, on an event loop of its own thread."""

    def __init__(self, serve: Callable[[App, Server], Any]) -> None:
        self.backend = Gated()
        self.app = MindSporeRest(self.backend, max_body_bytes=LIMIT, config=RestConfig())
        self.ready = threading.Event()
        self.stop = threading.Event()
        self.port = 0
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(self.app, self),))
        self._thread.start()
        assert self.ready.wait(10)

    def close(self) -> None:
        self.backend.gate.set()
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert not asyncio.all_tasks(self._loop)
        self._loop.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PATH.decode()}"

    def works(self) -> bool:
        return bool(requests.post(self.url, data=GOOD, timeout=5).json() == ANSWER)


async def under_uvicorn(app: App, server: Server) -> None:
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_level="critical", timeout_graceful_shutdown=1)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server.port = bound.getsockname()[1]
        running = uvicorn.Server(config)
        task = asyncio.ensure_future(running.serve(sockets=[bound]))
        while not running.started:
            await asyncio.sleep(0.005)
        server.ready.set()
        while not server.stop.is_set():
            await asyncio.sleep(0.02)
        running.should_exit = True
        await task


async def under_our_own(app: App, server: Server) -> None:
    listener = await listen_http(app, ListenConfig("127.0.0.1:0", max_message_mb=1))
    server.port = int(listener.address.rpartition(":")[2])
    server.ready.set()
    while not server.stop.is_set():
        await asyncio.sleep(0.02)
    await listener.close(0.1)


@pytest.fixture(params=[under_uvicorn, under_our_own], scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[Server]:
    running = Server(request.param)
    yield running
    running.close()


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    for event in (shared.backend.gate, shared.backend.waiting, shared.backend.cancelled):
        event.clear()
    yield shared
    shared.backend.gate.set()
    assert shared.works()  # whatever a client did, the next one is served


def head(length: int | None, verb: bytes = b"POST", more: bytes = b"") -> bytes:
    size = b"" if length is None else b"content-length: %d\r\n" % length
    return verb + b" " + PATH + b" HTTP/1.1\r\nhost: x\r\n" + size + more + b"\r\n"


def read_response(
    stream: socket.socket, rest: bytes = b"", verb: str = "POST"
) -> tuple[int, dict[str, str], Any, bytes]:
    """Status, headers, JSON and what was read beyond it."""
    while b"\r\n\r\n" not in rest:
        more = stream.recv(65536)
        assert more, f"closed after {rest!r}"
        rest += more
    top, _, rest = rest.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if verb == "HEAD":
        return int(status.split()[1]), headers, None, rest
    length = int(headers["content-length"])
    while len(rest) < length:
        more = stream.recv(65536)
        assert more, f"closed after {rest!r}"
        rest += more
    return int(status.split()[1]), headers, orjson.loads(rest[:length]), rest[length:]


def closed(stream: socket.socket) -> bool:
    try:
        return stream.recv(65536) == b""
    except ConnectionResetError:
        return True


def test_connections_are_kept(server: Server) -> None:
    with server.connect() as stream:
        for _ in range(3):
            stream.sendall(head(len(GOOD)) + GOOD)
            status, headers, reply, rest = read_response(stream)
            assert (status, reply, rest) == (200, ANSWER, b"")
            assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("verb", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("body", [None, GOOD])
def test_other_methods(server: Server, verb: str, body: bytes | None) -> None:
    with server.connect() as stream:
        for _ in range(2):
            stream.sendall(head(body and len(body), verb.encode()) + (body or b""))
            status, headers, reply, rest = read_response(stream, verb=verb)
            assert (status, rest) == (200, b"")
            assert headers["content-type"] == "application/json"
            assert verb == "HEAD" or "only support POST" in reply["error_msg"]


def test_pipelined(server: Server) -> None:
    bodies = [b'{"instances":{"x":%d}}' % i for i in range(5)] + [b"{"]
    with server.connect() as stream:
        stream.sendall(b"".join(head(len(body)) + body for body in bodies))
        rest = b""
        for i in range(5):
            _, _, reply, rest = read_response(stream, rest)
            assert reply == {"instances": [{"y": i}]}
        assert "Illegal JSON" in read_response(stream, rest)[2]["error_msg"]


@pytest.mark.parametrize("announced", [True, False])
def test_slow_body(server: Server, announced: bool) -> None:
    with server.connect() as stream:
        stream.sendall(head(len(GOOD)) if announced else head(None, more=b"transfer-encoding: chunked\r\n"))
        for i in range(len(GOOD)):
            stream.sendall(GOOD[i : i + 1] if announced else b"1\r\n" + GOOD[i : i + 1] + b"\r\n")
            time.sleep(0.002)
        if not announced:
            stream.sendall(b"0\r\n\r\n")
        assert read_response(stream)[2] == ANSWER


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /model/echo:echo HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n",
        b"POST /model/echo:echo HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /model/echo:echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n12",
        b"POST /model/echo:echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /model/echo\xff:echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /model/echo:echo HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
def test_malformed_http(server: Server, request_bytes: bytes) -> None:
    with server.connect() as stream:
        stream.sendall(request_bytes)
        stream.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while more := stream.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
    assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer)


@pytest.mark.parametrize("part", [1, 40, len(head(len(GOOD))), len(head(len(GOOD))) + 5])
def test_abandoned_requests(server: Server, part: int) -> None:
    for _ in range(10):
        with server.connect() as stream:
            stream.sendall((head(len(GOOD)) + GOOD)[:part])


def test_abandoned_work_is_cancelled(server: Server) -> None:
    body = b'{"instances":{"x":"wait"}}'
    with server.connect() as stream:
        stream.sendall(head(len(body)) + body)
        assert server.backend.waiting.wait(5)
        assert not server.backend.cancelled.wait(0.15)  # the client is there
    assert server.backend.cancelled.wait(5)


def test_slow_work_is_answered(server: Server) -> None:
    body = b'{"instances":{"x":"wait"}}'
    with server.connect() as stream:
        for _ in range(2):
            server.backend.gate.clear()
            stream.sendall(head(len(body)) + body)
            time.sleep(0.15)  # longer than the grace: the connection is watched
            server.backend.gate.set()
            assert read_response(stream)[2] == {"instances": [{"y": "wait"}]}


# Bodies over the limit.

TOO_BIG = f"http message is bigger than {LIMIT}"


def test_an_announced_oversize_is_answered_at_once(server: Server) -> None:
    with server.connect() as stream:
        stream.sendall(head(10**12))
        assert TOO_BIG in read_response(stream)[2]["error_msg"]


def test_an_expected_oversize_is_never_asked_for(server: Server) -> None:
    with server.connect() as stream:
        stream.sendall(head(LIMIT + 1, more=b"expect: 100-continue\r\n"))
        status, headers, reply, rest = read_response(stream)
        assert status == 200  # not 100
        assert TOO_BIG in reply["error_msg"]
        assert headers["connection"] == "close"
        assert rest == b""
        assert closed(stream)


def test_an_expected_body_is_asked_for(server: Server) -> None:
    with server.connect() as stream:
        for _ in range(2):
            stream.sendall(head(len(GOOD), more=b"expect: 100-continue\r\n"))
            assert stream.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            stream.sendall(GOOD)
            assert read_response(stream)[2] == ANSWER


def test_a_chunked_oversize_is_answered(server: Server) -> None:
    piece = b"%x\r\n" % 8192 + b" " * 8192 + b"\r\n"
    with server.connect() as stream:
        stream.sendall(head(None, more=b"transfer-encoding: chunked\r\n"))
        for _ in range(LIMIT // 8192 + 1):
            stream.sendall(piece)
        assert TOO_BIG in read_response(stream)[2]["error_msg"]


@pytest.mark.parametrize("size", [LIMIT + 1, 20 * LIMIT])
def test_clients_that_send_all_first_read_the_text(server: Server, size: int) -> None:
    with requests.Session() as session:
        for _ in range(2):
            assert TOO_BIG in session.post(server.url, data=b" " * size, timeout=5).json()["error_msg"]
            assert session.post(server.url, data=GOOD, timeout=5).json() == ANSWER
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("POST", PATH.decode(), b" " * size)
    assert TOO_BIG in orjson.loads(connection.getresponse().read())["error_msg"]
    connection.close()


def test_clients_that_close_after_each_request(server: Server) -> None:
    with urllib.request.urlopen(server.url, GOOD, timeout=5) as response:
        assert orjson.loads(response.read()) == ANSWER


def test_many_at_once(server: Server) -> None:
    replies: list[Any] = [None] * 16

    def ask(i: int) -> None:
        with requests.Session() as session:
            for _ in range(10):
                replies[i] = session.post(server.url, data=b'{"instances":{"x":%d}}' % i, timeout=10).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(replies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [{"instances": [{"y": i}]} for i in range(len(replies))]
