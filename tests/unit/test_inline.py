"""Small requests answered without a task give the same answers, and their callers may leave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest
import requests

from inflight.config import ListenConfig, RestConfig
from inflight.contract import MethodInfo, Row
from inflight.errors import Overloaded
from inflight.frontends import http_app
from inflight.metrics import Metrics
from inflight.wire import listen_http
from inflight.wire.http.connection import INLINE_BYTES
from tests.unit.http_fakes import Done, EchoBackend, Loop, until


class Callbacks(EchoBackend):
    """Answers `submit` in a later turn of the loop; methods called `hold` only when they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted = 0
        self.cancelled = 0
        self.full = False

    def submit(
        self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: object = None
    ) -> Callable[[], None]:
        if self.full:
            raise Overloaded("enqueued requests count exceeds the limit 1")
        self.submitted += 1
        handle = asyncio.get_running_loop().call_later(5 if self.held else 0, lambda: done([list(row) for row in rows]))

        def cancel() -> None:
            self.cancelled += not handle.cancelled()
            handle.cancel()

        return cancel

    held = False


class Running:
    def __init__(self, backend: EchoBackend) -> None:
        self.backend = backend
        self.loop = Loop()

        async def listen() -> str:
            app = http_app(backend, max_body_bytes=1 << 20, rest=RestConfig(), metrics=Metrics())
            self.listener = await listen_http(app, ListenConfig("127.0.0.1:0"))
            return self.listener.address

        self.address = self.loop.call(listen())

    def close(self) -> None:
        self.loop.call(self.listener.close(0))
        self.loop.stop()


@pytest.fixture
def callbacks() -> Iterator[Running]:
    running = Running(Callbacks())
    yield running
    running.close()


def paths(backend: EchoBackend) -> tuple[str, str]:
    method = backend.servables()[0].methods[0]
    return f"/model/{method.servable}:{method.name}", f"/v2/models/{method.servable}.{method.name}/infer"


def bodies(backend: EchoBackend) -> list[tuple[str, bytes]]:
    method = backend.servables()[0].methods[0]
    mindspore, oip = paths(backend)
    names = [spec.name for spec in method.inputs]
    good = {name: [[1.5, 2.5]] for name in names}
    tensors = [{"name": name, "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]} for name in names]
    return [
        (mindspore, json.dumps({"instances": [good, good]}).encode()),
        (mindspore, json.dumps({"instances": []}).encode()),
        (mindspore, b"{"),
        (mindspore + "x", json.dumps({"instances": good}).encode()),
        ("/nothing", json.dumps({"instances": good}).encode()),
        (oip, json.dumps({"inputs": tensors, "id": "7"}).encode()),
        (oip, json.dumps({"inputs": tensors, "outputs": [{"name": "no such"}]}).encode()),
        (oip, json.dumps({"inputs": []}).encode()),
        (oip.replace(".", ".x"), json.dumps({"inputs": tensors}).encode()),
        (oip + "/more", json.dumps({"inputs": tensors}).encode()),
    ]


def test_both_ways_give_the_same_answers(callbacks: Running) -> None:
    for path, body in bodies(callbacks.backend):
        inline = requests.post(f"http://{callbacks.address}{path}", data=body, timeout=5)
        # A body without a length has a task from its head on.
        plain = requests.post(f"http://{callbacks.address}{path}", data=iter([body]), timeout=5)
        assert (inline.status_code, inline.content) == (plain.status_code, plain.content), (path, body)
        assert dict(inline.headers) == dict(plain.headers), (path, body)
    assert isinstance(callbacks.backend, Callbacks)
    assert callbacks.backend.submitted == 4


def test_a_body_in_pieces_and_a_large_one_are_answered(callbacks: Running) -> None:
    path, body = bodies(callbacks.backend)[0]
    host, port = callbacks.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        for start in range(0, len(head + body), 17):
            raw.sendall((head + body)[start : start + 17])
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
    padded = body + b" " * INLINE_BYTES
    assert requests.post(f"http://{callbacks.address}{path}", data=padded, timeout=5).json()["instances"]
    assert isinstance(callbacks.backend, Callbacks)
    assert callbacks.backend.submitted == 2


def test_pipelined_requests_are_answered_in_order(callbacks: Running) -> None:
    path, body = bodies(callbacks.backend)[0]
    host, port = callbacks.address.rsplit(":", 1)
    request = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    bad = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(request + bad + request)
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 3 or not answers.endswith(b"}"):
            answers += raw.recv(1 << 16)
    kinds = [b"error_msg" in part for part in answers.split(b"HTTP/1.1 ")[1:]]
    assert kinds == [False, True, False]


def test_a_client_that_leaves_cancels_its_request(callbacks: Running) -> None:
    backend = callbacks.backend
    assert isinstance(backend, Callbacks)
    backend.held = True
    path, body = bodies(backend)[0]
    host, port = callbacks.address.rsplit(":", 1)
    raw = socket.create_connection((host, int(port)), timeout=5)
    raw.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: backend.submitted == 1)
    raw.close()
    until(lambda: backend.cancelled == 1)


def test_a_refusal_is_told(callbacks: Running) -> None:
    backend = callbacks.backend
    assert isinstance(backend, Callbacks)
    backend.full = True
    mindspore, oip = (bodies(backend)[index] for index in (0, 5))
    answer = requests.post(f"http://{callbacks.address}{mindspore[0]}", data=mindspore[1], timeout=5)
    assert (answer.status_code, list(answer.json())) == (200, ["error_msg"])
    answer = requests.post(f"http://{callbacks.address}{oip[0]}", data=oip[1], timeout=5)
    assert (answer.status_code, list(answer.json())) == (429, ["error"])
