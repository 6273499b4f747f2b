"""Models that requests load and that make room for each other: at each door, with aliases, splits and a default."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from inflight.config import Alias, ListenConfig, RoomConfig, ServerConfig
from inflight.errors import ConfigError
from inflight.proto import ms_service_pb2
from inflight.repository import Loaded, Names, leaving
from inflight.router.room import MADE_ROOM, YOUNG, held
from inflight.server import Server
from inflight.wire.http.connection import INLINE_BYTES
from tests.conftest import binary_model
from tests.e2e.running import FREE, Background, connect, eventually, get, request, workers, write_servable

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SMALL = {"kv_cache_memory": 16 << 20, "max_total_tokens": 256, "device_ids": (), "workers": 1}
JSON = {"Content-Type": "application/json"}

ECHO = """
    from inflight.servable import add_stage, register_method

    def same(x):
        return x

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(same, x, outputs_count=1)
"""
SLOW = "import time\ntime.sleep(0.8)\n"


@dataclass
class Here:
    server: Server
    http: str
    grpc: str

    def states(self) -> dict[str, list[tuple[int, str, str]]]:
        found: dict[str, list[tuple[int, str, str]]] = {}
        for each in self.server.models():
            found.setdefault(each.name, []).append((each.version, each.state.value, each.reason))
        return found

    def loaded(self) -> list[str]:
        return [name for name, entries in self.states().items() if any(entry[1] == "READY" for entry in entries)]

    def ask(self, path: str, body: Any, headers: dict[str, str] = JSON) -> tuple[int, Any]:
        status, answer = request(self.http, "POST", path, json.dumps(body).encode(), headers)
        return status, json.loads(answer)


def repository(folder: Path) -> None:
    write_servable(folder, "echo", ECHO)
    write_servable(folder, "other", ECHO)
    write_servable(folder, "broken", "import no_such_module")
    for version, kind in ((1, "Add"), (2, "Mul")):
        (folder / "net" / str(version)).mkdir(parents=True)
        (folder / "net" / str(version) / "model.onnx").write_bytes(binary_model(kind))
        (folder / "lm" / str(version)).mkdir(parents=True)
        for file in POCKET.iterdir():
            (folder / "lm" / str(version) / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("models")
    repository(folder)
    room = RoomConfig(
        on_demand=True,
        max_loaded=2,
        load_wait=60.0,
        aliases=("canary=net:1@75,net:2@25", "echoes=echo", "chat=lm:1", "both=lm:1@50,lm:2@50", "gone=lm:7"),
        default_model="lm",
    )
    before = workers()
    server = Server(ServerConfig(repositories=(folder,), admin=True, version_policy="all", room=room), SMALL)
    try:
        yield Here(server, server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE)))
    finally:
        server.stop()
    assert workers() == before


def echo(name: str = "echo") -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [3.0]}]}


def net(value: float = 3.0) -> dict[str, Any]:
    x = {"name": "x1", "datatype": "FP32", "shape": [1, 2, 2], "data": [value] * 4}
    return {"inputs": [x, {**x, "name": "x2"}]}


def by_ms_rest(here: Here) -> Any:
    return here.ask("/model/echo:predict", {"instances": [{"x": 3.0}]})[1]["instances"][0]["y"]


def by_ms_grpc(here: Here) -> Any:
    asked = ms_service_pb2.PredictRequest()
    asked.servable_spec.name, asked.servable_spec.method_name = "echo", "predict"
    item = asked.instances.add().items["x"]
    item.dtype, item.data = ms_service_pb2.MS_FLOAT32, np.float32(3.0).tobytes()
    with grpc.insecure_channel(here.grpc) as channel:
        call = channel.unary_unary("/mindspore.serving.proto.MSService/Predict")
        reply = ms_service_pb2.PredictReply.FromString(call(asked.SerializeToString(), timeout=60))
    assert not reply.error_msg, reply
    return np.frombuffer(reply.instances[0].items["y"].data, np.float32)[0]


def by_oip_rest(here: Here) -> Any:
    status, answer = here.ask("/v2/models/echo/infer", echo())
    assert status == 200, answer
    return answer["outputs"][0]["data"][0]


def by_oip_grpc(here: Here) -> Any:
    given = triton_grpc.InferInput("x", [1], "FP64")
    given.set_data_from_numpy(np.array([3.0]))
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        assert [each.name for each in client.get_model_metadata("echo").inputs] == ["x"]
        return client.infer("echo", [given]).as_numpy("y")[0]


def forget_echo(here: Here) -> None:
    if "echo" in here.loaded():
        here.server.unload("echo")
        here.server._running_router().models._models.clear()  # as if it had never been loaded
    assert "echo" not in here.loaded()


@pytest.mark.parametrize("door", [by_ms_rest, by_ms_grpc, by_oip_rest, by_oip_grpc])
def test_a_request_loads_its_model_at_each_door_of_servables(here: Here, door: Any) -> None:
    forget_echo(here)
    assert door(here) == 3.0
    assert "echo" in here.loaded()


def test_a_request_loads_its_language_model(here: Here) -> None:
    asked: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=f"http://{here.http}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["lm", "chat", "both", "gone"]  # nothing is loaded
        first = client.completions.create(model="chat", **asked)
        assert first.model == client.completions.create(model="chat", **asked).model
        assert first.model != client.completions.create(model="lm", **asked).model
        with pytest.raises(openai.NotFoundError, match="version 7"):
            client.completions.create(model="gone", **asked)
        assert sorted(entry[:2] for entry in here.states()["lm"]) == [(1, "READY"), (2, "READY")]
        for name in ("chat", "lm:1", "lm"):
            assert client.completions.create(model=name, **asked).choices[0].text == first.choices[0].text
        users = {client.completions.create(model="both", user="ann", **asked).model for _ in range(4)}
        assert len(users) == 1
        models = {client.completions.create(model="both", **asked).model for _ in range(4)}
        assert len(models) == 2, models
    for path in ("/v2/models/lm/versions/1/generate", "/v2/models/chat/generate"):
        status, answer = here.ask(path, {"text_input": "Once upon a time", "parameters": {"max_tokens": 8}})
        assert (status, answer["model_name"]) == (200, "lm")
        assert answer["text_output"] == first.choices[0].text
    (told,) = triton_http.InferenceServerClient(here.http).get_inference_statistics("lm")["model_stats"]
    success, infer = (told["inference_stats"][name] for name in ("success", "compute_infer"))
    assert told["inference_count"] == success["count"] >= 14
    assert 0 < infer["ns"] <= success["ns"]
    # It makes room for others, and is loaded again by a request that names no model.

    def others() -> bool:  # the one that was just loaded does not leave
        by_oip_rest(here)
        return here.ask("/v2/models/other/infer", echo())[0] == 200 and "lm" not in here.loaded()

    eventually(others)
    assert here.states()["lm"][0][2] == MADE_ROOM
    told = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 8}}
    assert here.ask("/generate", told)[1]["generated_text"] == first.choices[0].text
    eventually(others)
    status, answer = here.ask("/v1/completions", {**asked, "model": "lm:1"})  # by the name of a version, too
    assert (status, answer["choices"][0]["text"]) == (200, first.choices[0].text)
    here.server.unload("lm")


def test_language_models_take_turns_by_the_names_in_bodies(tmp_path: Path) -> None:
    """The request for one does not hold a place in the other, which has to leave first."""
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(POCKET)
    room = RoomConfig(on_demand=True, max_loaded=1, load_wait=60, default_model="one")
    server = Server(ServerConfig(repositories=(tmp_path,), room=room), SMALL)
    try:
        here = Here(server, server.start_http(ListenConfig(FREE)), "")
        asked = {"model": "one", "prompt": "Once", "max_tokens": 1}
        first = [Background(here.ask, "/v1/completions", asked) for _ in range(8)]
        assert [each.result(60)[0] for each in first] == [200] * 8  # all wait for the first look at the folders
        for name in ("one", "two"):
            status, answer = here.ask("/v1/completions", {"model": name, "prompt": "Once", "max_tokens": 1})
            assert (status, answer.get("model")) == (200, name), answer
        # Who names none means the default one, though another one is loaded and could answer.
        status, answer = here.ask("/v1/completions", {"prompt": "Once", "max_tokens": 1})
        assert (status, answer.get("model")) == (200, "one"), answer
    finally:
        server.stop()


def test_a_model_that_has_to_leave_while_a_body_comes_is_loaded_again(tmp_path: Path) -> None:
    for name in ("echo", "other"):
        write_servable(tmp_path, name, ECHO)
    room = RoomConfig(on_demand=True, max_loaded=1, load_wait=60)
    server = Server(ServerConfig(repositories=(tmp_path,), room=room), SMALL)
    try:
        here = Here(server, server.start_http(ListenConfig(FREE)), "")
        ms = {"instances": [{"x": 3.0}]}
        slow = [("/v2/models/echo/infer", json.dumps(echo())), ("/model/echo:predict", json.dumps(ms))]
        for path, short in slow:
            body = short + " " * INLINE_BYTES  # of a short one its whole body is awaited before anything else
            connection = connect(here.http)
            connection.putrequest("POST", path)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:10].encode())
            eventually(lambda: here.loaded() == ["echo"])
            eventually(lambda: here.ask("/v2/models/other/infer", echo())[0] == 200)
            assert here.loaded() == ["other"]
            connection.send(body[10:].encode())
            answer = connection.getresponse()
            assert (answer.status, b"3.0" in answer.read()) == (200, True)
            connection.close()
    finally:
        server.stop()


def test_the_least_recently_used_goes_first(here: Here) -> None:
    here.ask("/v2/models/net/infer", net())
    by_oip_rest(here)
    assert sorted(here.loaded()) == ["echo", "net"]
    time.sleep(YOUNG)
    here.ask("/v2/models/net/infer", net())
    assert here.ask("/v2/models/other/infer", echo())[0] == 200
    assert sorted(here.loaded()) == ["net", "other"]
    assert here.states()["echo"] == [(1, "UNAVAILABLE", MADE_ROOM)]


def test_no_request_is_lost_between_models_that_take_turns(here: Here) -> None:
    """Three models want two places, all the time."""
    failed: list[Any] = []

    def work(path: str, body: dict[str, Any]) -> None:
        for _ in range(6):
            status, answer = here.ask(path, body)
            if status != 200:
                failed.append(answer)

    paths = [("/v2/models/echo/infer", echo()), ("/v2/models/other/infer", echo()), ("/v2/models/net/infer", net())]
    threads = [Background(work, *each) for each in paths]
    for thread in threads:
        thread.result(120)
    assert failed == []
    assert len(here.loaded()) <= 2


def test_an_alias_splits_its_requests(here: Here) -> None:
    def answered(headers: dict[str, str]) -> float:
        status, answer = here.ask("/v2/models/canary/infer", net(), {**JSON, **headers})
        assert status == 200, answer
        return float(answer["outputs"][0]["data"][0])

    answers = Counter(answered({}) for _ in range(8))
    assert answers == {6.0: 6, 9.0: 2}  # 3 + 3 by version 1, 3 * 3 by version 2
    sticky = [{answered({"x-inflight-sticky": f"user {user}"}) for _ in range(3)} for user in range(6)]
    assert all(len(each) == 1 for each in sticky)
    assert here.ask("/model/echoes:predict", {"instances": [{"x": 3.0}]})[1]["instances"][0]["y"] == 3.0
    inputs = [triton_grpc.InferInput(name, [1, 2, 2], "FP32") for name in ("x1", "x2")]
    for each in inputs:
        each.set_data_from_numpy(np.full((1, 2, 2), 3, np.float32))
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        found = Counter(float(client.infer("canary", inputs).as_numpy("y").ravel()[0]) for _ in range(8))
        assert found == {6.0: 6, 9.0: 2}
        one = {
            float(client.infer("canary", inputs, parameters={"user": "ann"}).as_numpy("y").ravel()[0]) for _ in range(4)
        }
        assert len(one) == 1


@pytest.mark.parametrize("client", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_what_is_told_of_an_alias(here: Here, client: Any) -> None:
    """Its configuration loads the model; whether it is ready and its statistics are told, and load nothing."""
    forget_echo(here)
    told_as: dict[str, Any] = {} if client is triton_http else {"as_json": True}
    with client.InferenceServerClient(here.http if client is triton_http else here.grpc) as asked:
        assert not asked.is_model_ready("echoes")
        assert "echo" not in here.loaded()
        config = asked.get_model_config("echoes", **told_as)
        assert config.get("config", config)["name"] == "echo"
        assert asked.is_model_ready("echoes")
        (told,) = asked.get_inference_statistics("echoes", **told_as)["model_stats"]
        assert told["name"] == "echo"
        if client is triton_grpc:
            asked.get_trace_settings("echoes")


def test_what_cannot_be_loaded_is_told_at_each_door(here: Here) -> None:
    assert here.ask("/v2/models/nobody/infer", echo())[0] == 404
    status, answer = here.ask("/v2/models/broken/infer", echo())
    assert status == 503
    assert "no_such_module" in answer["error"]
    began = time.monotonic()
    assert "no_such_module" in here.ask("/model/broken:predict", {"instances": [{}]})[1]["error_msg"]
    with pytest.raises(InferenceServerException, match="no_such_module"):
        triton_http.InferenceServerClient(here.http).get_model_metadata("broken")
    with openai.OpenAI(base_url=f"http://{here.http}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="no_such_module") as caught:
            client.completions.create(model="broken", prompt="a")
        assert caught.value.status_code == 503
    assert time.monotonic() - began < 10  # the reason is remembered, the load is not tried again at once
    by_oip_rest(here)
    here.server.unload("echo")  # somebody wants it to be gone
    assert here.ask("/v2/models/echo/infer", echo())[0] == 404
    here.server.load("echo")


def test_requests_wait_in_a_bounded_line_for_so_long(tmp_path: Path) -> None:
    for name in ("slow", "late"):
        write_servable(tmp_path, name, SLOW + textwrap.dedent(ECHO))
    room = RoomConfig(on_demand=True, load_wait=0.3, load_queue=1, idle_timeout=0.6)
    server = Server(ServerConfig(repositories=(tmp_path,), room=room), {"device_ids": (), "workers": 1})
    try:
        here = Here(server, server.start_http(ListenConfig(FREE)), "")
        first = Background(here.ask, "/v2/models/slow/infer", echo())
        eventually(lambda: here.states()["slow"][0][1] == "LOADING")
        status, answer = here.ask("/v2/models/late/infer", echo())
        assert (status, "as many as may" in answer["error"]) == (429, True), answer
        status, answer = first.result(30)
        assert (status, "still being loaded" in answer["error"]) == (503, True), answer
        eventually(lambda: here.ask("/v2/models/slow/infer", echo())[0] == 200)
        eventually(lambda: here.loaded() == [])  # after its idle time
        eventually(lambda: here.states()["slow"] == [(1, "UNAVAILABLE", MADE_ROOM)])
        eventually(lambda: here.ask("/v2/models/slow/infer", echo())[0] == 200)
    finally:
        server.stop()


LEAVING = [
    ([], 5, None, 10, []),
    ([Loaded("a", 4, 1.0), Loaded("b", 4, 2.0)], 5, None, 10, ["a"]),
    ([Loaded("a", 4, 3.0), Loaded("b", 4, 2.0)], 7, None, 10, ["b", "a"]),
    ([Loaded("a", 4, 1.0, busy=True), Loaded("b", 4, 2.0)], 5, None, 10, ["b"]),
    ([Loaded("a", 4, 1.0, stays=True), Loaded("b", 4, 2.0)], 7, None, 10, None),
    ([Loaded("a", 4, 1.0), Loaded("b", 4, 2.0)], 1, 2, None, ["a"]),
    ([Loaded("a", 4, 1.0, stays=True)], 1, 1, None, None),
    ([Loaded("a", 4, 1.0, busy=True)], 1, 1, None, ["a"]),
]


@pytest.mark.parametrize(("loaded", "size", "most", "memory", "goes"), LEAVING)
def test_which_models_leave(
    loaded: list[Loaded], size: int, most: int | None, memory: int | None, goes: list[str] | None
) -> None:
    assert leaving(loaded, size, most, memory) == goes


def test_weights_decide_how_many_keys_go_where() -> None:
    names = Names([Alias.of("n=a@90,b@10"), Alias.of("m=a@80,b@20")])
    keys = [str(number) for number in range(4000)]

    def target(name: str, key: str) -> str:
        chosen = names.chosen(name, key)
        assert chosen is not None
        return chosen.model

    few = [key for key in keys if target("n", key) == "b"]
    more = [key for key in keys if target("m", key) == "b"]
    assert 300 < len(few) < 500
    assert 700 < len(more) < 900
    assert set(few) <= set(more)  # nobody goes back
    assert names.chosen("a") is None
    assert held([threading.get_native_id()]) > 1 << 20
    for texts, wanted in ((("a=b", "b=c"), "is an alias, too"), (("a=b", "a=c"), "given twice")):
        with pytest.raises(ConfigError, match=wanted):
            Names([Alias.of(text) for text in texts])
    for text in ("a", "=b", "a=", "a=b@0", "a=b@x"):
        with pytest.raises(ValueError, match="write NAME=MODEL"):
            Alias.of(text)


def test_a_server_tells_its_state(here: Here) -> None:
    assert get(here.http, "/health/ready")["ready"] is True
