"""What every door says of a model that is known and not loaded yet, and of one that starts anew."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from inflight.client import Client
from inflight.config import GeneratorConfig, ListenConfig, ServableConfig
from inflight.contract import ShardOffer
from inflight.engine.processes import ShardGroup
from inflight.server import Server
from tests.e2e.running import FREE, Background, connect, eventually, request, write_servable

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
JSON = {"Content-Type": "application/json"}

WORK = """
    from inflight.servable import add_stage, register_method

    def same(x):
        return x

    @register_method(output_names=["y"])
    def echo(x):
        return add_stage(same, x, outputs_count=1)
"""

TALKS = f"""
    from inflight.servable import add_stage, declare_generator, register_method

    pocket = declare_generator({str(POCKET)!r}, kv_cache_memory=16 << 20, max_total_tokens=256)

    def ask(name):
        return f"Once upon a time there was {{name}}.", '{{"max_new_tokens": 6}}'

    @register_method(output_names=["story"])
    def tell(name):
        prompt, parameters = add_stage(ask, name, outputs_count=2)
        return add_stage(pocket, prompt, parameters, outputs_count=1)
"""


@dataclass
class Door:
    """One server whose language models load when `load` is called."""

    server: Server
    http: str
    grpc: str
    servables: tuple[ServableConfig, ...]
    generators: tuple[GeneratorConfig, ...]
    gate: threading.Event

    def ask(self, verb: str, path: str, body: Any = None) -> tuple[int, Any, str | None]:
        """Status, JSON where the answer is some, and Retry-After."""
        connection = connect(self.http)
        try:
            connection.request(verb, path, None if body is None else json.dumps(body).encode(), JSON)
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("content-type", "")
            return (
                response.status,
                json.loads(data) if data and "json" in kind else data,
                response.headers.get("retry-after"),
            )
        finally:
            connection.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Announced, doors open, nothing started; ranks wait at a gate whenever they start."""
    root = tmp_path_factory.mktemp("loading")
    write_servable(root, "work", WORK)
    write_servable(root, "talks", TALKS)
    gate, load = threading.Event(), ShardGroup.start

    async def start(ranks: ShardGroup, *given: Any) -> ShardOffer:
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return await load(ranks, *given)

    patch = pytest.MonkeyPatch()
    patch.setattr(ShardGroup, "start", start)
    servables = ServableConfig(root, "work"), ServableConfig(root, "talks")
    generators = (GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=16 << 20, max_total_tokens=256),)
    server = Server()
    try:
        server.announce(servables, generators)
        http = server.start_http(ListenConfig(FREE))
        yield Door(server, http, server.start_grpc(ListenConfig(FREE)), servables, generators, gate)
    finally:
        gate.set()
        server.stop()
        patch.undo()


GENERATE = {"inputs": "Once", "parameters": {"max_new_tokens": 2}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
TEXT = {"name": "inputs", "datatype": "BYTES", "shape": [1], "data": ["Once"]}
LANGUAGE: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/", GENERATE),
    ("POST", "/generate", GENERATE),
    ("POST", "/generate_stream", GENERATE),
    ("POST", "/tokenize", {"inputs": "Once"}),
    ("POST", "/chat_tokenize", CHAT),
    ("GET", "/info", None),
    ("POST", "/invocations", GENERATE),
    ("POST", "/vertex", {"instances": [GENERATE]}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "model": "pocket", "stream": True}),
    ("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 2}),
    ("POST", "/v1/responses", {"input": "Hello"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/pocket", None),
    ("POST", "/model/pocket:generate", {"instances": [GENERATE]}),
    ("POST", "/model/pocket:generated_stream", {"instances": {"prompt": "Once", "max_new_tokens": 2}}),
    ("POST", "/models/pocket/generate", GENERATE),
    ("GET", "/serving/get_bs", None),
    ("GET", "/v2/models/pocket", None),
    ("GET", "/v2/models/pocket/ready", None),
    ("POST", "/v2/models/pocket/infer", {"inputs": [TEXT]}),
    ("POST", "/v2/models/pocket/generate", {"text_input": "Once", "parameters": {"max_tokens": 2}}),
)
CLASSIC: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/model/{}:{}", {"instances": [{"x": 1, "name": "Mia"}]}),
    ("GET", "/v2/models/{}/ready", None),
    ("GET", "/v2/models/{}", None),
)


def check_waiting(door: Door, name: str, method: str) -> None:
    """Every door says of a servable that it is on its way."""
    for verb, path, body in CLASSIC:
        status, answer, after = door.ask(verb, path.format(name, method), body)
        assert (status, after) == (503, "1"), (path, answer)
        assert answer
    stub_value = {"name": "Mia"} if name == "talks" else {"x": 1}
    with Client(door.grpc, name, method) as client:
        answer = client.infer(stub_value)
    assert "14" in str(answer)
    assert "being loaded" in str(answer)
    with grpc.insecure_channel(door.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        found = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with triton_grpc.InferenceServerClient(door.grpc) as triton:
        assert not triton.is_model_ready(name)
        assert not triton.is_server_ready()
        with pytest.raises(InferenceServerException, match="UNAVAILABLE") as caught:
            triton.get_model_metadata(name)
        assert "being loaded" in str(caught.value)


def check_language_models_wait(door: Door) -> None:
    for verb, path, body in LANGUAGE:
        status, answer, after = door.ask(verb, path, body)
        assert (status, after) == (503, "1"), (path, answer)
        assert isinstance(answer, dict), path
    assert door.ask("POST", "/generate", GENERATE)[1]["error_type"] == "unavailable"
    assert door.ask("POST", "/v1/completions", {"prompt": "a"})[1]["error"]["type"] == "service_unavailable"
    assert "error_msg" in door.ask("POST", "/model/pocket:generate", {"instances": ["Once"]})[1]


def check_not_ready(door: Door, missing: list[str]) -> None:
    assert door.ask("GET", "/health/live")[0] == door.ask("GET", "/v2/health/live")[0] == 200
    assert door.ask("GET", "/health") == (503, {"error": "unhealthy", "error_type": "healthcheck"}, None)
    assert door.ask("GET", "/ping")[0] == door.ask("GET", "/v2/health/ready")[0] == 503
    assert door.ask("GET", "/health/ready")[:2] == (503, {"ready": False, "not_ready": missing})
    assert door.ask("GET", "/v2/models/nobody/ready")[0] == 404
    with grpc.insecure_channel(door.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "mindspore.serving.proto.MSService"):
            found = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_from_announced_to_loaded(door: Door) -> None:
    check_not_ready(door, ["work/1", "talks/1", "pocket/1"])
    check_language_models_wait(door)
    for name, method in (("work", "echo"), ("talks", "tell"), ("pocket", "generate")):
        check_waiting(door, name, method)
    with openai.OpenAI(base_url=f"http://{door.http}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="being loaded"):
            client.completions.create(model="pocket", prompt="Once")
    index = door.ask("POST", "/v2/repository/index", {})[1]
    assert [(one["name"], one["state"], one["reason"]) for one in index] == [
        (name, "LOADING", "it is still being loaded") for name in ("work", "talks", "pocket")
    ]

    start = Background(door.server.start_servables, door.servables)
    echo = {"instances": [{"x": 1}]}
    eventually(lambda: door.ask("POST", "/model/work:echo", echo)[0] == 200, 60)
    # A servable waits for the model that it declares, however long its worker is up.
    eventually(lambda: "talks" in door.server._running_router().generators, 60)
    check_not_ready(door, ["talks/1", "pocket/1"])
    check_language_models_wait(door)
    for name, method in (("talks", "tell"), ("pocket", "generate")):
        check_waiting(door, name, method)
    assert door.ask("GET", "/v2/models/work/ready")[0] == 200

    door.gate.set()
    start.result()
    check_not_ready(door, ["pocket/1"])
    assert door.ask("POST", "/model/talks:tell", {"instances": [{"name": "Mia"}]})[1]["instances"][0]["story"]
    assert [one["id"] for one in door.ask("GET", "/v1/models")[1]["data"]] == ["talks"], "what can answer"
    assert door.ask("GET", "/v1/models/pocket")[0] == 503
    door.server.start_generators(door.generators)
    assert door.ask("GET", "/health")[0] == 200
    assert door.ask("GET", "/health/ready")[1] == {"ready": True, "not_ready": []}
    for verb, path, body in LANGUAGE:
        assert door.ask(verb, path, body)[0] == 200, path
    with triton_http.InferenceServerClient(door.http) as triton:
        assert triton.is_model_ready("pocket")
        assert triton.is_model_ready("talks")


def test_a_lost_model_is_not_ready_and_its_requests_wait(door: Door) -> None:
    models = door.server._running_router().fleet.language_models
    pids = [pid for name in ("talks", "pocket") for pid in models.pids(name)]
    door.gate.clear()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for path in ("/health", "/health/ready", "/v2/health/ready", "/v2/models/talks/ready", "/v2/models/pocket/ready"):
        eventually(lambda path=path: door.ask("GET", path)[0] == 503, 30, path)  # type: ignore[misc]
    assert door.ask("GET", "/health/live")[0] == 200
    generating = [each for each in LANGUAGE if "generat" in each[1] or "completions" in each[1] or "infer" in each[1]]
    generating.append(("POST", "/model/talks:tell", {"instances": [{"name": "Mia"}]}))
    calls = [Background(door.ask, *each) for each in generating]
    for verb, path, body in LANGUAGE:
        if (verb, path, body) not in generating and path not in ("/", "/invocations", "/vertex", "/v1/responses"):
            assert door.ask(verb, path, body)[0] == (503 if path.endswith("/ready") else 200), path
    assert not any(call.done for call in calls)
    door.gate.set()
    assert [call.result()[0] for call in calls] == [200] * len(calls)
    eventually(lambda: door.ask("GET", "/health/ready")[0] == 200, 30)


def test_scripts_of_mindspore_serving_read_its_words_until_it_is_there(tmp_path: Path) -> None:
    """They open the doors, start their servables and poll; nothing of it is announced."""
    gate = tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    write_servable(tmp_path, "slow", wait + textwrap.dedent(WORK))
    server = Server()
    try:
        http = server.start_http(ListenConfig(FREE))

        def ask() -> Any:
            status, data = request(http, "POST", "/model/slow:echo", b'{"instances": {"x": 1}}')
            assert status == 200
            return json.loads(data)

        assert "servable is not available" in ask()["error_msg"]
        start = Background(server.start_servables, [ServableConfig(tmp_path, "slow")])
        eventually(lambda: "still being loaded" in ask()["error_msg"], 30)
        assert "servable is not available" in ask()["error_msg"]
        assert request(http, "GET", "/health/ready")[0] == request(http, "GET", "/health")[0] == 503
        gate.touch()
        start.result()
        assert ask() == {"instances": [{"y": 1}]}
    finally:
        gate.touch()
        server.stop()
