"""Values to messages and back, with the texts that existing scripts match."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inflight.client.convert import build_request, fill_tensor, read_reply, tensor_value, transport_error
from inflight.contract import DTYPE_CODES
from inflight.errors import ModelError
from inflight.proto import ms_service_pb2


def tensor(value: object) -> ms_service_pb2.Tensor:
    message = ms_service_pb2.Tensor()
    fill_tensor(message, value)
    return ms_service_pb2.Tensor.FromString(message.SerializeToString())


def error(code: int, text: bytes) -> ms_service_pb2.ErrorMsg:
    return ms_service_pb2.ErrorMsg(error_code=code, error_msg=text)


@pytest.mark.parametrize("name", sorted(DTYPE_CODES))
def test_an_array_of_every_type_comes_back_as_it_was(name: str) -> None:
    value = np.arange(6).reshape(2, 3).astype(name)
    message = tensor(value)
    assert message.dtype == DTYPE_CODES[name]
    back = tensor_value(message)
    assert back.dtype == value.dtype
    assert (back == value).all()
    assert back.shape == (2, 3)


@pytest.mark.parametrize(
    ("value", "dims", "dtype"),
    [
        (True, [1], "bool"),
        (3, [1], "int64"),
        (1.5, [1], "float64"),
        (np.float64(1.5), [], "float64"),
        (np.int8(3), [], "int8"),
        (np.array(1.5, np.float32), [], "float32"),
        (np.zeros((2, 0), np.float32), [2, 0], "float32"),
        (np.arange(6, dtype=np.longlong), [6], "int64"),
        (np.arange(6, dtype=np.int32).reshape(2, 3).T, [3, 2], "int32"),
    ],
)
def test_scalars_and_odd_arrays(value: Any, dims: list[int], dtype: str) -> None:
    message = tensor(value)
    assert list(message.shape.dims) == dims
    assert message.dtype == DTYPE_CODES[dtype]
    assert (tensor_value(message) == np.array(value)).all()


@pytest.mark.parametrize(("value", "code"), [("grüß", 13), ("", 13), (b"\x00\xff", 14), (b"", 14)])
def test_texts_and_bytes_are_one_element_of_shape_one(value: str | bytes, code: int) -> None:
    message = tensor(value)
    assert (list(message.shape.dims), message.dtype, len(message.bytes_val)) == ([1], code, 1)
    assert not message.HasField("data")
    assert tensor_value(message) == value


@pytest.mark.parametrize("value", [[1, 2], (1, 2), None, np.bool_(True), 1j, {"a": 1}, bytearray(b"x")])
def test_other_values_are_refused_by_type(value: Any) -> None:
    with pytest.raises(RuntimeError, match="Not support value type " + str(type(value))):
        tensor(value)


@pytest.mark.parametrize("value", [np.array(["a"]), np.zeros(2, ">i4"), np.array([None]), np.complex64(1), 2**64])
def test_other_dtypes_are_refused(value: Any) -> None:
    with pytest.raises(RuntimeError, match="Unknown data type "):
        tensor(value)


def test_several_texts_come_back_as_a_list() -> None:
    message = ms_service_pb2.Tensor(dtype=ms_service_pb2.MS_STRING, bytes_val=[b"a", b"b"])
    assert tensor_value(message) == ["a", "b"]
    assert tensor_value(ms_service_pb2.Tensor(dtype=ms_service_pb2.MS_BYTES)) == []


@pytest.mark.parametrize(("dtype", "data"), [(ms_service_pb2.MS_UNKNOWN, b""), (ms_service_pb2.MS_INT32, b"123")])
def test_a_tensor_that_contradicts_itself_is_a_typed_error(dtype: Any, data: bytes) -> None:
    with pytest.raises(ModelError, match="The server sent"):
        tensor_value(ms_service_pb2.Tensor(dtype=dtype, data=data))


def test_a_request_names_the_method_and_holds_every_instance() -> None:
    request = build_request("add", "plus", 3, ({"x": 1}, {"x": 2}))
    spec = request.servable_spec
    assert (spec.name, spec.method_name, spec.version_number) == ("add", "plus", 3)
    assert [tensor_value(item.items["x"]).tolist() for item in request.instances] == [[1], [2]]
    assert len(build_request("add", "plus", 0, {"x": 1}).instances) == 1


@pytest.mark.parametrize("instances", ["x", [1], [{"x": 1}, None]])
def test_an_instance_is_a_dict(instances: Any) -> None:
    with pytest.raises(RuntimeError, match="instance should be a map"):
        build_request("add", "plus", 0, instances)


def test_the_name_of_an_input_is_a_text() -> None:
    with pytest.raises(RuntimeError, match="The name of an input should be str"):
        build_request("add", "plus", 0, {1: 1})


def test_one_error_is_a_dict_and_not_a_list() -> None:
    assert read_reply(ms_service_pb2.PredictReply(error_msg=[error(2, b"wrong")])) == {"error": "wrong"}


def test_mixed_errors_stay_in_their_places() -> None:
    reply = ms_service_pb2.PredictReply(error_msg=[error(0, b""), error(3, b"bad \xc3")])
    fill_tensor(reply.instances.add().items["y"], 7)
    reply.instances.add()
    results = read_reply(reply)
    assert isinstance(results, list)
    assert results[0]["y"].tolist() == [7]
    assert results[1] == {"error": "bad \ufffd"}


def test_a_single_success_entry_is_no_error() -> None:
    reply = ms_service_pb2.PredictReply(error_msg=[error(0, b"")])
    reply.instances.add()
    assert read_reply(reply) == [{}]


def test_a_reply_with_another_number_of_errors_is_refused() -> None:
    reply = ms_service_pb2.PredictReply(error_msg=[error(0, b""), error(0, b"")])
    reply.instances.add()
    with pytest.raises(RuntimeError, match="error msg result size 2 not be 0, 1 or length of instances 1"):
        read_reply(reply)


def test_the_text_of_a_failed_connection() -> None:
    class Code:
        value = (14, "unavailable")

    assert transport_error(Code(), "gone") == {"error": "Grpc Error, (14, 'unavailable'), gone"}
