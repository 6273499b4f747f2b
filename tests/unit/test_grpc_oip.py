"""The Open Inference Protocol over gRPC, asked by tritonclient."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import model_config_pb2 as configuration
from tritonclient.grpc import service_pb2 as public
from tritonclient.utils import InferenceServerException

from inflight.proto import open_inference_pb2 as own
from tests.grpc_server import FakeBackend, eventually, served

INFER = "/inference.GRPCInferenceService/ModelInfer"
X = np.arange(8, dtype=np.float32).reshape(2, 2, 2)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def address(backend: FakeBackend, engine: str) -> Iterator[str]:
    with served(backend, engine) as where:
        yield where


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as made:
        yield made


@pytest.fixture(scope="module")
def raw_infer(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield channel.unary_unary(INFER, own.ModelInferRequest.SerializeToString, own.ModelInferResponse.FromString)


def given(module: Any, datatype: str = "FP32", **arrays: np.ndarray) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        made = module.InferInput(name, array.shape, datatype)
        made.set_data_from_numpy(array)
        inputs.append(made)
    return inputs


def test_own_protocol_is_the_public_one() -> None:
    def fields(message: Any) -> dict[str, Any]:
        found: dict[str, Any] = {each.name: (each.number, each.type) for each in message.fields}
        return found | {each.name: fields(each) for each in message.nested_types}

    def within(some: Any, others: Any) -> bool:
        if not isinstance(some, dict):
            return bool(some == others)
        return all(name in others and within(some[name], others[name]) for name in some)

    theirs = {**public.DESCRIPTOR.message_types_by_name, **configuration.DESCRIPTOR.message_types_by_name}
    for name, message in own.DESCRIPTOR.message_types_by_name.items():
        assert within(fields(message), fields(theirs[name])), name  # in part: newer ones have more


def test_server_and_model_state(backend: FakeBackend, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("add")
    assert client.is_model_ready("multi.echo", "2")
    assert not client.is_model_ready("nothing")
    backend.ready = False
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("add")
    backend.ready = True
    assert client.get_server_metadata().name == "inflight"


def test_metadata(client: triton.InferenceServerClient) -> None:
    found = client.get_model_metadata("add", as_json=True)
    assert found["versions"] == ["2"]
    assert found["inputs"][0] == {"name": "x1", "datatype": "FP32", "shape": ["-1", "2", "2"]}
    assert [each["name"] for each in found["outputs"]] == ["y"]
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        client.get_model_metadata("nothing")


@pytest.mark.parametrize("version", ["", "2"])
def test_infer(client: triton.InferenceServerClient, version: str) -> None:
    result = client.infer("add", given(triton, x1=X, x2=X), model_version=version, request_id="a1")
    assert result.as_numpy("y").tolist() == (2 * X).tolist()
    assert result.get_response().id == "a1"
    assert result.get_response().model_version == "2"


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("BOOL", np.bool_),
        ("UINT8", np.uint8),
        ("UINT16", np.uint16),
        ("UINT32", np.uint32),
        ("UINT64", np.uint64),
        ("INT8", np.int8),
        ("INT16", np.int16),
        ("INT32", np.int32),
        ("INT64", np.int64),
        ("FP16", np.float16),
        ("FP32", np.float32),
        ("FP64", np.float64),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 1, 3)])
def test_every_type(client: triton.InferenceServerClient, datatype: str, dtype: Any, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape)) % 2).astype(dtype).reshape(shape)
    got = client.infer("multi.echo", given(triton, datatype, x=array)).as_numpy("y")
    assert got.dtype == array.dtype
    assert got.shape == shape
    assert got.tolist() == array.tolist()


def test_bytes_and_texts(client: triton.InferenceServerClient) -> None:
    array = np.array([b"a\xff", b"", b"ccc"], np.object_)
    assert client.infer("multi.echo", given(triton, "BYTES", x=array)).as_numpy("y").tolist() == array.tolist()
    texts = np.array(["é", "x"], np.object_)
    got = client.infer("multi.sub.text", given(triton, "BYTES", x=texts)).as_numpy("y").tolist()
    assert got == ["é".encode(), b"x"]


def test_wanted_outputs(client: triton.InferenceServerClient) -> None:
    inputs = given(triton, x=X)
    assert client.infer("multi.both", inputs).as_numpy("n").tolist() == [7, 7]
    only = client.infer("multi.both", inputs, outputs=[triton.InferRequestedOutput("n")])
    assert only.as_numpy("y") is None
    with pytest.raises(InferenceServerException, match="unexpected output 'z'"):
        client.infer("multi.both", inputs, outputs=[triton.InferRequestedOutput("z")])
    told = client.infer("multi.both", inputs, outputs=[triton.InferRequestedOutput("n", class_count=2)])
    assert told.as_numpy("n").ravel().tolist() == [b"7:0", b"7:0"]


def test_one_failed_instance_fails_the_request(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="instance 1: negative input") as caught:
        client.infer("multi.fail", given(triton, x=np.array([1.0, -1.0], np.float32)))
    assert caught.value.status() == "StatusCode.INTERNAL"


def test_shared_memory_is_refused(client: triton.InferenceServerClient) -> None:
    one = triton.InferInput("x", [1], "FP32")
    one.set_shared_memory("region", 4)
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        client.infer("multi.echo", [one])


def test_deadline(backend: FakeBackend, client: triton.InferenceServerClient) -> None:
    before = backend.cancelled
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("multi.slow", given(triton, x=np.array([30.0], np.float32)), client_timeout=0.1)
    assert eventually(lambda: backend.cancelled == before + 1)


def test_timeout_parameter_is_microseconds(
    backend: FakeBackend, client: triton.InferenceServerClient, address: str
) -> None:
    """Triton's clients send it with the request, beside the call's own deadline: the one that ends sooner counts."""
    inputs = given(triton, x1=X, x2=X)
    client.infer("add", inputs, timeout=1_500_000)
    assert backend.timeouts[-1] == 1.5
    client.infer("add", inputs, timeout=1_500_000, client_timeout=20.0)
    assert backend.timeouts[-1] == 1.5
    client.infer("add", inputs, timeout=90_000_000, client_timeout=20.0)
    assert 10 < backend.timeouts[-1] < 30
    client.infer("add", inputs, timeout=0)
    assert backend.timeouts[-1] is None
    for wrong in (-1, "soon", True):
        # Newer clients refuse it themselves.
        with pytest.raises(
            InferenceServerException, match=r"must be a whole number of microseconds|reserved parameter"
        ):
            client.infer("add", inputs, parameters={"timeout": wrong})
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as streaming:
        streaming.start_stream(lambda result, error: answers.put((result, error)))
        streaming.async_stream_infer("add", inputs, timeout=2_500_000)
        assert answers.get(timeout=20)[1] is None
        streaming.stop_stream()
    assert backend.timeouts[-1] == 2.5


def test_async_infer(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for _ in range(20):
        client.async_infer("add", given(triton, x1=X, x2=X), lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=5)
        assert error is None
        assert result.as_numpy("y").tolist() == (2 * X).tolist()


def test_stream(address: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(30):
            value = -1.0 if number == 7 else float(number)
            client.async_stream_infer(
                "multi.fail", given(triton, x=np.array([value], np.float32)), request_id=str(number)
            )
        for number in range(30):  # in order
            result, error = answers.get(timeout=5)
            if number == 7:
                assert "negative input" in str(error)
            else:
                assert error is None
                assert result.get_response().id == str(number)
                assert result.as_numpy("y").tolist() == [number]
        client.stop_stream()


def test_asyncio_client(address: str) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("add")
            inputs = given(triton_aio, x1=X, x2=X)
            results = await asyncio.gather(*(client.infer("add", inputs) for _ in range(50)))
            assert all(each.as_numpy("y").tolist() == (2 * X).tolist() for each in results)

            async def requests() -> Any:
                for _ in range(3):
                    yield {"model_name": "add", "inputs": inputs}

            got = [result async for result, error in client.stream_infer(requests()) if error is None]
            assert len(got) == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("datatype", "field", "elements"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-1, 2]),
        ("INT64", "int64_contents", [-1, 2**40]),
        ("UINT16", "uint_contents", [1, 2]),
        ("UINT64", "uint64_contents", [1, 2**63]),
        ("FP32", "fp32_contents", [1.5, -2]),
        ("FP64", "fp64_contents", [1.5, -2]),
        ("BYTES", "bytes_contents", [b"a", b"bc"]),
    ],
)
def test_typed_contents(raw_infer: Any, datatype: str, field: str, elements: list[Any]) -> None:
    request = own.ModelInferRequest(model_name="multi.echo")
    one = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(one.contents, field).extend(elements)
    result = triton.InferResult(public.ModelInferResponse.FromString(raw_infer(request).SerializeToString()))
    assert result.as_numpy("y").tolist() == elements


def edit(**changes: Any) -> own.ModelInferRequest:
    request = own.ModelInferRequest(model_name="multi.echo", raw_input_contents=[bytes(8)])
    request.inputs.add(name="x", datatype="FP32", shape=[2])
    request.MergeFrom(own.ModelInferRequest(**changes))
    return request


def with_input(**changes: Any) -> own.ModelInferRequest:
    request = edit()
    request.inputs[0].MergeFrom(own.ModelInferRequest.InferInputTensor(**changes))
    return request


CONTENTS = own.InferTensorContents(fp32_contents=[1, 2])


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (edit(model_name="nothing"), "NOT_FOUND", "is not available"),
        (edit(model_version="x"), "INVALID_ARGUMENT", "is not a number"),
        (edit(raw_input_contents=[b""]), "INVALID_ARGUMENT", "holds 2 tensors for 1 inputs"),
        (with_input(contents=CONTENTS), "INVALID_ARGUMENT", "beside raw_input_contents"),
        (with_input(shape=[2]), "INVALID_ARGUMENT", "takes 16 bytes, but 8 came"),
        (with_input(shape=[-1]), "INVALID_ARGUMENT", "invalid shape"),
        (with_input(shape=[1] * 40), "INVALID_ARGUMENT", "invalid shape"),
        (with_input(shape=[0, 2**60, 2**60]), "INVALID_ARGUMENT", "invalid shape"),
        (with_input(datatype="BF16"), "INVALID_ARGUMENT", "takes 4 bytes, but 8 came"),
        (with_input(datatype="BYTES", shape=[3]), "INVALID_ARGUMENT", "datatype BYTES takes 6 elements"),
        (with_input(name="z"), "INVALID_ARGUMENT", "Cannot find input x"),
    ],
)
def test_bad_requests(raw_infer: Any, request_: own.ModelInferRequest, code: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw_infer(request_)
    assert caught.value.code().name == code
    assert text in caught.value.details()


@pytest.mark.parametrize(("datatype", "text"), [("FP16", "raw_input_contents"), ("INT64", "go into int64_contents")])
def test_contents_in_the_wrong_place(raw_infer: Any, datatype: str, text: str) -> None:
    request = own.ModelInferRequest(model_name="multi.echo")
    request.inputs.add(name="x", datatype=datatype, shape=[2], contents=CONTENTS)
    with pytest.raises(grpc.RpcError, match=text):
        raw_infer(request)
