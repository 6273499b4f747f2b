"""Model files without a servable: alone and in a crowd, what comes is what ONNX Runtime gives for the request."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from inflight.client import Client
from inflight.config import ServableConfig, ServerConfig
from tests.e2e.running import Running, crowd, get, request, running, write_servable
from tests.graphs import BATCHED, WHOLE, endless_on_zeros

SERVED = ("softmax", "running_sum", "unique", "gru", "suppression", "shared", "mean", "mislabelled")
MODELS = {**{name: WHOLE[name] for name in SERVED}, "dense": BATCHED["dense"]}

DECLARED = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("endless.onnx", "onnx")

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(model, x, outputs_count=1)
"""

Inputs = dict[str, np.ndarray]


def bare(folder: Path, name: str, data: bytes, **more: Any) -> ServableConfig:
    file = folder / f"{name}.onnx"
    file.write_bytes(data)
    return ServableConfig(folder, name, model_file=file, **more)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bare")
    with running(*(bare(folder, name, data) for name, data in MODELS.items())) as server:
        yield server


@pytest.fixture(scope="module")
def sessions() -> dict[str, ort.InferenceSession]:
    return {name: ort.InferenceSession(data, providers=["CPUExecutionProvider"]) for name, data in MODELS.items()}


def drawn(name: str, seed: int) -> Inputs:
    """The inputs of one request, of a size of its own."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 41))  # more than a run of a batch takes, too
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "gru": {"x": (rows, 1, 4)},
        "suppression": {"x": (2, rows, 4), "s": (2, 1, rows)},
        "shared": {"x": (rows, 4), "k": (int(random.integers(1, 5)), 4)},
        "mislabelled": {"x": (1, 4, rows)},
    }
    shape = shapes.get(name, {"x": (rows, 4)})
    if name == "unique":
        return {"x": random.integers(0, 2, shape["x"]).astype(np.float32)}
    return {key: random.random(size).astype(np.float32) for key, size in shape.items()}


def wanted(sessions: dict[str, ort.InferenceSession], name: str, inputs: Inputs) -> np.ndarray:
    result: np.ndarray = sessions[name].run(["y"], inputs)[0]
    return result


def by_triton(kind: Any, client: Any, name: str, inputs: Inputs) -> np.ndarray:
    tensors = []
    for key, array in inputs.items():
        tensors.append(kind.InferInput(key, array.shape, "FP32"))
        tensors[-1].set_data_from_numpy(array)
    result: np.ndarray = client.infer(name, tensors).as_numpy("y")
    return result


def by_oip_json(address: str, name: str, inputs: Inputs) -> np.ndarray:
    tensors = [
        {"name": key, "datatype": "FP32", "shape": array.shape, "data": array.ravel().tolist()}
        for key, array in inputs.items()
    ]
    status, body = request(address, "POST", f"/v2/models/{name}/infer", json.dumps({"inputs": tensors}).encode())
    assert status == 200, body
    (output,) = json.loads(body)["outputs"]
    return np.array(output["data"]).reshape(output["shape"])


def by_instance(address: str, name: str, inputs: Inputs) -> np.ndarray:
    instance = {key: array.tolist() for key, array in inputs.items()}
    body = json.dumps({"instances": [instance, instance]}).encode()
    one, other = json.loads(request(address, "POST", f"/model/{name}:predict", body)[1])["instances"]
    assert one == other
    return np.array(one["y"])


def by_ms_service(address: str, name: str, inputs: Inputs) -> np.ndarray:
    with Client(address, name, "predict", timeout=60) as client:
        result: np.ndarray = client.infer([inputs, inputs])[1]["y"]
        return result


@pytest.mark.parametrize("name", MODELS)
def test_requests_that_arrive_together_get_their_own_answers(
    here: Running, sessions: dict[str, ort.InferenceSession], name: str
) -> None:

    def one(number: int) -> list[tuple[Inputs, np.ndarray]]:
        inputs = [drawn(name, 100 * number + turn) for turn in range(10)]
        with triton_http.InferenceServerClient(here.http) as client:  # its sockets belong to this thread
            return [(each, by_triton(triton_http, client, name, each)) for each in inputs]

    for inputs, answer in [pair for pairs in crowd(one, 12) for pair in pairs]:
        expected = wanted(sessions, name, inputs)
        assert answer.shape == expected.shape
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SERVED)
def test_every_door_gives_the_file_the_whole_array(
    here: Running, sessions: dict[str, ort.InferenceSession], name: str
) -> None:
    inputs = drawn(name, 3)
    expected = wanted(sessions, name, inputs)
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        answers = {
            "OIP gRPC": by_triton(triton_grpc, client, name, inputs),
            "OIP JSON": by_oip_json(here.http, name, inputs),
            "MindSpore REST": by_instance(here.http, name, inputs),
            "MSService": by_ms_service(here.grpc, name, inputs),
        }
    for door, answer in answers.items():
        assert answer.shape == expected.shape, door
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6, err_msg=door)


def test_metadata_says_what_a_request_is(here: Running) -> None:
    whole, batched = (get(here.http, f"/v2/models/{name}") for name in ("running_sum", "dense"))
    assert (whole["platform"], batched["platform"]) == ("inflight, one request a call", "inflight")
    assert whole["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert batched["inputs"] == whole["inputs"], "each row of this one is an instance"
    assert get(here.http, "/v2/models/mean")["outputs"] == [{"name": "y", "datatype": "FP32", "shape": []}]
    assert get(here.http, "/v2/models/mislabelled")["outputs"][0]["shape"] == [-1, -1, -1]
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        assert client.get_model_metadata("running_sum").platform == "inflight, one request a call"


def test_a_graph_that_does_not_end_on_made_up_inputs_is_served_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = bare(tmp_path, "endless", endless_on_zeros(), device_ids=(0, 1))
    write_servable(tmp_path, "declared", DECLARED, {"1/endless.onnx": endless_on_zeros()})
    servables, x = (config, ServableConfig(tmp_path, "declared")), np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    quick = ServerConfig(warm_up_timeout=1)
    with caplog.at_level(logging.WARNING, "inflight"), running(*servables, config=quick) as here:
        for name, platform in (("endless", "inflight, one request a call"), ("declared", "inflight")):
            assert np.array_equal(by_oip_json(here.http, name, {"x": x}), 2 * x)
            assert get(here.http, f"/v2/models/{name}")["platform"] == platform
        assert [(each.replicas, each.ready_replicas) for each in here.server.servables()] == [(2, 2), (1, 1)]
    lines = sorted(record.getMessage() for record in caplog.records if "warm-up" in record.getMessage())
    assert len(lines) == 2, lines
    assert "'declared'" in lines[0]
    assert "one request a call" not in lines[0]
    assert "'endless'" in lines[1]
    assert "one request a call" in lines[1]
