"""A request's body is let go once it is read: a crowd of large requests costs what they say."""

from __future__ import annotations

import gc
import json
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from inflight.config import GeneratorConfig, ServerConfig
from inflight.link import Arena
from inflight.proto.ms_service_pb2 import PredictRequest
from inflight.proto.open_inference_pb2 import ModelInferRequest
from tests.e2e.running import Background, Running, eventually, request, running, workers
from tests.grpc_server import ENGINES

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SIZE = 1_900_000
"""Bytes of each request; what it says takes a hundred."""
GENERATE = {"inputs": "Once", "parameters": {"max_new_tokens": 2}}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
DOORS: list[tuple[str, Any]] = [
    ("/generate", GENERATE),
    ("/generate_stream", GENERATE),
    ("/", GENERATE),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 2}),
    ("/v1/responses", {"input": "Once", "max_output_tokens": 2}),
    ("/model/pocket:generate", {"instances": [GENERATE]}),
    ("/model/pocket:generated_stream", {"instances": GENERATE}),
    ("/models/pocket/generate", GENERATE),
    ("/models/pocket/generate_stream", GENERATE),
    ("/v2/models/pocket/generate", {"text_input": "Once", "parameters": {"max_tokens": 2}}),
    ("/v2/models/pocket/generate_stream", {"text_input": "Once", "parameters": {"max_tokens": 2}}),
    ("/v2/models/pocket/infer", {"inputs": [{"name": "inputs", "shape": [1], "datatype": "BYTES", "data": ["Once"]}]}),
    ("/vertex", {"instances": [GENERATE]}),
    ("/invocations", GENERATE),
    ("/invocations", CHAT),
    ("/invocations", {"prompt": "Once", "max_tokens": 2}),
]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[str], tuple[Running, int]]]:
    """Gives the server with an engine of the gRPC door, and its rank."""
    started: dict[str, tuple[Running, int]] = {}
    with ExitStack() as stack:

        def with_engine(engine: str) -> tuple[Running, int]:
            if engine not in started:
                before = workers()
                it = stack.enter_context(running(config=ServerConfig(grpc_engine=engine)))
                it.server.start_generators([GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=16 << 20)])
                (rank,) = set(workers()) - set(before)
                started[engine] = it, rank
            return started[engine]

        yield with_engine


def generations(it: Running) -> int:
    """That are under way."""
    _, _, event = request(it.http, "GET", "/serving/get_request_numbers")[1].partition(b"data: ")
    return int(json.loads(event)["data"])


def requests_held() -> int:
    return sum(type(one) in (ModelInferRequest, PredictRequest) for one in gc.get_objects())


def inbox(it: Running) -> Arena:
    router = it.server._router
    assert router is not None
    return router.fleet.inbox


def check_let_go(served: tuple[Running, int], call: Callable[[], Any]) -> Any:
    """While `call` is answered nothing of its request's size is held. Returns what it returned."""
    it, rank = served
    call()  # what is loaded at the first time stays
    eventually(lambda: generations(it) == 0)
    held = requests_held()
    tracemalloc.start()
    os.kill(rank, signal.SIGSTOP)
    try:
        before, _ = tracemalloc.get_traced_memory()
        answer = Background(call)
        eventually(lambda: generations(it) == 1)
        # Large bodies lie in memory that workers share; a connection may have more to say, and holds nothing meanwhile.
        assert inbox(it).in_use == 0, "the body is held"
        grown = tracemalloc.get_traced_memory()[0] - before
        assert grown < SIZE // 2, f"{grown} bytes are held"
        assert requests_held() == held
    finally:
        os.kill(rank, signal.SIGCONT)
        tracemalloc.stop()
    return answer.result()


@pytest.mark.parametrize(("path", "body"), DOORS, ids=[f"{path} {len(str(body))}" for path, body in DOORS])
def test_over_http(served: Callable[[str], tuple[Running, int]], path: str, body: Any) -> None:
    it = served("grpcio")
    data = json.dumps(body).encode().ljust(SIZE)
    headers = {"Content-Type": "application/json"}
    status, answer = check_let_go(it, lambda: request(it[0].http, "POST", path, data, headers))
    assert status == 200, answer
    assert b"error" not in answer.replace(b'"error":null', b"")


def padded(message: Message) -> bytes:
    """A message with a field of `SIZE` bytes that its type does not know."""
    size, head = SIZE, bytearray([0xA2, 0x06])  # field 100, of bytes
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return message.SerializeToString() + bytes(head) + bytes([size]) + bytes(SIZE)


def oip(stream: bool = False) -> bytes:
    ask = ModelInferRequest(model_name="pocket")
    for name, text in {"inputs": "Once", "parameters": '{"max_new_tokens": 2}'}.items():
        ask.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    if stream:
        ask.parameters["stream"].bool_param = True
    return padded(ask)


def mindspore() -> bytes:
    ask = PredictRequest()
    ask.servable_spec.name, ask.servable_spec.method_name = "pocket", "generate"
    item = ask.instances.add().items["inputs"]
    item.dtype = 13  # type: ignore[assignment]  # protobuf takes numbers
    item.bytes_val.append(b"Once")
    return padded(ask)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["infer", "stream", "stream of text", "MSService"])
def test_over_grpc(served: Callable[[str], tuple[Running, int]], engine: str, kind: str) -> None:
    it = served(engine)
    service = "/inference.GRPCInferenceService/"
    with grpc.insecure_channel(it[0].grpc) as channel:
        if kind == "MSService":
            data, call = mindspore(), channel.unary_unary("/mindspore.serving.proto.MSService/Predict")
        elif kind == "infer":
            data, call = oip(), channel.unary_unary(f"{service}ModelInfer")
        else:
            data = oip(stream=kind == "stream of text")
            both = channel.stream_stream(f"{service}ModelStreamInfer")

            def call(one: bytes, timeout: float) -> bytes:
                return b"".join(both(iter([one]), timeout=timeout))

        answer = check_let_go(it, lambda: call(data, timeout=60))
    assert answer
    assert b"error" not in answer
