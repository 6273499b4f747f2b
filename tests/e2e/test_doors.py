"""Every door of one server, asked by the clients that people use: the same servables, the same results."""

from __future__ import annotations

import base64
import json
import ssl
import stat
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import trustme
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec.structs import replace
from tritonclient.utils import InferenceServerException

from inflight.client import Client, SSLConfig
from inflight.config import ListenConfig, ServableConfig, TlsConfig
from tests.conftest import binary_model
from tests.e2e.running import Running, ask, get, request, running, write_servable

CONFIG = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("add.onnx", "onnx")

    def halved(x1, x2, y):
        return y / 2

    def same(x):
        return x

    @register_method(output_names=["y"])
    def add(x1, x2):
        return add_stage(model, x1, x2, outputs_count=1)

    @register_method(output_names=["y"])
    def mean(x1, x2):
        return add_stage(halved, x1, x2, add_stage(model, x1, x2, outputs_count=1), outputs_count=1)

    @register_method(output_names=["y"])
    def echo(x):
        return add_stage(same, x, outputs_count=1)
"""
SHAPE = (2, 2)


@pytest.fixture(scope="module")
def servables(tmp_path_factory: pytest.TempPathFactory) -> ServableConfig:
    files = {"1/add.onnx": binary_model("Add"), "2/add.onnx": binary_model("Add")}
    return ServableConfig(write_servable(tmp_path_factory.mktemp("doors"), "calc", CONFIG, files), "calc")


@dataclass
class Doors:
    """A client for each door. Each takes a method and its inputs, [N, ...] each, and gives the output, [N, ...]."""

    here: Running
    clients: dict[str, Callable[[str, dict[str, np.ndarray]], np.ndarray]]


@pytest.fixture(scope="module")
def doors(servables: ServableConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    path = tmp_path_factory.mktemp("socket") / "grpc.sock"
    with running(servables, max_message_mb=2) as here:
        by_path = here.server.start_grpc(ListenConfig(f"unix:{path}"))
        assert stat.S_ISSOCK(path.stat().st_mode)
        with (
            triton_http.InferenceServerClient(here.http) as rest,
            triton_grpc.InferenceServerClient(here.grpc) as remote,
            triton_grpc.InferenceServerClient(by_path) as local,
        ):
            clients = {
                "MindSpore REST": lambda method, inputs: by_mindspore_rest(here.http, method, inputs),
                "MSService": lambda method, inputs: by_ms_service(here.grpc, method, inputs),
                "MSService, unix": lambda method, inputs: by_ms_service(by_path, method, inputs),
                "OIP REST": lambda method, inputs: by_triton(triton_http, rest, method, inputs),
                "OIP REST, JSON": lambda method, inputs: by_oip_json(here.http, method, inputs),
                "OIP gRPC": lambda method, inputs: by_triton(triton_grpc, remote, method, inputs),
                "OIP gRPC, unix": lambda method, inputs: by_triton(triton_grpc, local, method, inputs),
            }
            yield Doors(here, clients)
    assert not path.exists()


def rows_of(inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(inputs.values())))
    return [{name: value[row] for name, value in inputs.items()} for row in range(count)]


def by_mindspore_rest(address: str, method: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    def value(array: np.ndarray) -> Any:
        if array.dtype == np.float32 and np.isfinite(array).all():
            return array.tolist()
        data = base64.b64encode(array.tobytes()).decode()
        return {"b64": data, "type": array.dtype.name, "shape": list(array.shape)}

    instances = [{name: value(one) for name, one in row.items()} for row in rows_of(inputs)]
    body = json.dumps({"instances": instances}).encode()
    answer = json.loads(request(address, "POST", f"/model/calc:{method}", body)[1])
    dtype = next(iter(inputs.values())).dtype
    return np.array([instance["y"] for instance in answer["instances"]], dtype)


def by_ms_service(address: str, method: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with Client(address, "calc", method, timeout=60) as client:
        return np.stack([result["y"] for result in client.infer(rows_of(inputs))])  # type: ignore[misc]


def by_triton(kind: Any, client: Any, method: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = []
    for name, array in inputs.items():
        tensors.append(kind.InferInput(name, array.shape, triton_type(array)))
        tensors[-1].set_data_from_numpy(array)
    result: np.ndarray = client.infer(f"calc.{method}", tensors).as_numpy("y")
    return result


def triton_type(array: np.ndarray) -> str:
    return {"f": "FP", "i": "INT", "u": "UINT"}[array.dtype.kind] + str(array.itemsize * 8)


def by_oip_json(address: str, method: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = [
        {"name": name, "datatype": triton_type(array), "shape": array.shape, "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    body = json.dumps({"inputs": tensors}).encode()
    answer = json.loads(request(address, "POST", f"/v2/models/calc.{method}/infer", body)[1])
    (output,) = answer["outputs"]
    first = next(iter(inputs.values()))
    return np.array(output["data"], first.dtype).reshape(output["shape"])


FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


def test_json_numbers_are_what_the_model_declares(doors: Doors) -> None:
    """`add` reads its inputs unchanged, so that their types are known; `echo` gives them to a function."""

    def rest(method: str, instance: Any) -> Any:
        body = json.dumps({"instances": [instance]}).encode()
        answer = json.loads(request(doors.here.http, "POST", f"/model/calc:{method}", body)[1])
        return answer["instances"][0]["y"] if "instances" in answer else answer["error_msg"]

    mixed = [[1, 2.5], [3, 4]]
    assert rest("add", {"x1": mixed, "x2": [[1, 1], [1, 1]]}) == [[2.0, 3.5], [4.0, 5.0]]
    assert "elements type is not equal" in rest("echo", {"x": mixed})
    assert "out of the range of int32" in rest("echo", {"x": 2**40})
    assert rest("echo", {"x": {"b64": "", "type": "float32", "shape": [4, 0]}}) == [[], [], [], []]
    huge = np.full((1, *SHAPE), 3e38, np.float32)
    found = by_oip_json(doors.here.http, "add", {"x1": huge, "x2": huge})
    assert np.isposinf(found).all()
    by_hand = {"name": "x1", "datatype": "FP32", "shape": [1, *SHAPE], "data": ["-Infinity", "Infinity", "NaN", 1]}
    ones = {"name": "x2", "datatype": "FP32", "shape": [1, *SHAPE], "data": [1, 1, 1, 1]}
    body = json.dumps({"inputs": [by_hand, ones]}).encode()
    answer = json.loads(request(doors.here.http, "POST", "/v2/models/calc.add/infer", body)[1])
    assert answer["outputs"][0]["data"] == ["-Infinity", "Infinity", None, 2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 5), st.sampled_from(["add", "mean"]))
def test_every_door_gives_the_same_bits(doors: Doors, data: st.DataObject, count: int, method: str) -> None:
    batch = arrays.arrays(np.float32, (count, *SHAPE), elements=FINITE)
    inputs = {"x1": data.draw(batch), "x2": data.draw(batch)}
    wanted = inputs["x1"] + inputs["x2"]
    if method == "mean":
        wanted = wanted / np.float32(2)
    for name, client in doors.clients.items():
        result = client(method, inputs)
        assert result.dtype == np.float32, name
        assert result.shape == wanted.shape, name
        assert result.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float64"])
def test_every_type_passes_every_door(doors: Doors, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype) if dtype == "float64" else extremes(np.dtype(dtype))
    for name, client in doors.clients.items():
        result = client("echo", {"x": array})
        assert result.dtype == array.dtype, name
        assert result.tobytes() == array.tobytes(), name


def test_texts_and_bytes_pass_every_door(doors: Doors) -> None:
    """A Python stage sees bytes as an array, as in MindSpore Serving, so that is what comes back."""
    here, text, data = doors.here, "schön \U0001f680", bytes(range(256))
    coded = {"b64": base64.b64encode(data).decode(), "type": "bytes"}
    assert ask(here.http, "calc", "echo", text, coded)["instances"] == [{"y": text}, {"y": list(data)}]
    with Client(here.grpc, "calc", "echo", timeout=60) as client:
        first, second = client.infer([{"x": text}, {"x": data}])
        assert first["y"] == text
        assert second["y"].tobytes() == data
    one = np.array([text.encode()], object)
    for kind, address in ((triton_http, here.http), (triton_grpc, here.grpc)):
        tensor = kind.InferInput("x", [1], "BYTES")
        tensor.set_data_from_numpy(one)
        with kind.InferenceServerClient(address) as oip:
            assert oip.infer("calc.echo", [tensor]).as_numpy("y").tobytes() == text.encode()


def extremes(dtype: np.dtype[Any]) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.array([[limits.min, 1, limits.max], [0, 2, 3]], dtype)


def test_versions_and_names(servables: ServableConfig) -> None:
    with running(replace(servables, version=1), replace(servables, version=2)) as here:
        tensors = {name: np.ones((1, *SHAPE), np.float32) for name in ("x1", "x2")}
        with triton_http.InferenceServerClient(here.http) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.get_model_metadata("calc.add")["versions"] == ["1", "2"]
            assert client.is_model_ready("calc.add", "2")
            for version in ("", "1", "2"):
                inputs = [triton_http.InferInput(name, value.shape, "FP32") for name, value in tensors.items()]
                for tensor, value in zip(inputs, tensors.values()):
                    tensor.set_data_from_numpy(value)
                result = client.infer("calc.add", inputs, version)
                assert result.get_response()["model_version"] == (version or "2")
            with pytest.raises(InferenceServerException, match="version 7"):
                client.infer("calc.add", inputs, "7")
        for version in ("", "/version/1", "/version/2"):
            body = json.dumps({"instances": {"x1": [[1.0] * 2] * 2, "x2": [[2.0] * 2] * 2}}).encode()
            answer = json.loads(request(here.http, "POST", f"/model/calc{version}:add", body)[1])
            assert answer == {"instances": [{"y": [[3.0, 3.0], [3.0, 3.0]]}]}
        assert "version 7" in ask(here.http, "calc/version/7", "echo", 1)["error_msg"]
        overview = get(here.http, "/")
        assert [(each["name"], each["version"]) for each in overview["servables"]] == [("calc", 1), ("calc", 2)]


def test_health_and_reflection(doors: Doors) -> None:
    here = doors.here
    assert get(here.http, "/health/live") == {"live": True}
    assert get(here.http, "/health/ready") == {"ready": True, "not_ready": []}
    assert get(here.http, "/v2/health/ready") == {"ready": True}
    with grpc.insecure_channel(here.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "calc", "inference.GRPCInferenceService", "mindspore.serving.proto.MSService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=30)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        predict = pool.FindServiceByName("mindspore.serving.proto.MSService").FindMethodByName("Predict")
        assert predict.input_type.full_name == "mindspore.serving.proto.PredictRequest"
        assert pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")


def test_a_message_over_the_limit_is_refused_at_both_doors(doors: Doors) -> None:
    limit = 2 << 20
    good = np.zeros((1, limit - 4096), np.uint8)
    bad = np.zeros((1, limit + 1), np.uint8)
    for name in ("MSService", "OIP REST", "OIP gRPC"):
        assert np.array_equal(doors.clients[name]("echo", {"x": good}), good)
    status, answer = request(doors.here.http, "POST", "/model/calc:echo", bad.tobytes())
    assert status == 200
    assert f"http message is bigger than {limit} bytes" in json.loads(answer)["error_msg"]
    with pytest.raises(InferenceServerException, match="http message is bigger than") as caught:
        doors.clients["OIP REST"]("echo", {"x": bad})
    assert caught.value.status() == "413"
    with pytest.raises(InferenceServerException) as refused:
        doors.clients["OIP gRPC"]("echo", {"x": bad})
    assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    with Client(doors.here.grpc, "calc", "echo", timeout=60) as client:
        assert "resource exhausted" in client.infer({"x": bad})["error"]
    for door in doors.clients.values():
        assert door("echo", {"x": np.ones((1, 3), np.int32)}).tolist() == [[1, 1, 1]]


# TLS


@dataclass
class Pem:
    ca: str
    server: tuple[str, str]
    client: tuple[str, str]


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))

    def write(name: str, made: trustme.LeafCert) -> tuple[str, str]:
        made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        return str(folder / f"{name}.pem"), str(folder / f"{name}.key")

    server = write("server", authority.issue_cert("localhost", "127.0.0.1"))
    return Pem(str(folder / "ca.pem"), server, write("client", authority.issue_cert("someone@example.org")))


@pytest.mark.parametrize("mutual", [False, True])
def test_both_doors_speak_tls(pem: Pem, mutual: bool, tmp_path: Path) -> None:
    write_servable(tmp_path, "work")
    tls = TlsConfig(*pem.server, pem.ca if mutual else None, mutual)
    with running(ServableConfig(tmp_path, "work"), tls=tls) as here:
        context = ssl.create_default_context(cafile=pem.ca)
        stranger = ssl.create_default_context(cafile=pem.ca)
        if mutual:
            context.load_cert_chain(*pem.client)
        url = f"https://{here.http}/model/work:echo"
        body = b'{"instances": {"x": 5}}'

        def post(how: ssl.SSLContext) -> Any:
            with urllib.request.urlopen(url, body, timeout=30, context=how) as answer:
                return json.loads(answer.read())

        assert post(context) == {"instances": [{"y": 5}]}
        known = SSLConfig(*(pem.client if mutual else (None, None)), pem.ca)
        with Client(here.grpc, "work", "echo", ssl_config=known, timeout=30) as client:
            assert client.infer({"x": 5})[0]["y"] == 5
        if mutual:
            with pytest.raises(OSError):
                post(stranger)
            with Client(here.grpc, "work", "echo", ssl_config=SSLConfig(custom_ca=pem.ca), timeout=3) as client:
                assert "error" in client.infer({"x": 5})
        with Client(here.grpc, "work", "echo", timeout=3) as client:
            assert "error" in client.infer({"x": 5})
        assert post(context) == {"instances": [{"y": 5}]}
