"""The rest of TGI's surface: clouds, API key, CORS, the launcher, the OpenAPI document and its page, limits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from tests import sentence_folders
from tests.e2e.running import Served, connect, eventually, free_port, get, request, serve
from tests.grpc_server import ENGINES

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"
JSON = {"Content-Type": "application/json"}
KEY = "s3cret-Key"
PROMPT = "Once upon a time, there was a young cat called Mia."
CHAT = {"messages": [{"role": "user", "content": "What is Inflight?"}], "temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(
        tmp_path_factory.mktemp("open"), str(POCKET), "--kv-cache-memory", "32m", "--max-total-tokens", "512"
    ) as one:
        yield one


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key, one allowed origin, small bodies and no grammars."""
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "512", "--api-key", KEY]
    options += ["--cors-allow-origin", "https://good.example", "--payload-limit", "5000", "--disable-grammar-support"]
    with serve(tmp_path_factory.mktemp("locked"), str(POCKET), *options) as one:
        yield one


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, data = request(address, "POST", path, json.dumps(body).encode(), {**JSON, **named})
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def head(
    address: str, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, dict[str, str]]:
    with contextlib.closing(connect(address, 30)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}


# Clouds


def test_vertex(served: Served) -> None:
    body = {"instances": [{"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "seed": 3}}, CHAT]}
    status, answer = post(served.http, "/vertex", body)
    assert status == 200
    first, second = answer["predictions"]
    assert post(served.http, "/vertex", {"instances": body["instances"][:1]})[1]["predictions"] == [first]
    assert "server" in second
    for wrong in ({}, {"instances": []}, {"instances": [3]}, {"instances": [{"inputs": ""}]}, []):
        status, answer = post(served.http, "/vertex", wrong)
        assert (status, answer["error_type"]) == (422, "validation")


def test_invocations(served: Served) -> None:
    parameters = {"max_new_tokens": 8}
    _, answer = post(served.http, "/invocations", {"inputs": "Once", "parameters": parameters})
    assert answer[0]["generated_text"].startswith("Once")
    _, chat = post(served.http, "/invocations", CHAT)
    assert chat["object"] == "chat.completion"
    _, completion = post(served.http, "/invocations", {"prompt": "Once", "max_tokens": 4})
    assert completion["object"] == "text_completion"
    _status, data = request(
        served.http,
        "POST",
        "/invocations",
        json.dumps({"inputs": "Once", "stream": True, "parameters": parameters}).encode(),
    )
    assert data.count(b"data: ") == 8
    assert post(served.http, "/invocations", {"x": 1})[0] == 422


# Embeddings


def test_embeddings(served: Served) -> None:
    with openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0) as client:
        texts = ["Once upon a time", "What is prefill?", "Once upon a time"]
        found = client.embeddings.create(model="pocket", input=texts)
        first, second, third = (one.embedding for one in found.data)
        assert len(first) == 192
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
        assert first == pytest.approx(third, abs=1e-5) != second
        assert found.usage.prompt_tokens == found.usage.total_tokens > 6
        plain = client.embeddings.create(model="pocket", input=texts[0], encoding_format="float")
        assert plain.data[0].embedding == pytest.approx(first, abs=1e-5)
        short = client.embeddings.create(model="pocket", input=texts[0], dimensions=10)
        assert len(short.data[0].embedding) == 10
        assert sum(value * value for value in short.data[0].embedding) == pytest.approx(1, abs=1e-3)
        ids = client.embeddings.create(model="pocket", input=[[5, 6], [7]])
        assert ids.usage.prompt_tokens == 3
        for wrong in ({"input": []}, {"input": ""}, {"input": "a", "dimensions": 999}):
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="pocket", **wrong)  # type: ignore[arg-type]


def test_a_sentence_transformers_folder_is_served(tmp_path: Path) -> None:
    folder = sentence_folders.make(tmp_path / "tiny-bert", "prompts")
    recorded = json.loads(sentence_folders.RECORDED.read_text())["prompts"]
    texts = sentence_folders.TEXTS
    with serve(tmp_path, str(folder)) as one:

        def embed(**body: Any) -> tuple[int, Any]:
            return post(one.http, "/v1/embeddings", {"input": texts, "model": "tiny-bert", **body})

        for name, wanted in recorded.items():
            _, answer = embed(**{"prompt_name": name} if name else {})
            for found, vector in zip(answer["data"], wanted):
                assert found["embedding"] == pytest.approx(vector, abs=2e-5)
        _, answer = embed(dimensions=4)
        assert sum(value * value for value in answer["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)
        _, answer = embed(input=texts[2], truncate=5)
        assert answer["usage"]["prompt_tokens"] == 5
        for wrong, text in (
            ({"truncate": False}, "maximum context length is"),
            ({"prompt_name": "x"}, "its prompts are"),
        ):
            status, answer = embed(**wrong)
            assert status == 400
            assert text in answer["error"]["message"]
        status, answer = post(one.http, "/generate", {"inputs": "Once"})
        assert status == 422
        assert "/v1/embeddings" in answer["error"]


# Key and origins


def test_api_key(locked: Served) -> None:
    small = {"inputs": "Once", "parameters": {"max_new_tokens": 2}}
    assert post(locked.http, "/generate", small)[0] == 401
    for wrong in (f"Bearer {KEY.lower()}", f"Bearer {KEY}x", KEY, "Bearer", "Basic abc"):
        assert post(locked.http, "/generate", small, authorization=wrong)[0] == 401
    assert post(locked.http, "/generate", small, authorization=f"Bearer {KEY}")[0] == 200
    for path in (
        "/vertex",
        "/invocations",
        "/tokenize",
        "/v1/completions",
        "/v2/models/pocket/generate",
        "/model/pocket:generate",
    ):
        assert post(locked.http, path, {})[0] == 401
    for path in (
        "/",
        "/health",
        "/ping",
        "/info",
        "/metrics",
        "/v1/models",
        "/docs",
        "/openapi.json",
        "/v2/health/ready",
    ):
        assert request(locked.http, "GET", path)[0] == 200
    assert post(locked.http, "/chat_tokenize", {"messages": CHAT["messages"]})[0] == 200
    with openai.OpenAI(base_url=f"http://{locked.http}/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="pocket", prompt="Once", max_tokens=2)
    with openai.OpenAI(base_url=f"http://{locked.http}/v1", api_key=KEY, max_retries=0) as client:
        assert client.completions.create(model="pocket", prompt="Once", max_tokens=2).choices


@pytest.mark.parametrize("engine", ENGINES)
def test_api_key_over_grpc(engine: str, tmp_path: Path) -> None:
    from inflight.proto.ms_service_pb2 import PredictReply, PredictRequest

    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "512", "--api-key", KEY, "--grpc-engine", engine]
    with serve(tmp_path, str(POCKET), *options) as one, grpc.insecure_channel(one.grpc) as channel:
        predict = channel.unary_unary(
            "/mindspore.serving.proto.MSService/Predict", PredictRequest.SerializeToString, PredictReply.FromString
        )
        asked = PredictRequest(instances=[{}])
        asked.servable_spec.name, asked.servable_spec.method_name = "pocket", "generate"
        with pytest.raises(grpc.RpcError) as caught:
            predict(asked, timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        reply = predict(asked, timeout=10, metadata=[("authorization", f"Bearer {KEY}")])
        assert b"Cannot find input inputs" in reply.error_msg[0].error_msg
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=10) == b"\x08\x01"


def test_cors(served: Served, locked: Served) -> None:
    ask = {
        "Origin": "https://good.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for server in (served, locked):
        status, headers = head(server.http, "OPTIONS", "/generate", ask)
        assert status == 200
        assert "authorization" in headers["access-control-allow-headers"]
        assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-origin"] == "https://good.example"
    _, headers = head(locked.http, "OPTIONS", "/generate", {**ask, "Origin": "https://bad.example"})
    assert "access-control-allow-origin" not in headers
    _, headers = head(served.http, "GET", "/info", {"Origin": "https://any.example"})
    assert headers["access-control-allow-origin"] == "*"
    _, headers = head(served.http, "GET", "/info", {})
    assert "access-control-allow-origin" not in headers
    body = json.dumps({"inputs": "Once", "stream": True, "parameters": {"max_new_tokens": 3}}).encode()
    status, headers = head(served.http, "POST", "/", {**JSON, "Origin": "https://any.example"}, body)
    assert (status, headers["access-control-allow-origin"]) == (200, "*")
    # The short way for small requests has the header too.
    status, headers = head(
        served.http, "POST", "/v2/models/pocket/infer", {**JSON, "Origin": "https://any.example"}, b"{}"
    )
    assert headers["access-control-allow-origin"] == "*"


def test_limits_of_a_locked_server(locked: Served) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    assert post(locked.http, "/generate", {"inputs": "a" * 6000}, **key)[0] == 413
    body = {"inputs": "Once", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
    status, answer = post(locked.http, "/generate", body, **key)
    assert (status, answer["error_type"]) == (422, "validation")
    assert "grammar" in answer["error"]


# The document and its page


def test_openapi_document(served: Served) -> None:
    document = get(served.http, "/openapi.json")
    assert document == get(served.http, "/api-doc/openapi.json")
    assert document["openapi"].startswith("3.1")
    for path in (
        "/generate",
        "/v1/chat/completions",
        "/vertex",
        "/v2/models/{name}/generate",
        "/model/{name}:{method}",
    ):
        assert path in document["paths"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name
    status, page = request(served.http, "GET", "/docs")
    assert status == 200
    assert b"openapi.json" in page
    assert b"http://" not in page, "the page needs nobody else"
    assert b"https://" not in page


# The launcher


class Launched:
    """A running `text-generation-launcher` and its lines."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.http = f"127.0.0.1:{self.port}"
        program = Path(sys.executable).with_name("text-generation-launcher")
        command = [str(program), "--hostname", "127.0.0.1", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
        )
        self.lines: list[str] = []
        self._asked = False
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "Connected" in line:
                self._ready.set()

    def __enter__(self) -> Launched:
        assert self._ready.wait(60), self.lines
        return self

    def terminate(self) -> None:
        """Asks it once to end: a second time would end it at once."""
        if not self._asked:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)

    def __exit__(self, *error: object) -> None:
        self.terminate()
        assert self.process.wait(30) == 0, self.lines
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert "Terminated" in self.lines[-1]
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1)


def test_the_launcher() -> None:
    with Launched(
        "--model-id", str(POCKET), "--max-total-tokens", "512", "--max-input-length", "400", "--sharded", "false"
    ) as one:
        info = get(one.http, "/info")
        assert info["model_id"] == str(POCKET)
        assert (info["max_input_tokens"], info["max_total_tokens"]) == (400, 512)
        status, _answer = post(one.http, "/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 4}})
        assert status == 200
        body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 60}}).encode()
        with contextlib.closing(connect(one.http, 60)) as connection:
            connection.request("POST", "/generate_stream", body, JSON)
            response = connection.getresponse()
            response.readline()
            one.terminate()  # what runs is finished
            assert b'"generated_text":"' in response.read()


def test_googles_names_of_routes_and_port() -> None:
    from inflight.commands.launcher import read

    assert read([], {"AIP_HTTP_PORT": "8085"})["port"] == 8085
    # Names as Google's platform really makes them: below another protocol's.
    predict, alive = "/v1/endpoints/7/deployedModels/8:predict", "/v1/endpoints/7/deployedModels/8"
    names = {"AIP_PREDICT_ROUTE": predict, "AIP_HEALTH_ROUTE": alive}
    launched = Launched("--model-id", str(POCKET), "--max-total-tokens", "200", **names)
    seen: list[int] = []

    def generates() -> bool:
        """What a load balancer sees while the model loads."""
        with contextlib.suppress(OSError):
            seen.append(request(launched.http, "GET", alive)[0])
            seen.append(post(launched.http, "/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 1}})[0])
        return seen[-1:] == [200]

    eventually(generates, 60)
    with launched as one:
        assert {status for status in seen if status != 200} <= {503}, "nothing listens, or 503, until it can generate"
        assert request(one.http, "GET", alive)[0] == 200
        body = {"instances": [{"inputs": "Once", "parameters": {"max_new_tokens": 3}}]}
        assert len(post(one.http, predict, body)[1]["predictions"]) == 1


def test_the_launchers_environment(tmp_path: Path) -> None:
    template = tmp_path / "tokenizer_config.json"
    template.write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}!", "eos_token": "<|end|>"}))
    environment = {
        "MODEL_ID": str(POCKET), "MAX_TOTAL_TOKENS": "300", "MAX_BEST_OF": "7", "API_KEY": KEY, "JSON_OUTPUT": "true",
        "NUM_SHARD": "2", "HOSTNAME": "some-container", "VALIDATION_WORKERS": "3",
        "TOKENIZER_CONFIG_PATH": str(template),
    }  # fmt: skip
    with Launched(**environment) as one:
        assert all(json.loads(line)["level"] for line in one.lines)
        assert any("--validation-workers" in line for line in one.lines)
        info = get(one.http, "/info")
        assert (info["max_total_tokens"], info["max_best_of"]) == (300, 7)
        assert post(one.http, "/generate", {"inputs": "Once"})[0] == 401
        _, answer = post(one.http, "/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
        assert answer["templated_text"] == "Hi!"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--model-id"),
        (["--model-id", str(POCKET), "--quantize", "eetq"], "--quantize eetq is not supported"),
        (["--model-id", str(POCKET), "--port", "x"], "'x' is no int"),
        (["--model-id", str(POCKET), "--max-input-tokens", "5", "--max-input-length", "5"], "give one of them"),
        (
            ["--model-id", str(POCKET), "--lora-adapters", "x=/nowhere"],
            "'/nowhere' is no adapter: there is no such folder",
        ),
    ],
)
def test_what_the_launcher_refuses(arguments: list[str], text: str) -> None:
    program = Path(sys.executable).with_name("text-generation-launcher")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert text in done.stderr


def test_a_model_that_the_launcher_cannot_have() -> None:
    program = Path(sys.executable).with_name("text-generation-launcher")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(program), "--model-id", "nobody/nothing", "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set, and 'hf.co/nobody/nothing' is not in its cache" in done.stdout + done.stderr


def test_a_model_of_the_hubs_cache(tmp_path: Path) -> None:
    """What was fetched before is served without a network."""
    repository = tmp_path / "models--me--pocket"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(POCKET, repository / "snapshots" / ("a" * 40))
    arguments = ("--model-id", "me/pocket", "--huggingface-hub-cache", str(tmp_path), "--max-total-tokens", "200")
    with Launched(*arguments, HF_HUB_OFFLINE="1") as one:
        assert get(one.http, "/info")["model_id"] == "me/pocket"
        assert get(one.http, "/v1/models")["data"][0]["id"] == "me/pocket"


def test_health_while_nothing_is_wrong(served: Served) -> None:
    began = time.monotonic()
    eventually(lambda: request(served.http, "GET", "/health")[0] == 200)
    assert time.monotonic() - began < 10
