"""What config.pbtxt says of a model: batches, labels, sequences, queues; asked by Triton's clients."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from inflight.config import ListenConfig, ServerConfig
from inflight.errors import ConfigError, StartError
from inflight.repository import described
from inflight.server import Server
from tests.conftest import binary_model
from tests.e2e.running import FREE, Background, request

SUM = """
name: "sum"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  control_input [ { name: "start" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] } ]
  state [ { input_name: "sum" output_name: "sum_out" data_type: TYPE_FP32 dims: [ 2 ] } ]
}
"""
LABELLED = """
max_batch_size: 4
input [
  { name: "x1" data_type: TYPE_FP32 dims: [ 2, 2 ] },
  { name: "x2" data_type: TYPE_FP32 dims: [ 2, 2 ] }
]
output { name: "y" data_type: TYPE_FP32 dims: [ 2, 2 ] label_filename: "labels.txt" }
dynamic_batching {
  preferred_batch_size: [ 4 ]
  max_queue_delay_microseconds: 1000
  default_queue_policy { max_queue_size: 64 }
}
version_policy: { specific { versions: [ 2 ] } }
optimization { graph { level: 1 } }
"""


def running_sum() -> bytes:
    """y = sum_out = sum + x + 100 * start, for each row."""

    def tensor(name: str, *dims: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *dims])

    hundred = helper.make_tensor("hundred", TensorProto.FLOAT, [1], [100.0])
    nodes = [
        helper.make_node("Add", ["sum", "x"], ["added"]),
        helper.make_node("Mul", ["start", "hundred"], ["first"]),
        helper.make_node("Add", ["added", "first"], ["y"]),
        helper.make_node("Identity", ["y"], ["sum_out"]),
    ]
    inputs = [tensor("x", 2), tensor("sum", 2), tensor("start", 1)]
    graph = helper.make_graph(nodes, "sum", inputs, [tensor("y", 2), tensor("sum_out", 2)], [hundred])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def folder_of(root: Path, name: str, text: str, model: bytes, version: int = 1, file: str = "model.onnx") -> Path:
    folder = root / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(text)
    (folder / str(version) / file).write_bytes(model)
    return folder


@dataclass
class Here:
    server: Server
    folder: Path
    http: str
    grpc: str


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("models")
    folder_of(folder, "sum", SUM, running_sum())
    labelled = folder_of(folder, "labelled", LABELLED, binary_model("Add"), 2)
    folder_of(folder, "labelled", LABELLED, binary_model("Mul"), 3)
    (labelled / "labels.txt").write_text("ant\nbee\ncat\n")
    folder_of(folder, "whole", "max_batch_size: 0", binary_model("Add"), file="net.onnx")
    server = Server(ServerConfig(repositories=(folder,), admin=True), {"device_ids": (), "workers": 2})
    try:
        for name in ("sum", "labelled"):
            server.load(name)
        yield Here(server, folder, server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE)))
    finally:
        server.stop()


class Client:
    """One of Triton's clients."""

    def __init__(self, here: Here, door: str) -> None:
        self.module: Any = triton_http if door == "http" else triton_grpc
        self.client = self.module.InferenceServerClient(here.http if door == "http" else here.grpc)

    def infer(self, model: str, tensors: dict[str, np.ndarray[Any, Any]], **more: Any) -> Any:
        given = []
        for name, data in tensors.items():
            given.append(self.module.InferInput(name, list(data.shape), "FP32"))
            given[-1].set_data_from_numpy(data)
        return self.client.infer(model, given, **more)

    def add(self, x: float, **more: Any) -> list[float]:
        result = self.infer("sum", {"x": np.array([[x, -x]], np.float32)}, **more)
        assert result.as_numpy("sum_out") is None
        return [float(each) for each in result.as_numpy("y")[0]]


DOORS = pytest.mark.parametrize("door", ["http", "grpc"])


@DOORS
def test_a_sequence_carries_its_state(here: Here, door: str) -> None:
    client, one, other = Client(here, door), 7 if door == "http" else 8, f"text {door}"
    assert client.add(1, sequence_id=one, sequence_start=True) == [101, 99]
    assert client.add(5, sequence_id=other, sequence_start=True) == [105, 95]
    assert client.add(2, sequence_id=one) == [103, 97]
    assert client.add(1, sequence_id=other, sequence_end=True) == [106, 94]
    assert client.add(3, sequence_id=one) == [106, 94]
    for id, wanted in ((other, "has not begun"), (0, "is stateful"), (12345, "has not begun")):
        with pytest.raises(InferenceServerException, match=wanted):
            client.add(1, sequence_id=id)
    with pytest.raises(InferenceServerException, match="Given model input"):  # a first request that fails begins none
        client.infer("sum", {"x": np.ones((1, 3), np.float32)}, sequence_id=3, sequence_start=True)
    with pytest.raises(InferenceServerException, match="has not begun"):
        client.add(1, sequence_id=3)
    with pytest.raises(InferenceServerException, match="the server's own"):
        client.infer("sum", {"x": np.ones((1, 2), np.float32), "sum": np.ones((1, 2), np.float32)}, sequence_id=one)
    with pytest.raises(InferenceServerException, match="one instance"):
        client.infer("sum", {"x": np.ones((2, 2), np.float32)}, sequence_id=one)
    assert client.add(1, sequence_id=one, sequence_start=True) == [101, 99]  # it begins anew
    told = client.client.get_model_metadata("sum")
    names = [
        each["name"] if door == "http" else each.name for each in (told["inputs"] if door == "http" else told.inputs)
    ]
    assert names == ["x"]


def test_a_sequence_changes_its_door(here: Here) -> None:
    assert Client(here, "http").add(1, sequence_id=4711, sequence_start=True) == [101, 99]
    assert Client(here, "grpc").add(2, sequence_id=4711) == [103, 97]
    assert Client(here, "http").add(2, sequence_id=4711, sequence_end=True) == [105, 95]


def test_sequences_side_by_side_and_requests_of_one_in_order(here: Here) -> None:
    """Eight sequences at once on two replicas; each sum is exact although its requests come without waiting."""

    def work(number: int) -> list[float]:
        client = Client(here, "grpc" if number % 2 else "http")
        flags = {"sequence_id": 100 + number}
        return [client.add(1, sequence_start=not turn, **flags)[0] for turn in range(20)]

    threads = [Background(work, number) for number in range(8)]
    assert all(thread.result(60) == [101.0 + turn for turn in range(20)] for thread in threads)


def test_a_stream_of_a_sequence(here: Here) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error or result.as_numpy("y")[0][0]))
        for turn in range(5):
            given = triton_grpc.InferInput("x", [1, 2], "FP32")
            given.set_data_from_numpy(np.ones((1, 2), np.float32))
            client.async_stream_infer("sum", [given], sequence_id=55, sequence_start=not turn, sequence_end=turn == 4)
        assert [answers.get(timeout=30) for _ in range(5)] == [101, 102, 103, 104, 105]
        client.stop_stream()


def test_a_sequence_outlives_its_worker(here: Here) -> None:
    client = Client(here, "http")
    client.add(1, sequence_id=900, sequence_start=True)
    router = here.server._running_router()
    for group in router.fleet.versions("sum").values():
        for replica in group.replicas:
            os.kill(replica.pid or 0, signal.SIGKILL)
    assert client.add(1, sequence_id=900) == [102, 98]


@DOORS
def test_classes_of_an_output(here: Here, door: str) -> None:
    client = Client(here, door)
    x = np.array([[[3, 1], [2, np.nan]], [[0, 9], [0, 0]]], np.float32)
    wanted = [client.module.InferRequestedOutput("y", class_count=3)]
    told = client.infer("labelled", {"x1": x, "x2": np.zeros_like(x)}, outputs=wanted).as_numpy("y")
    assert [[each.decode() for each in row] for row in told] == [
        ["3.000000:0:ant", "2.000000:2:cat", "1.000000:1:bee"],
        ["9.000000:1:bee", "0.000000:0:ant", "0.000000:2:cat"],
    ]
    config = client.client.get_model_config("labelled")
    if door == "grpc":
        assert (config.config.max_batch_size, config.config.output[0].label_filename) == (4, "labels.txt")
    else:
        assert config["max_batch_size"] == 4
        assert config["dynamic_batching"]["preferred_batch_size"] == [4]
        assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 1000
        assert config["input"][0]["dims"] == [2, 2]
    assert [each.version for each in here.server.models() if each.name == "labelled"] == [2]


def test_a_model_without_a_batch_is_asked_as_it_is(here: Here) -> None:
    """Tensors of any shape reach it, empty ones too."""
    here.server.load("whole")
    client = Client(here, "http")
    for shape in ((0, 2, 2), (3, 2, 2), (1, 2, 2)):
        x = np.full(shape, 2, np.float32)
        assert client.infer("whole", {"x1": x, "x2": x}).as_numpy("y").shape == shape
    assert client.client.get_model_config("whole")["max_batch_size"] == 0


def test_priorities_order_what_waits(here: Here) -> None:
    for level, status in ((1, 200), (0, 200), (-1, 400), ("high", 400)):
        x = {"name": "x1", "datatype": "FP32", "shape": [1, 2, 2], "data": [1] * 4}
        body = {"inputs": [x, {**x, "name": "x2"}], "parameters": {"priority": level}}
        assert request(here.http, "POST", "/v2/models/labelled/infer", json.dumps(body).encode())[0] == status
    given = np.ones((1, 2, 2), np.float32)
    assert Client(here, "grpc").infer("labelled", {"x1": given, "x2": given}, priority=1).as_numpy("y")[0, 0, 0] == 2


WRONG = [
    ("max_batch_size: -1", "must be 0 or more"),
    ("max_batch_size: many", "is not what"),
    ('input [ { name: "x" dims: [ 1 ] } ]', "data_type of 'x' is missing"),
    ("model_transaction_policy { decoupled: true }", "decoupled"),
    ('output [ { name: "y" data_type: TYPE_FP32 label_filename: "../secret" } ]', "no file"),
    ('sequence_batching { state [ { input_name: "s" data_type: TYPE_FP32 dims: [ -1 ] } ] }', "fixed shape"),
]


@pytest.mark.parametrize(("text", "wanted"), WRONG)
def test_descriptions_that_are_wrong(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "config.pbtxt").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        described(tmp_path)


def test_what_a_description_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert described(tmp_path) is None
    (tmp_path / "labels.txt").write_text("a\nb")
    (tmp_path / "config.pbtxt").write_text(LABELLED + 'instance_group [ { count: 2 kind: KIND_CPU } ]\nname: "n"')
    with caplog.at_level(logging.WARNING, "inflight"):
        says = described(tmp_path)
        described(tmp_path)
    assert says is not None
    assert (says.versions, says.instances, says.queue_size, says.queue_delay) == ("2", 2, 64, 0.001)
    assert says.labels("y") == ("a", "b")
    assert len([record for record in caplog.records if "optimization" in record.getMessage()]) == 1


def test_a_description_must_fit_the_file(here: Here) -> None:
    text = LABELLED.replace('"x2"', '"x3"').replace("versions: [ 2 ]", "versions: [ 1 ]")
    folder = folder_of(here.folder, "unfit", text, binary_model("Add"))
    (folder / "labels.txt").write_text("")
    with pytest.raises(StartError, match="has an input 'x3', the model's file has: x1, x2"):
        here.server.load("unfit")
    (folder / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(ConfigError, match="is not what"):
        here.server.load("unfit")
    assert "is not what" in next(each.reason for each in here.server.models() if each.name == "unfit")


def silero() -> Path | None:
    try:
        import silero_vad  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return Path(silero_vad.__file__).parent / "data" / "silero_vad_16k_op15.onnx"


VAD = """
max_batch_size: 0
input [ { name: "input" data_type: TYPE_FP32 dims: [ 1, 576 ] }, { name: "sr" data_type: TYPE_INT64 dims: [ ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 1, 1 ] } ]
sequence_batching { state [ { input_name: "state" output_name: "stateN" data_type: TYPE_FP32 dims: [ 2, 1, 128 ] } ] }
"""


def test_a_real_stateful_model(here: Here) -> None:
    """silero-vad hears the end of a sound only with what it kept of its beginning."""
    file = silero()
    if file is None:
        pytest.skip("silero-vad is not installed")
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    sound = np.random.default_rng(3).normal(0, 0.3, (6, 1, 576)).astype(np.float32)
    state, wanted = np.zeros((2, 1, 128), np.float32), []
    for chunk in sound:
        output, state = session.run(None, {"input": chunk, "state": state, "sr": np.array(16000)})
        wanted.append(float(output[0, 0]))
    folder_of(here.folder, "vad", VAD, file.read_bytes())
    here.server.load("vad")
    client = Client(here, "http")
    found = []
    for at, chunk in enumerate(sound):
        given = [triton_http.InferInput("input", [1, 576], "FP32"), triton_http.InferInput("sr", [], "INT64")]
        given[0].set_data_from_numpy(chunk)
        given[1].set_data_from_numpy(np.array(16000))
        result = client.client.infer("vad", given, sequence_id=1, sequence_start=not at)
        found.append(float(result.as_numpy("output")[0, 0]))
    assert found == wanted
