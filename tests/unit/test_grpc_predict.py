"""`MSService.Predict` on the wire: requests, checks and their texts, the three forms of a reply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from inflight.contract import CODES, DTYPES
from inflight.errors import Overloaded, Unavailable
from inflight.frontends.mindspore.grpc import PATH
from inflight.proto import ms_service_pb2 as pb
from tests.grpc_server import FakeBackend, eventually, served

ONES = np.ones((2, 2), np.float32)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def predict(backend: FakeBackend, engine: str) -> Iterator[Any]:
    with served(backend, engine) as address, grpc.insecure_channel(address) as channel:
        yield channel.unary_unary(PATH, pb.PredictRequest.SerializeToString, pb.PredictReply.FromString)


def tensor(value: Any) -> pb.Tensor:
    made = pb.Tensor()
    if isinstance(value, (str, bytes)):
        made.dtype = 13 if isinstance(value, str) else 14  # type: ignore[assignment]  # protobuf takes numbers
        made.shape.dims.append(1)
        made.bytes_val.append(value.encode() if isinstance(value, str) else value)
    else:
        array = np.asarray(value)
        made.dtype = CODES[array.dtype]  # type: ignore[assignment]
        made.shape.dims.extend(array.shape)
        made.data = array.tobytes()
    return made


def request(servable: str, method: str, *instances: dict[str, Any], version: int = 0) -> pb.PredictRequest:
    made = pb.PredictRequest()
    made.servable_spec.name = servable
    made.servable_spec.method_name = method
    made.servable_spec.version_number = version
    for instance in instances:
        items = made.instances.add().items
        for name, value in instance.items():
            items[name].CopyFrom(value if isinstance(value, pb.Tensor) else tensor(value))
    return made


def array(made: pb.Tensor) -> np.ndarray:
    return np.frombuffer(made.data, DTYPES[made.dtype]).reshape(made.shape.dims)


def error(reply: pb.PredictReply) -> tuple[int, str]:
    """The one error of a request that failed as a whole."""
    assert len(reply.error_msg) == 1
    assert not reply.instances
    return reply.error_msg[0].error_code, reply.error_msg[0].error_msg.decode()


def test_results_and_the_echoed_spec(predict: Any) -> None:
    asked = request("add", "add_common", {"x1": ONES, "x2": ONES * 2}, {"x1": ONES, "x2": ONES, "more": ONES})
    reply = predict(asked)
    assert reply.servable_spec == asked.servable_spec  # version 0 stays 0
    assert not reply.error_msg
    assert [array(each.items["y"]).tolist() for each in reply.instances] == [[[3, 3]] * 2, [[2, 2]] * 2]
    assert not predict(request("add", "add_common", {"x1": ONES, "x2": ONES}, version=2)).error_msg


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0), (1, 2, 3)])
def test_every_type_and_shape_comes_back(predict: Any, code: int, shape: tuple[int, ...]) -> None:
    sent = (np.arange(np.prod(shape, dtype=int)) % 2).astype(DTYPES[code]).reshape(shape)
    reply = predict(request("multi", "echo", {"x": sent}))
    got = array(reply.instances[0].items["y"])
    assert got.dtype == sent.dtype
    assert got.shape == shape
    assert got.tobytes() == sent.tobytes()


@pytest.mark.parametrize("value", ["héllo", "", b"\x00\xff", b""])
@pytest.mark.parametrize("dims", [[], [1]])
def test_texts_and_bytes(predict: Any, value: str | bytes, dims: list[int]) -> None:
    sent = tensor(value)
    del sent.shape.dims[:]
    sent.shape.dims.extend(dims)
    got = predict(request("multi", "echo", {"x": sent})).instances[0].items["y"]
    assert got.dtype == sent.dtype
    assert list(got.bytes_val) == list(sent.bytes_val)
    assert not got.shape.dims
    assert not got.data


def test_scalar_output(predict: Any) -> None:
    items = predict(request("multi", "both", {"x": ONES})).instances[0].items
    assert array(items["n"]).shape == ()
    assert array(items["n"]) == 7
    assert array(items["y"]).tolist() == ONES.tolist()


def numeric(code: int, dims: list[int], data: bytes) -> pb.Tensor:
    return pb.Tensor(dtype=code, shape=pb.TensorShape(dims=dims), data=data)


def textual(code: int, dims: list[int], values: list[bytes]) -> pb.Tensor:
    return pb.Tensor(dtype=code, shape=pb.TensorShape(dims=dims), bytes_val=values)


TWO_DIMS = "bytes or string type input  shape can only be (1,) or empty, but given shape is [1, 1]"


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (textual(13, [1, 1], [b"x"]), TWO_DIMS),
        (textual(14, [1, 1], [b"x"]), TWO_DIMS),
        (textual(14, [2], [b"x", b"y"]), "but given shape is [2]"),
        (textual(13, [], [b"x", b"y"]), "one element"),
        (textual(13, [1], []), "one element"),
        (textual(13, [1], [b"\xff"]), "must be UTF-8"),
        (numeric(0, [1], b"x"), "unknown data type 0"),
        (numeric(77, [1], b"x"), "unknown data type 77"),
        (numeric(11, [2], bytes(7)), "data size 7"),
        (numeric(11, [], b""), "data size 0"),
        (numeric(11, [-1], bytes(4)), "invalid shape [-1]"),
        (numeric(11, [-1, -1], bytes(4)), "invalid shape [-1, -1]"),
        (numeric(11, [0, 2], b""), "invalid shape [0, 2]"),
        (numeric(2, [2**40, 2**40], bytes(4)), "invalid shape"),
        (numeric(2, [2**62, 0], b""), "invalid shape"),
        (numeric(2, [1] * 100, b"x"), "invalid shape"),
        (pb.Tensor(dtype=11, shape=pb.TensorShape(dims=[1]), shm_data=pb.ShmTensorData(memory_key="k")), "shm_data"),
    ],
)
def test_bad_tensors_fail_the_request(predict: Any, sent: pb.Tensor, text: str) -> None:
    code, message = error(predict(request("multi", "echo", {"x": ONES}, {"x": sent})))
    assert code == 2
    assert text in message


def test_missing_input(predict: Any) -> None:
    code, message = error(predict(request("add", "add_common", {"x1": ONES, "x2": ONES}, {"x1": ONES})))
    assert code == 2
    assert "Cannot find input x2 in instance input" in message


def test_no_instances_are_answered_at_once(predict: Any) -> None:
    code, message = error(predict(request("add", "add_common"), timeout=2))
    assert code == 2
    assert "no instance" in message


def test_output_buffers_are_refused(predict: Any) -> None:
    asked = request("multi", "echo", {"x": ONES})
    asked.instances[0].output_buffers["y"].memory_key = "/segment"
    code, message = error(predict(asked))
    assert code == 2
    assert "output_buffers" in message


@pytest.mark.parametrize(
    ("servable", "method", "version", "text"),
    [
        ("nothing", "add_common", 0, "servable is not available"),
        ("add", "add_common", 3, "servable is not available"),
        ("add", "add_common", 2**63, "servable is not available"),
        ("add", "nothing", 0, "method is not available"),
        ("multi", "@call_m_0", 0, "method is not available"),
        ("", "", 0, "servable is not available"),
    ],
)
def test_routing(predict: Any, servable: str, method: str, version: int, text: str) -> None:
    code, message = error(predict(request(servable, method, {"x": ONES}, version=version)))
    assert code == 2
    assert text in message


def test_mixed_reply(predict: Any) -> None:
    reply = predict(request("multi", "fail", {"x": ONES}, {"x": -ONES}, {"x": ONES}))
    assert [each.error_code for each in reply.error_msg] == [0, 3, 0]
    assert reply.error_msg[1].error_msg == b"negative input -1.0"
    assert not reply.instances[1].items
    assert [len(each.items) for each in reply.instances] == [1, 0, 1]


def test_equal_errors_become_one(predict: Any) -> None:
    assert error(predict(request("multi", "fail", {"x": -ONES}, {"x": -ONES}))) == (3, "negative input -1.0")
    assert error(predict(request("multi", "fail", {"x": -ONES}))) == (3, "negative input -1.0")


def test_different_errors_stay_apart(predict: Any) -> None:
    reply = predict(request("multi", "fail", {"x": -ONES}, {"x": -2 * ONES}))
    assert [each.error_code for each in reply.error_msg] == [3, 3]
    assert len(reply.instances) == 2


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (Overloaded("Serving Error: enqueued requests count exceeds the limit 5"), 1),
        (Unavailable("servable is not available"), 5),
    ],
)
def test_refusals(predict: Any, backend: FakeBackend, refusal: Any, code: int) -> None:
    backend.refusal = refusal
    try:
        assert error(predict(request("multi", "echo", {"x": ONES}))) == (code, str(refusal))
    finally:
        backend.refusal = None


def test_deadline_and_cancellation_reach_the_backend(predict: Any, backend: FakeBackend) -> None:
    before = backend.cancelled
    with pytest.raises(grpc.RpcError) as caught:
        predict(request("multi", "slow", {"x": 30.0}), timeout=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    timeout = backend.timeouts[-1]
    assert timeout is not None
    assert 0 < timeout < 0.25  # clients round up
    predict(request("multi", "slow", {"x": 0.0}))
    assert backend.timeouts[-1] is None
    assert eventually(lambda: backend.cancelled == before + 1)
