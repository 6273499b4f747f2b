"""The REST door of the Open Inference Protocol, driven by its real clients and by garbage."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests

from inflight.wire.connections import HttpLimits
from tests.unit.http_fakes import Served, serve, until

LIMIT = 4 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(limits=HttpLimits(max_body_bytes=LIMIT)) as served:
        yield served


def post(served: Served, path: str, body: Any, headers: dict[str, str] | None = None) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(f"http://{served.address}{path}", data=data, headers=headers, timeout=10)


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def infer(served: Served, *inputs: dict[str, Any], model: str = "echo", **more: Any) -> requests.Response:
    return post(served, f"/v2/models/{model}/infer", {"inputs": list(inputs), **more})


SYNC_CLIENT = """
import sys
import numpy as np
import tritonclient.http as http

client = http.InferenceServerClient(sys.argv[1], concurrency=4)
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("echo") and client.is_model_ready("my model", "1")
assert not client.is_model_ready("none")
assert client.get_server_metadata()["name"] == "inflight"
meta = client.get_model_metadata("my model")
assert [t["name"] for t in meta["inputs"]] == ["a", "t"] and meta["inputs"][0]["shape"] == [-1, 2], meta
assert {m["name"] for m in client.get_model_repository_index()} == {"echo", "my model", "slow", "fail"}

def tensor(name, array, datatype, binary=True):
    given = http.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given

images = np.random.default_rng(0).random((3, 7, 5)).astype(np.float32)
for binary_in in (True, False):
    for binary_out in (True, False, None):
        wanted = None if binary_out is None else [http.InferRequestedOutput("y", binary_data=binary_out)]
        for packed in (None, "gzip", "deflate"):
            result = client.infer("echo", [tensor("x", images, "FP32", binary_in)], outputs=wanted, request_id="7",
                                  request_compression_algorithm=packed, response_compression_algorithm=packed)
            assert np.array_equal(result.as_numpy("y"), images)
            assert result.get_response()["id"] == "7"
            assert (result.get_output("y").get("parameters") is None) == (binary_out is False)
text = np.array([["caf\\u00e9".encode()], [b""]], dtype=object)
given = [tensor("a", images[:2, 0, :2], "FP32"), tensor("t", text, "BYTES")]
twice = client.infer("my model", given, model_version="1")
assert np.array_equal(twice.as_numpy("a2"), images[:2, 0, :2] * 2)
assert list(twice.as_numpy("t2").ravel()) == ["caf\\u00e9!".encode(), b"!"]
pending = [client.async_infer("echo", [tensor("x", images + i, "FP32")]) for i in range(8)]
for i, one in enumerate(pending):
    assert np.array_equal(one.get_result().as_numpy("y"), images + i)
try:
    client.infer("fail", [tensor("x", images, "FP32")])
except Exception as error:
    assert "instance 0: no luck" in str(error) and error.status() == "500", error
else:
    raise AssertionError("no error")
client.close()
print("passed")
"""


def test_tritonclient_sync(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SYNC_CLIENT, served.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "passed\n", done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tritonclient_asyncio(served: Served) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput
    from tritonclient.http.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    async def use() -> None:
        async with InferenceServerClient(served.address) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("echo")
            assert (await client.get_model_metadata("echo"))["platform"] == "inflight"
            array = np.arange(12, dtype=np.int64).reshape(4, 3)
            given = InferInput("x", [4, 3], "INT64").set_data_from_numpy(array)
            results = await asyncio.gather(*(client.infer("echo", [given]) for _ in range(20)))
            assert all(np.array_equal(result.as_numpy("y"), array) for result in results)
            packed = await client.infer("echo", [given], response_compression_algorithm="gzip")
            assert np.array_equal(packed.as_numpy("y"), array)
            with pytest.raises(InferenceServerException, match="unexpected output"):
                await client.infer("echo", [given], outputs=[InferRequestedOutput("z")])

    asyncio.run(use())


def test_curl(served: Served) -> None:
    body = json.dumps({"inputs": [tensor([[1, 2], [3, 4]], [2, 2], "INT32")]})
    url = f"http://{served.address}/v2/models/echo/infer"
    done = subprocess.run(["curl", "-sS", "--data-binary", body, url], capture_output=True, timeout=20, check=True)
    assert json.loads(done.stdout)["outputs"] == [
        {"name": "y", "datatype": "INT32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    ]


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [0.5, 65504.0]),
        ("FP32", [1, -0.5]),
        ("FP64", [1e300, 0.1]),
        ("BYTES", ["", "ü"]),
    ],
)
def test_json_keeps_values_of_every_type(served: Served, datatype: str, values: list[Any]) -> None:
    for data, shape in ((values, [2]), (values, [2, 1]), ([[value] for value in values], [2, 1])):
        answer = infer(served, tensor(data, shape, datatype)).json()
        assert answer["outputs"][0]["data"] == values
        assert answer["outputs"][0]["datatype"] == datatype
        assert answer["model_name"] == "echo"
        assert answer["model_version"] == "1"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (tensor([1.5], [1], "INT32"), "not INT32"),
        (tensor([256], [1], "UINT8"), "not UINT8"),
        (tensor([-1], [1], "UINT8"), "not UINT8"),
        (tensor(["1"], [1]), "not FP32"),
        (tensor([None], [1]), "not FP32"),
        (tensor([True], [1]), "not FP32"),
        (tensor([2.5, True], [2]), "not FP32"),
        (tensor([[1, 2], [False, 3]], [2, 2], "UINT8"), "not UINT8"),
        (tensor([True, 2], [2], "INT32"), "not INT32"),
        (tensor([True, 2], [2], "BOOL"), "not BOOL"),
        (tensor([1], [1], "BOOL"), "not BOOL"),
        (tensor([[1, 2], [3]], [2, 2]), "does not fit its shape"),
        (tensor([1, 2, 3], [2, 2]), "does not fit its shape"),
        (tensor([1], [1], "BF16"), "must be sent as raw bytes"),
        (tensor([1], [1], "BYTES"), "takes strings"),
        (tensor([1], [-1]), "invalid shape"),
        (tensor([1], [True]), "array of integers"),
        (tensor([], [0, 2**62]), "invalid shape"),
        (tensor([], [0]), "no instance"),
        ({"name": "x", "shape": [1], "datatype": "FP32"}, "has no data"),
        (tensor([1], [1], name=""), "'name' of inputs[0] is missing"),
        (tensor([1], [1]) | {"parameters": {"binary_data_size": 4}}, "0 bytes are left"),
        (tensor([1], [1]) | {"parameters": {"shared_memory_region": "r"}}, "shared memory"),
        (tensor([1], [1], name="z"), "Cannot find input x"),
    ],
)
def test_wrong_tensors_are_told(served: Served, given: dict[str, Any], text: str) -> None:
    answer = infer(served, given)
    assert answer.status_code == 400
    assert text in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/echo/versions/9", 404),
        ("GET", "/v2/models/echo/versions/x", 400),
        ("GET", "/v2/models/echo/infer", 405),
        ("POST", "/v2/models/echo", 405),
        ("GET", "/v2/models/echo/settings", 404),
        ("GET", "/v2/nothing", 404),
        ("POST", "/v2/models/my%20model/infer", 400),
        ("GET", "/v2/models/my%20model/versions/1", 200),
        ("HEAD", "/v2/health/live", 200),
    ],
)
def test_paths(served: Served, method: str, path: str, status: int) -> None:
    answer = requests.request(method, f"http://{served.address}{path}", timeout=10)
    assert answer.status_code == status
    if method != "HEAD":
        assert ("error" in answer.json()) == (status != 200)


def test_not_ready_is_told(served: Served) -> None:
    served.backend.ready = False
    try:
        for path in ("/v2/health/ready", "/v2/models/echo/ready", "/health/ready"):
            assert requests.get(f"http://{served.address}{path}", timeout=10).status_code == 503
        index = post(served, "/v2/repository/index", {}).json()
        assert {model["state"] for model in index} == {"UNAVAILABLE"}
        assert post(served, "/v2/repository/index", {"ready": True}).json() == []
    finally:
        served.backend.ready = True


def test_binary_inputs_are_aligned_views_of_one_buffer(served: Served) -> None:
    big = np.arange(300_000, dtype=np.float32)
    for padding in range(3):  # whatever the length of the JSON part
        head = json.dumps({"id": "p" * padding, "inputs": [_raw("x", big[None])]}).encode()
        answer = post(served, "/v2/models/echo/infer", head + big.tobytes(), _binary(head))
        assert answer.status_code == 200
        row = served.backend.seen[-1][0][0]
        assert isinstance(row, np.ndarray)
        assert row.flags.aligned
        assert row.ctypes.data % 64 == 0
        assert not row.flags.owndata
        assert np.array_equal(row, big)


def test_small_binary_inputs_are_aligned_too(served: Served) -> None:
    array = np.array([[1.5, 2.5]])
    for padding in range(9):
        head = json.dumps({"id": "p" * padding, "inputs": [_raw("x", array)]}).encode()
        assert post(served, "/v2/models/echo/infer", head + array.tobytes(), _binary(head)).status_code == 200
        row = served.backend.seen[-1][0][0]
        assert isinstance(row, np.ndarray)
        assert row.flags.aligned


def test_outputs_leave_as_asked(served: Served) -> None:
    raw = infer(served, tensor([1, 2], [2, 1]), parameters={"binary_data_output": True})
    size = int(raw.headers["inference-header-content-length"])
    assert json.loads(raw.content[:size])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert raw.content[size:] == np.array([1, 2], np.float32).tobytes()
    # What one output says wins over what all of them say.
    plain = infer(
        served,
        tensor([1, 2], [2, 1]),
        parameters={"binary_data_output": True},
        outputs=[{"name": "y", "parameters": {"binary_data": False}}],
    )
    assert plain.json()["outputs"][0]["data"] == [1, 2]
    nan = np.array([[np.nan, np.inf]], np.float32)
    head = json.dumps({"inputs": [_raw("x", nan)]}).encode()
    assert post(served, "/v2/models/echo/infer", head + nan.tobytes(), _binary(head)).json()["outputs"][0]["data"] == [
        None,
        "Infinity",
    ]


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", np.float16), ("FP32", np.float32), ("FP64", np.float64)])
def test_what_json_has_no_number_for(served: Served, datatype: str, dtype: Any) -> None:
    """Words go in and come out, and numpy reads them; the other numbers are as short as their type allows."""
    data = [2.2, "Infinity", "-Infinity", "NaN", 1]
    (found,) = infer(served, tensor([data], [1, 5], datatype)).json()["outputs"]
    assert found["data"][1:4] == ["Infinity", "-Infinity", None]
    assert np.dtype(dtype).type(found["data"][0]) == np.dtype(dtype).type(2.2)
    back = np.array(found["data"], dtype)
    np.testing.assert_array_equal(back, np.array([2.2, np.inf, -np.inf, np.nan, 1], dtype))
    for wrong in ("infinity", "1.5", "", None):
        assert "that is not" in infer(served, tensor([1.5, wrong], [1, 2], datatype)).json()["error"]
    for bare in ("NaN", "-Infinity"):  # as Triton's client writes them
        body = b'{"inputs": [{"name": "x", "datatype": "%s", "shape": [1, 1], "data": [%s]}]}'
        answer = post(served, "/v2/models/echo/infer", body % (datatype.encode(), bare.encode()))
        assert answer.status_code == 400
        assert "binary_data_size" in answer.json()["error"]


def test_some_outputs_in_the_order_asked(served: Served) -> None:
    inputs = (tensor([1, 2], [1, 2], name="a"), tensor(["t"], [1], "BYTES", name="t"))
    every = infer(served, *inputs, model="my%20model").json()
    assert [output["name"] for output in every["outputs"]] == ["a2", "t2"]
    turned = infer(served, *inputs, model="my%20model", outputs=[{"name": "t2"}, {"name": "a2"}]).json()
    assert [output["data"] for output in turned["outputs"]] == [["t!"], [2, 4]]


def test_timeout_parameter_is_microseconds(served: Served) -> None:
    infer(served, tensor([1], [1]), parameters={"timeout": 1_500_000})
    assert served.backend.timeouts[-1] == 1.5
    infer(served, tensor([1], [1]), parameters={"timeout": 0})
    assert served.backend.timeouts[-1] is None


def test_library_defaults_do_not_cause_packing(served: Served) -> None:
    answer = infer(served, tensor([1], [1]))
    assert answer.request.headers["accept-encoding"].startswith("gzip, deflate")
    assert "content-encoding" not in answer.headers


def test_packed_bodies_are_bounded(served: Served) -> None:
    bomb = gzip.compress(bytes(LIMIT + 1))
    answer = post(served, "/v2/models/echo/infer", bomb, {"content-encoding": "gzip"})
    assert (answer.status_code, len(bomb) < LIMIT) == (413, True)
    for broken, encoding in ((b"nonsense", "gzip"), (gzip.compress(b"{}")[:-9], "gzip"), (b"{}", "br")):
        answer = post(served, "/v2/models/echo/infer", broken, {"content-encoding": encoding})
        assert answer.status_code == 400
        assert answer.json()["error"]


def test_a_client_that_leaves_stops_the_work(served: Served) -> None:
    before = served.backend.cancelled
    started = served.backend.started
    connection = http.client.HTTPConnection(served.host, served.port, timeout=10)
    connection.request("POST", "/v2/models/slow/infer", json.dumps({"inputs": [tensor([1], [1])]}))
    until(lambda: served.backend.started > started)
    connection.close()
    until(lambda: served.backend.cancelled > before)


def _raw(name: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    datatype = {"float32": "FP32", "float64": "FP64"}[array.dtype.name]
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": array.nbytes},
    }


def _binary(head: bytes) -> dict[str, str]:
    return {"Inference-Header-Content-Length": str(len(head))}
