"""Clients without mercy: far more connections than places, each of which asks again as soon as it is answered."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflight.proto.open_inference_pb2 import ModelInferRequest
from tests.e2e.running import Served, crowd, eventually, metrics, request, serve, workers

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
PLACES, CROWD, TURNS = 4, 40, 4
LONG = {"max_new_tokens": 900, "do_sample": False}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("overload"), str(POCKET), "--max-concurrent-requests", str(PLACES)) as one:
        yield one


def message(path: str, body: Any, padding: int = 0) -> bytes:
    data = json.dumps(body).encode() + b" " * padding
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Client:
    """A closed loop on one connection, or on a new one for each request."""

    def __init__(self, address: str, data: bytes, anew: bool = False) -> None:
        host, _, port = address.rpartition(":")
        self.address = host, int(port)
        self.anew = anew
        self.socket = socket.create_connection(self.address, timeout=30)
        self.data = data
        self.got = b""
        self.statuses: Counter[int] = Counter()
        self.slowest_refusal = 0.0
        self.body = b""
        self.send()

    def send(self) -> None:
        self.sent = time.monotonic()
        self.socket.sendall(self.data)

    def read(self, selector: selectors.BaseSelector) -> None:
        data = self.socket.recv(1 << 16)
        assert data, "the server closed a connection"
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            return
        status = int(head[9:12])
        if body.startswith(b'{"error_msg"'):  # MindSpore Serving's way, with status 200
            status = 429
        self.statuses[status] += 1
        if status != 200:
            self.slowest_refusal = max(self.slowest_refusal, time.monotonic() - self.sent)
        self.got, self.body = b"", body
        if self.anew:
            selector.unregister(self.socket)
            self.socket.close()
            self.socket = socket.create_connection(self.address, timeout=30)
            selector.register(self.socket, selectors.EVENT_READ, self)
        self.send()


def drive(clients: list[Client], seconds: float, turns: int) -> bool:
    """Lets them all go on until each has had so many good answers; False where that is not so in time."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(0.1):
                key.data.read(selector)
            if all(client.statuses[200] >= turns for client in clients):
                return True
    return False


TGI = "/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 8, "do_sample": False}}
MINDSPORE = "/model/pocket:generate", {"instances": {"inputs": "Once", "max_new_tokens": 8}}


@pytest.mark.parametrize(("asked", "anew"), [(TGI, False), (TGI, True), (MINDSPORE, False)])
def test_everybody_gets_a_turn_and_refusals_are_few(served: Served, asked: tuple[str, Any], anew: bool) -> None:
    clients = [Client(served.http, message(*asked), anew) for _ in range(CROWD)]
    try:
        assert drive(clients, 60, 1 if anew else TURNS), [client.statuses for client in clients]
    finally:
        for client in clients:
            client.socket.close()
    total = sum((client.statuses for client in clients), Counter[int]())
    assert set(total) == {200, 429}
    # Who asks again at once would be refused hundreds of times between two good answers.
    assert total[429] < 12 * total[200] + 5 * CROWD or anew
    assert max(client.slowest_refusal for client in clients) < 10
    if asked == MINDSPORE:
        return
    counted = metrics(served.http)["tgi_request_failure"]
    assert counted["overloaded",] >= total[429]


@pytest.fixture
def occupied(served: Served) -> Iterator[Served]:
    """All places are taken by long streams."""
    host, _, port = served.http.rpartition(":")
    (rank,) = workers(served.pid)

    def begins(stream: socket.socket) -> bool:
        """False where those who have left still take up the places."""
        stream.sendall(message("/generate_stream", {"inputs": "Once", "parameters": LONG}))
        return stream.recv(4096).startswith(b"HTTP/1.1 200 OK")

    for _ in range(20):
        with ExitStack() as stack:
            for _ in range(PLACES):
                stream = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
                eventually(lambda: begins(stream))  # noqa: B023
            os.kill(rank, signal.SIGSTOP)  # else they end while a test is under way
            stack.callback(os.kill, rank, signal.SIGCONT)
            if metrics(served.http)["tgi_batch_current_size"][()] == PLACES:  # on a busy machine one may have ended
                yield served
                return
    pytest.fail("the streams end before their rank is stopped")


FORMS = {
    "/generate": (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "/generate_stream": (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "/": (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "/vertex": (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "/models/pocket": (429, {"error": "Model is overloaded", "error_type": "overloaded"}),
    "/model/pocket:generate": (200, {"error_msg": "Model is overloaded"}),
    "/model/pocket:generated_stream": (200, {"error_msg": "Model is overloaded"}),
    "/v2/models/pocket/generate": (429, {"error": "Model is overloaded"}),
    "/v2/models/pocket/infer": (429, {"error": "Model is overloaded"}),
}


def test_each_protocol_refuses_in_its_own_form_before_the_body_is_here(occupied: Served) -> None:
    host, _, port = occupied.http.rpartition(":")
    openai = {"message": "Model is overloaded", "code": "rate_limit_exceeded", "http_status_code": 429}
    for path in (*FORMS, "/v1/chat/completions", "/v1/completions", "/v1/responses"):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(message(path, {}, 1_000_000)[:300])
            head, _, body = raw.recv(4096).partition(b"\r\n\r\n")
        status, document = int(head[9:12]), json.loads(body)
        if path in FORMS:
            assert (status, document) == FORMS[path], path
        else:
            assert status == 429
            assert {name: document["error"][name] for name in openai} == openai
        assert status == 200 or path.startswith("/v2") or b"retry-after: 1" in head


def test_what_needs_no_place_is_answered_meanwhile(occupied: Served) -> None:
    assert request(occupied.http, "GET", "/health")[0] == 200
    assert request(occupied.http, "GET", "/info")[0] == 200
    status, body = request(
        occupied.http, "POST", "/tokenize", b'{"inputs": "Once"}', {"Content-Type": "application/json"}
    )
    assert status == 200, body


def test_a_refused_body_is_dropped_and_the_connection_goes_on(occupied: Served) -> None:
    host, _, port = occupied.http.rpartition(":")
    upload = message("/generate", {"inputs": "Once"}, 1_000_000)
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        for _ in range(2):
            raw.sendall(upload)
            got = b""
            while b"}" not in got:
                got += raw.recv(4096)
            assert got.startswith(b"HTTP/1.1 429")
        raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_request_behind_a_refused_one_is_refused_before_its_body_is_here(occupied: Served) -> None:
    host, _, port = occupied.http.rpartition(":")
    upload = message("/generate", {"inputs": "Once"}, 1_000_000)
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        raw.sendall(upload + upload[:300])  # and never the rest
        got = b""
        while got.count(b"HTTP/1.1 429") < 2:
            data = raw.recv(4096)
            assert data, got
            got += data


def test_long_texts_do_not_hold_up_short_ones(served: Served) -> None:
    """Texts that are far too long: each is refused for what it is, and those who send them are heard less and less."""
    too_long = message("/generate", {"inputs": "once upon a time " * 4000})
    short = message("/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 4, "do_sample": False}})
    clients = [Client(served.http, too_long) for _ in range(CROWD)] + [Client(served.http, short) for _ in range(2)]
    try:
        good = clients[CROWD:]
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ, client)
            end = time.monotonic() + 60
            while not all(client.statuses[200] >= 10 for client in good) and time.monotonic() < end:
                for key, _ in selector.select(0.1):
                    key.data.read(selector)
        assert all(client.statuses[200] >= 10 for client in good), [client.statuses for client in clients]
        assert all(set(client.statuses) <= {422, 429} for client in clients[:CROWD])
        assert any(client.statuses[422] for client in clients[:CROWD])
    finally:
        for client in clients:
            client.socket.close()


def test_uploads_do_not_hold_up_short_ones(served: Served) -> None:
    """Both get their turns, also after clients that have left amid their bodies."""
    upload = message("/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 4, "do_sample": False}}, 400_000)
    short = message("/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 4, "do_sample": False}})
    host, _, port = served.http.rpartition(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(upload[:200_000])
    clients = [Client(served.http, upload) for _ in range(8)] + [Client(served.http, short) for _ in range(8)]
    try:
        assert drive(clients, 60, 1), [client.statuses for client in clients]
        assert all(set(client.statuses) <= {200, 429} for client in clients)
    finally:
        for client in clients:
            client.socket.close()


def call(address: str) -> tuple[str, str]:
    """One generation over gRPC on a connection of its own: the status' name and its text."""
    ask = ModelInferRequest(model_name="pocket")
    for name, text in {"inputs": "Once", "parameters": '{"max_new_tokens": 8}'}.items():
        ask.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            infer(ask.SerializeToString(), timeout=60)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def test_a_call_is_held_and_then_refused(occupied: Served) -> None:
    assert call(occupied.grpc) == ("RESOURCE_EXHAUSTED", "Model is overloaded")


def test_everybody_gets_a_turn_over_grpc(served: Served) -> None:
    refused: list[tuple[str, str]] = []

    def until_good(_index: int) -> None:
        for _ in range(3):
            while (answer := call(served.grpc))[0] != "OK":
                refused.append(answer)
                assert len(refused) < 20 * CROWD, "refusals are told after a pause, so that they are few"

    crowd(until_good, CROWD // 2)
    assert set(refused) <= {("RESOURCE_EXHAUSTED", "Model is overloaded")}
