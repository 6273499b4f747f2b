"""What a server keeps of requests that are over: nothing, whichever door they came by and however they ended."""

from __future__ import annotations

import gc
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflight.config import GeneratorConfig, ListenConfig
from inflight.proto.open_inference_pb2 import ModelInferRequest
from inflight.server import Server
from tests.e2e.running import FREE, Running, eventually

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
FEW = {"max_new_tokens": 2, "do_sample": False}
ROUND = 40  # a multiple of 10


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """In this process, so that its objects can be counted."""
    server = Server()
    try:
        server.start_generators([GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=64 << 20)])
        yield Running(server, server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE)))
    finally:
        server.stop()


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def message(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def answer(raw: socket.socket, data: bytes) -> bytes:
    """Sends a request and reads its whole response."""
    raw.sendall(data)
    got = b""
    while True:
        got += raw.recv(1 << 16)
        head, end, body = got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and (len(body) >= int(length) if length else got.endswith(b"0\r\n\r\n")):
            return got


def whole(running: Running) -> None:
    with connected(running.http) as raw:
        for _ in range(ROUND):
            assert b" 200 " in answer(raw, message("/generate", {"inputs": "Once", "parameters": FEW}))


def streams(running: Running) -> None:
    with connected(running.http) as raw:
        for _ in range(ROUND):
            assert b" 200 " in answer(raw, message("/generate_stream", {"inputs": "Once", "parameters": FEW}))


def wrong(running: Running) -> None:
    with connected(running.http) as raw:
        for _ in range(ROUND):
            assert b" 422 " in answer(raw, message("/generate", {"inputs": "", "parameters": FEW}))


def reconnects(running: Running) -> None:
    for index in range(ROUND):
        with connected(running.http) as raw:
            if index % 2:
                answer(raw, message("/generate", {"inputs": "Once", "parameters": FEW}))


def leavers(running: Running) -> None:
    for index in range(ROUND):
        path = ("/generate", "/generate_stream", "/v1/completions")[index % 3]
        with connected(running.http) as raw:
            raw.sendall(message(path, {"inputs": "Once", "prompt": "Once", "parameters": {"max_new_tokens": 400}}))
            if index % 2:
                raw.settimeout(0.02)
                try:
                    raw.recv(100)
                except TimeoutError:
                    pass


def calls(running: Running) -> None:
    ask = ModelInferRequest(model_name="pocket")
    for name, text in {"inputs": "Once", "parameters": '{"max_new_tokens": 2}'}.items():
        ask.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    for _ in range(ROUND // 10):
        with grpc.insecure_channel(running.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(10):
                infer(ask.SerializeToString(), timeout=60)


def objects(running: Running) -> Counter[str]:
    """Objects of this process by type, once nothing is under way."""
    (engine,) = running.server._running_router().generators.values()
    eventually(lambda: not engine.streams and not engine.admission.used and not engine.admission.waiting)  # type: ignore[attr-defined]
    eventually(lambda: not running.server._running_router().in_flight)
    gc.collect()
    return Counter(type(one).__qualname__ for one in gc.get_objects())


@pytest.mark.parametrize("use", [whole, streams, wrong, reconnects, leavers, calls])
def test_nothing_is_kept(running: Running, use: Callable[[Running], None]) -> None:
    """What is made once (a module that is imported late, a thread's first run) does not grow a second time."""
    use(running)
    for last in (False, True):
        before = objects(running)

        def grown() -> Counter[str]:
            found = objects(running) - before  # noqa: B023 -- it is called in this turn only
            return Counter({name: count for name, count in found.items() if count >= ROUND})

        use(running)
        use(running)
        found = grown()
        if not found:
            return
        if last:  # a connection may still be about to close
            eventually(lambda: not grown(), 20, f"kept of {2 * ROUND} requests: {found}")
