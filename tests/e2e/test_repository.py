"""Models that come and go while the server serves: by each door, by the command, by Python, under load."""

from __future__ import annotations

import asyncio
import json
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from inflight.cli import main
from inflight.config import GeneratorConfig, ListenConfig, RoomConfig, ServerConfig
from inflight.config.parse import versions
from inflight.contract import ModelState
from inflight.errors import ConfigError, InflightError, NotFound, StartError
from inflight.proto.open_inference_pb2 import RepositoryModelLoadRequest
from inflight.repository import chosen
from inflight.server import Server
from tests.conftest import binary_model
from tests.e2e.running import FREE, Background, eventually, get, request, workers, write_servable

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SMALL = {"kv_cache_memory": 16 << 20, "max_total_tokens": 256}

ECHO = """
    from inflight.servable import add_stage, register_method
    import time

    def same(x):
        time.sleep(0.002)
        return x * {factor}

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(same, x, outputs_count=1)
"""


@dataclass
class Here:
    server: Server
    folder: Path
    http: str
    grpc: str

    def states(self) -> dict[str, list[tuple[int, str, str]]]:
        found: dict[str, list[tuple[int, str, str]]] = {}
        for each in self.server.models():
            found.setdefault(each.name, []).append((each.version, each.state.value, each.reason))
        return found

    def state(self, name: str) -> str:
        return self.states()[name][0][1]

    def echo(self, factor: float) -> None:
        (self.folder / "echo" / "servable_config.py").write_text(textwrap.dedent(ECHO.format(factor=factor)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("models")
    write_servable(folder, "echo", ECHO.format(factor=1))
    write_servable(folder, "broken", "import no_such_module")
    (folder / "add.onnx").write_bytes(binary_model("Add"))
    (folder / "pocket").symlink_to(POCKET)
    for version in (1, 3):
        (folder / "versions" / str(version)).mkdir(parents=True)
        (folder / "versions" / str(version) / "model.onnx").write_bytes(binary_model("Add" if version == 1 else "Mul"))
    (folder / "notes.txt").write_text("no model")
    before = workers()
    values = {**SMALL, "device_ids": (), "workers": 1}
    server = Server(ServerConfig(repositories=(folder,), admin=True), values)
    try:
        yield Here(server, folder, server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE)))
    finally:
        server.stop()
    assert workers() == before


@pytest.fixture(autouse=True)
def nothing_stays(here: Here) -> Iterator[None]:
    yield
    for name, entries in here.states().items():
        if entries[0][1] == "READY":
            here.server.unload(name)


class Load:
    """Threads that call as fast as they can until the end of the block; what they were answered."""

    def __init__(self, call: Callable[[], Any], threads: int = 3) -> None:
        self._call, self._stop = call, threading.Event()
        self.answers: list[Any] = []
        self.errors: list[Exception] = []
        self._threads = [Background(self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._call())
            except Exception as error:  # told at the end
                self.errors.append(error)

    def more(self, count: int = 30) -> None:
        """Waits for further answers."""
        goal = len(self.answers) + count
        eventually(lambda: len(self.answers) >= goal or self.errors, 60)

    def __enter__(self) -> Load:
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.result()


def tensor(module: Any, name: str, data: np.ndarray[Any, Any]) -> Any:
    given = module.InferInput(name, list(data.shape), {"float32": "FP32", "float64": "FP64"}[data.dtype.name])
    given.set_data_from_numpy(data)
    return given


X = np.arange(3, dtype=np.float32).reshape(1, 3)


def test_the_index_names_what_is_there(here: Here) -> None:
    index = triton_http.InferenceServerClient(here.http).get_model_repository_index()
    assert {each["name"] for each in index} == {"add", "broken", "echo", "pocket", "versions"}
    assert get(here.http, "/health/ready") == {"ready": True, "not_ready": []}  # nothing is loaded, as was wanted


@pytest.mark.parametrize("door", ["http", "grpc", "aio"])
def test_triton_clients_load_and_unload(here: Here, door: str) -> None:
    if door == "aio":
        asyncio.run(by_aio(here))
        return
    module = triton_http if door == "http" else triton_grpc
    client = module.InferenceServerClient(here.http if door == "http" else here.grpc)
    with pytest.raises(InferenceServerException, match="add"):
        client.infer("add", [tensor(module, "x1", X), tensor(module, "x2", X)])
    client.load_model("add")
    assert client.is_model_ready("add")
    inputs = [tensor(module, name, np.ones((1, 2, 2), np.float32)) for name in ("x1", "x2")]
    names = [each["name"] for each in client.get_model_metadata("add")["inputs"]] if door == "http" else ["x1", "x2"]
    assert names == ["x1", "x2"]
    assert client.infer("add", inputs).as_numpy("y").ravel()[0] == 2
    client.unload_model("add")
    eventually(lambda: here.state("add") == "UNAVAILABLE")
    assert not client.is_model_ready("add")
    assert here.states()["add"] == [(1, "UNAVAILABLE", "unloaded")]
    client.unload_model("add")  # once more changes nothing
    for name, wanted in (("nobody", "there is no model 'nobody'"), ("broken", "no_such_module")):
        with pytest.raises(InferenceServerException, match=wanted):
            client.load_model(name)
    assert here.states()["broken"][0][1] == "UNAVAILABLE"
    assert "no_such_module" in here.states()["broken"][0][2]


async def by_aio(here: Here) -> None:
    async with triton_aio.InferenceServerClient(here.grpc) as client:
        await client.load_model("echo")
        result = await client.infer("echo", [tensor(triton_grpc, "x", X)])
        assert np.array_equal(result.as_numpy("y"), X)
        index = await client.get_model_repository_index(as_json=True)
        assert {"name": "echo", "version": "1", "state": "READY"} in index["models"]
        await client.unload_model("echo")
        with pytest.raises(InferenceServerException, match="echo"):
            await client.infer("echo", [tensor(triton_grpc, "x", X)])


def echoed(here: Here, x: float = 1.0) -> float:
    body = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [x]}]}
    status, answer = request(here.http, "POST", "/v2/models/echo/infer", json.dumps(body).encode())
    assert status == 200, answer
    return float(json.loads(answer)["outputs"][0]["data"][0])


def test_a_servable_is_replaced_and_fails_to_be_under_load(here: Here) -> None:
    here.echo(1)
    here.server.load("echo")
    with Load(lambda: echoed(here)) as load:
        here.echo(2)
        here.server.load("echo")
        eventually(lambda: load.errors or load.answers[-1] == 2)
        (here.folder / "echo" / "servable_config.py").write_text("import no_such_module")
        with pytest.raises(StartError, match="no_such_module"):
            here.server.load("echo")
        state = here.states()["echo"]
        assert state[0][:2] == (1, "READY")
        assert "the last load failed" in state[0][2]
        assert "no_such" in state[0][2]
        load.more()
    here.echo(1)
    assert not load.errors
    assert set(load.answers) == {1.0, 2.0}
    assert load.answers[-1] == 2.0


def test_a_servable_is_unloaded_under_load(here: Here) -> None:
    here.server.load("echo")
    with Load(lambda: echoed(here)) as load:
        here.server.unload("echo")
        eventually(lambda: load.errors)
    assert all("404" in str(error) and "available" in str(error) for error in load.errors)


def test_versions_in_numbered_folders(here: Here) -> None:
    x = {"name": "x1", "datatype": "FP32", "shape": [1, 2, 2], "data": [3.0] * 4}
    body = json.dumps({"inputs": [x, {**x, "name": "x2"}]}).encode()

    def first() -> float:
        status, answer = request(here.http, "POST", "/v2/models/versions/infer", body)
        assert status == 200, answer
        return float(json.loads(answer)["outputs"][0]["data"][0])

    here.server.load("versions", version=1)
    assert first() == 6.0
    with Load(first) as load:
        here.server.load("versions")
        eventually(lambda: load.errors or load.answers[-1] == 9.0)
    assert not load.errors
    assert here.states()["versions"] == [(3, "READY", "")]
    with pytest.raises(NotFound, match="no version 2; it has: 1, 3"):
        here.server.load("versions", version=2)


def test_language_models_come_and_go_at_all_doors(here: Here) -> None:
    with openai.OpenAI(base_url=f"http://{here.http}/v1", api_key="none") as client:
        come_and_go(here, client)


def come_and_go(here: Here, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.list()
    answer = main(["models", "load", "pocket", "--address", here.http])
    assert answer == 0
    (model,) = client.models.list()
    asked: dict[str, Any] = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    status, body = request(here.http, "POST", "/generate", tgi(8), {"Content-Type": "application/json"})
    assert status == 200
    assert json.loads(body)["generated_text"] == text
    assert get(here.http, "/info")["model_id"].endswith(model.id)
    # A stream that runs while the model is unloaded comes to its end; who comes later is refused.
    stream = client.completions.create(**{**asked, "max_tokens": 200}, stream=True, extra_body={"ignore_eos": True})
    pieces = [next(stream).choices[0].text]
    assert main(["models", "unload", "pocket", "--address", here.http]) == 0
    rest = [piece.choices[0] for piece in stream if piece.choices]
    pieces += [choice.text for choice in rest]
    assert rest[-1].finish_reason == "length"
    assert "".join(pieces).startswith(text)
    with pytest.raises(openai.NotFoundError):
        client.models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**asked)
    assert request(here.http, "POST", "/generate", tgi(8), {"Content-Type": "application/json"})[0] == 404


def tgi(tokens: int) -> bytes:
    return json.dumps({"inputs": "Once upon a time", "parameters": {"max_new_tokens": tokens}}).encode()


def test_a_language_model_is_replaced_under_load(here: Here) -> None:
    here.server.load("pocket")
    old = here.server._running_router().generators["pocket"]

    def generated() -> str:
        status, body = request(here.http, "POST", "/generate", tgi(12), {"Content-Type": "application/json"})
        assert status == 200, body
        return str(json.loads(body)["generated_text"])

    with Load(generated) as load:
        here.server.load(GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=16 << 20))
        load.more()
        with pytest.raises(InflightError):
            here.server.load(GeneratorConfig.of(here.folder / "echo", "pocket"))
        load.more()
        eventually(lambda: not old.ready)
        load.more()
    assert not load.errors
    assert len(set(load.answers)) == 1
    assert here.states()["pocket"][0][:2] == (1, "READY")


def test_the_command_lists_loads_and_unloads(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "echo", "--address", here.http]) == 0
    assert main(["models", "list", "--address", f"http://{here.http}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "echo is loaded"
    assert [line.split()[:3] for line in lines if line.startswith("echo ")][1] == ["echo", "1", "READY"]
    assert any(line.split() == ["add", "-", "not", "loaded"] for line in lines) or here.state("add") == "UNAVAILABLE"
    assert main(["models", "unload", "echo", "--address", here.http]) == 0
    assert main(["models", "load", "nobody", "--address", here.http]) == 1
    assert "there is no model 'nobody'" in capsys.readouterr().err
    assert main(["models", "load"]) == 2


REFUSED = [
    ("add", {"version": 2}, 404, "no version 2; it has: 1"),
    ("add", {"version": "two"}, 400, "must be a number"),
    ("add", {"path": "/etc"}, 400, "none of the folders"),
    ("add", {"path": "../../etc/passwd"}, 400, "none of the folders"),
    ("add", {"path": "pocket"}, 400, "none of the folders"),  # a link that leads out of the folder
    ("add", {"path": "notes.txt"}, 404, "is no model"),
    ("add", {"config": "{}"}, 400, "not supported"),
    ("add", {"file:1/model.onnx": "AAAA"}, 400, "not supported"),
    ("add", {"rolling": True}, 400, "no language model that serves now"),
    ("add", {"rolling": "yes"}, 400, "must be true"),
    ("add", {"colour": "red"}, 400, "no parameter 'colour'"),
    ("", {}, 404, ""),
    ("nobody", {}, 404, "there is no model 'nobody'"),
    ("../echo", {}, 404, ""),
]


@pytest.mark.parametrize(("name", "parameters", "status", "text"), REFUSED)
def test_loads_that_are_refused(here: Here, name: str, parameters: dict[str, Any], status: int, text: str) -> None:
    body = json.dumps({"parameters": parameters}).encode()
    told, answer = request(here.http, "POST", f"/v2/repository/models/{name}/load", body)
    assert told == status, answer
    assert text in json.loads(answer)["error"]


def test_web_pages_change_nothing(here: Here) -> None:
    """A page of anybody's, in a browser beside the server, may send a POST without asking first."""
    path = "/v2/repository/models/add/load"
    port = here.http.rpartition(":")[2]
    rebound = {"Host": f"evil.example:{port}"}  # the name of a stranger that leads to this machine
    for origin, more in (
        ("https://evil.example", {}),
        ("null", {}),
        (f"http://evil.example:{port}", rebound),
        ("http://127.0.0.1:1", {}),
    ):
        for kind in ("text/plain", "application/json"):
            status, answer = request(here.http, "POST", path, b"", {"Origin": origin, "Content-Type": kind, **more})
            assert (status, "--cors-allow-origin" in json.loads(answer)["error"]) == (403, True)
    for path_of_adapters in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        headers = {"Origin": "https://evil.example", "Content-Type": "application/json"}
        assert request(here.http, "POST", path_of_adapters, b"{}", headers)[0] == 403
    assert here.state("add") != "READY"
    ask = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert request(here.http, "OPTIONS", path, b"", ask)[0] == 403
    assert request(here.http, "OPTIONS", "/v2/models/add/infer", b"", ask)[0] == 200  # calls are for all pages
    assert request(here.http, "POST", path, b"")[0] == 200
    assert request(here.http, "POST", path, b"", {"Origin": f"http://{here.http}"})[0] == 200  # the server's own page


def test_a_name_is_no_path(here: Here) -> None:
    """A servable's folder is found by its name, so a name that is given beside a path must be its own."""
    write_servable(here.folder.parent, "outside", "raise RuntimeError('it was run')")
    with grpc.insecure_channel(here.grpc) as channel:
        load = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
        for name in ("../outside", "renamed"):
            asked = RepositoryModelLoadRequest(model_name=name)
            asked.parameters["path"].string_param = "echo"
            with pytest.raises(grpc.RpcError, match="load 'echo' by that name"):
                load(asked.SerializeToString(), timeout=60)


def test_what_the_server_began_with_is_loaded_again_by_name(tmp_path: Path) -> None:
    config = GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=16 << 20)
    server = Server(ServerConfig(admin=True))
    try:
        server.announce((), (config,))
        server.start_generators((config,))
        server.unload("pocket")
        server.load("pocket")
        assert [each.state for each in server.models()] == [ModelState.READY]
    finally:
        server.stop()


def test_a_second_unload_waits_for_the_first(here: Here) -> None:
    here.server.load("echo")
    with Load(lambda: echoed(here)):
        first = Background(here.server.unload, "echo")
        here.server.unload("echo")
        assert here.state("echo") == "UNAVAILABLE"
        first.result(30)


def test_python_loads_any_path(here: Here, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.onnx").write_bytes(binary_model("Mul"))
    here.server.load(tmp_path / "elsewhere.onnx", name="mul", max_batch_size=4)
    assert here.state("mul") == "READY"
    here.server.unload("mul")
    here.server.load("mul")  # known by now
    assert here.state("mul") == ModelState.READY.value
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no model"):
        here.server.load(tmp_path / "empty")
    with pytest.raises(NotFound, match="no model 'nobody'"):
        here.server.unload("nobody")


def test_configuration_and_statistics_by_triton_clients(here: Here) -> None:
    here.server.load("add")
    http, rpc = triton_http.InferenceServerClient(here.http), triton_grpc.InferenceServerClient(here.grpc)
    wanted = {"binary_tensor_data", "model_repository", "model_configuration", "statistics", "trace", "logging"}
    assert wanted <= set(http.get_server_metadata()["extensions"])
    assert set(http.get_server_metadata()["extensions"]) == set(rpc.get_server_metadata().extensions)

    config = http.get_model_config("add")
    assert (config["name"], config["max_batch_size"] > 1000, config["platform"]) == ("add", True, "inflight")
    assert config["input"][0] == {"name": "x1", "data_type": "TYPE_FP32", "dims": [2, 2], "optional": False}
    told = rpc.get_model_config("add").config
    assert (told.name, told.max_batch_size) == ("add", config["max_batch_size"])
    assert [(each.name, each.data_type, list(each.dims)) for each in told.output] == [("y", 11, [2, 2])]

    before = http.get_inference_statistics("add")["model_stats"][0]
    inputs = [tensor(triton_http, name, np.ones((3, 2, 2), np.float32)) for name in ("x1", "x2")]
    for _ in range(4):
        http.infer("add", inputs)
    (after,) = http.get_inference_statistics("add")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 12
    assert 1 <= after["execution_count"] - before["execution_count"] <= 12
    success, infer = after["inference_stats"]["success"], after["inference_stats"]["compute_infer"]
    assert success["count"] - before["inference_stats"]["success"]["count"] == 4
    assert 0 < infer["ns"] <= success["ns"]
    assert abs(after["last_inference"] / 1000 - time.time()) < 600
    (same,) = rpc.get_inference_statistics("add").model_stats
    assert same.inference_count == after["inference_count"]
    assert {each.batch_size for each in same.batch_stats} == {each["batch_size"] for each in after["batch_stats"]}
    assert [each["name"] for each in http.get_inference_statistics()["model_stats"]] == ["add"]
    for client in (http, rpc):
        with pytest.raises(InferenceServerException, match="nobody"):
            client.get_inference_statistics("nobody")
        client.unregister_system_shared_memory()  # as Triton's examples begin
        client.unregister_cuda_shared_memory()
        with pytest.raises(InferenceServerException, match="shared memory"):
            client.register_system_shared_memory("region", "/key", 64)
        with pytest.raises(InferenceServerException, match="no traces"):
            client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
        with pytest.raises(InferenceServerException, match="--log-level"):
            client.update_log_settings({"log_verbose_level": 1})
    assert http.get_trace_settings("add")["trace_level"] == ["OFF"]
    assert list(rpc.get_trace_settings("add").settings["trace_level"].value) == ["OFF"]
    assert http.get_log_settings()["log_error"] is True
    assert rpc.get_log_settings().settings["log_error"].bool_param
    http.close()
    rpc.close()


TEXTS = """
    from inflight.servable import add_stage, register_method

    def shout(text: str, raw: bytes, other):
        assert type(text) is str and type(raw) is bytes, (type(text), type(raw))
        return text.upper(), raw + b"!", type(other).__name__

    @register_method(output_names=["loud", "more", "kind"])
    def predict(text, raw, other):
        return add_stage(shout, text, raw, other, outputs_count=3)
"""


def test_text_arrives_as_a_stage_declares_it(here: Here) -> None:
    if not (here.folder / "texts").exists():
        write_servable(here.folder, "texts", TEXTS)
    here.server.load("texts")
    data = {"text": ["größer".encode(), b"b"], "raw": [bytes([0xFF, 0]), b"text"], "other": [b"c", b"d"]}
    with triton_http.InferenceServerClient(here.http) as http, triton_grpc.InferenceServerClient(here.grpc) as rpc:
        for client, module in ((http, triton_http), (rpc, triton_grpc)):
            inputs = []
            for name, items in data.items():
                inputs.append(module.InferInput(name, [2], "BYTES"))
                inputs[-1].set_data_from_numpy(np.array(items, object))
            result = client.infer("texts", inputs)
            assert list(result.as_numpy("loud")) == ["GRÖSSER".encode(), b"B"]
            assert list(result.as_numpy("more")) == [bytes([0xFF, 0]) + b"!", b"text!"]
            assert list(result.as_numpy("kind")) == [b"ndarray", b"ndarray"]  # a function that says nothing
        shown = http.get_model_metadata("texts")["inputs"]
        assert [each["datatype"] for each in shown] == ["BYTES", "BYTES", "ANY"]
    body = {"inputs": [{"name": "text", "datatype": "FP32", "shape": [1], "data": [1.0]}]}
    body["inputs"] += [{"name": name, "datatype": "BYTES", "shape": [1], "data": ["a"]} for name in ("raw", "other")]
    status, answer = request(here.http, "POST", "/v2/models/texts/infer", json.dumps(body).encode())
    assert status == 400
    assert "the method takes BYTES" in json.loads(answer)["error"]
    # The other doors see the same texts.
    instance = {"text": "a", "raw": {"b64": "/wA="}, "other": 1}
    status, answer = request(here.http, "POST", "/model/texts:predict", json.dumps({"instances": [instance]}).encode())
    assert json.loads(answer)["instances"][0]["loud"] == "A", answer


def test_who_may_load(tmp_path: Path) -> None:
    keys = [
        {"name": "ann", "key": "k-ann", "admin": True, "models": ["digits"]},
        {"name": "bob", "key": "k-bob"},
    ]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    (tmp_path / "add.onnx").write_bytes(binary_model("Add"))
    room = RoomConfig(on_demand=True)
    server = Server(ServerConfig(repositories=(tmp_path,), admin=True, api_keys=str(tmp_path / "keys.json"), room=room))
    try:
        http, rpc = server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE))
        # Whoever shows no key, or one that may not call a model, does not make it load either.
        assert request(http, "GET", "/v2/models/add", b"")[0] == 404
        assert request(http, "POST", "/v2/models/add/infer", b"{}", {"authorization": "Bearer k-ann"})[0] == 403
        assert [each.state for each in server.models()] == [ModelState.KNOWN]
        with triton_grpc.InferenceServerClient(rpc) as client:
            for key, name, status, code in (
                ("", "digits", 401, "UNAUTHENTICATED"),
                ("wrong", "digits", 401, "UNAUTHENTICATED"),
                ("k-bob", "digits", 403, "PERMISSION_DENIED"),
                ("k-ann", "other", 403, "PERMISSION_DENIED"),
                ("k-ann", "digits", 404, "NOT_FOUND"),  # she may; there is none
            ):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                for verb in ("load", "unload"):
                    path = f"/v2/repository/models/{name}/{verb}"
                    assert request(http, "POST", path, b"{}", headers)[0] == status, (key, verb)
                    with pytest.raises(InferenceServerException) as raised:
                        getattr(client, f"{verb}_model")(name, headers=headers)
                    assert code in str(raised.value.status())
    finally:
        server.stop()


def test_without_admin_callers_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "add.onnx").write_bytes(binary_model("Add"))
    server = Server(ServerConfig(repositories=(tmp_path,)))
    try:
        http = server.start_http(ListenConfig(FREE))
        for verb in ("load", "unload"):
            status, answer = request(http, "POST", f"/v2/repository/models/add/{verb}", b"")
            assert status == 403
            assert "--admin" in json.loads(answer)["error"]
        assert main(["models", "load", "add", "--address", http]) == 1
        assert [each["name"] for each in json.loads(request(http, "POST", "/v2/repository/index", b"")[1])] == ["add"]
    finally:
        server.stop()


def test_a_folder_is_followed(tmp_path: Path) -> None:
    config = ServerConfig(repositories=(tmp_path,), watch=0.1, version_policy="latest:2")
    server = Server(config, {"device_ids": (), "workers": 1})

    def states() -> list[tuple[str, int, str]]:
        return [(each.name, each.version, each.state.value) for each in server.models()]

    def write(version: int, data: bytes) -> None:
        (tmp_path / "m" / str(version)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / str(version) / "model.onnx").write_bytes(data)

    try:
        server.watch()
        write(1, binary_model("Add"))
        eventually(lambda: states() == [("m", 1, "READY")], 60)
        write(2, binary_model("Add"))
        eventually(lambda: states() == [("m", 1, "READY"), ("m", 2, "READY")], 60)
        write(2, b"no model")
        eventually(lambda: any("last load failed" in each.reason for each in server.models()), 60)
        assert states() == [("m", 1, "READY"), ("m", 2, "READY")]
        shutil.rmtree(tmp_path / "m")
        eventually(lambda: states() == [("m", 2, "UNAVAILABLE")], 60)
    finally:
        server.stop()


def test_policies_of_versions() -> None:
    for policy, wanted in {
        "latest": [9],
        "latest:2": [3, 9],
        "latest:7": [1, 3, 9],
        "all": [1, 3, 9],
        "1,9": [1, 9],
        "4": [],
    }.items():
        assert chosen(policy, [1, 3, 9]) == wanted, policy
    for text in ("newest", "latest:0", "1,,2", "", "0"):
        with pytest.raises(ValueError, match="names no versions"):
            versions(text)


def test_bfloat16_is_read_exactly(here: Here) -> None:
    here.server.load("add")
    values = np.array([1.5, -0.0, 2.0**127, 2.0**-130], np.float32).reshape(1, 2, 2)  # each is a bfloat16
    with triton_http.InferenceServerClient(here.http) as http, triton_grpc.InferenceServerClient(here.grpc) as rpc:
        for client, module in ((http, triton_http), (rpc, triton_grpc)):
            wide, zero = module.InferInput("x1", [1, 2, 2], "BF16"), module.InferInput("x2", [1, 2, 2], "FP32")
            wide.set_data_from_numpy(values)
            zero.set_data_from_numpy(np.full_like(values, -0.0))
            assert client.infer("add", [wide, zero]).as_numpy("y").tobytes() == values.tobytes()
