"""Large tensors over gRPC stay where they are: they are read as protobuf reads them, and sent as it writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.frontends.mindspore import large as ms_large
from inflight.frontends.oip import large
from inflight.frontends.oip.tensors import OipTensor
from inflight.frontends.protobuf import LARGE
from inflight.proto.ms_service_pb2 import PredictReply, PredictRequest
from inflight.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from inflight.wire import Encoded

SIZES = st.sampled_from([0, 1, 100, 65_535, 65_536, 100_001])


class Encoding(bytes):
    """A message's bytes, shown by their number."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@st.composite
def requests(draw: Any) -> Encoding:
    made = ModelInferRequest(model_name=draw(st.text(max_size=9)), id=draw(st.text(max_size=300)))
    for index in range(draw(st.integers(0, 3))):
        made.inputs.add(name=f"x{index}", datatype="UINT8", shape=draw(st.lists(st.integers(-9, 1 << 40), max_size=3)))
        made.raw_input_contents.append(draw(st.binary(min_size=1, max_size=4)) * (draw(SIZES) // 2))
    made.parameters["timeout"].int64_param = draw(st.integers(-9, 1 << 62))
    return Encoding(made.SerializeToString())


@settings(max_examples=60, deadline=None)
@given(requests(), st.booleans())
def test_a_request_is_read_as_protobuf_reads_it(data: bytes, reversed_fields: bool) -> None:
    request = ModelInferRequest.FromString(data)
    if reversed_fields:  # fields may come in any order; the last value of a single one holds
        data = ModelInferRequest(raw_input_contents=request.raw_input_contents).SerializeToString() + data
        request = ModelInferRequest.FromString(data)
    found = large.parse_request(memoryview(data))
    assert [bytes(raw) for raw in found.raws] == list(request.raw_input_contents)
    rest = ModelInferRequest()
    rest.CopyFrom(found.message)
    rest.ClearField("raw_input_contents")
    request.ClearField("raw_input_contents")
    assert rest == request
    if len(data) >= LARGE and found.raws:
        first = large.first_tensor(data)
        assert first is not None
        assert data[first : first + len(found.raws[0])] == bytes(found.raws[0])
        assert large.first_tensor(data[: first - 1]) is None


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=80),
    st.integers(0, 80),
    st.sampled_from([b"", b"\x3a\xff\xff\xff\xff\x7f", b"\x0b", b"\xff" * 11]),
)
def test_what_protobuf_refuses_is_refused(noise: bytes, at: int, more: bytes) -> None:
    data = ModelInferRequest(model_name="m", raw_input_contents=[b"x" * LARGE]).SerializeToString()
    data = noise[:at] + more + data + noise[at:]
    large.first_tensor(data)
    try:
        wanted = ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            large.parse_request(data)
    else:
        assert [bytes(raw) for raw in large.parse_request(data).raws] == list(wanted.raw_input_contents)


def test_many_small_fields_are_left_to_protobuf() -> None:
    data = b"\x3a\x00" * 200_000
    assert len(large.parse_request(data).raws) == 200_000


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_is_what_protobuf_writes(streamed: bool) -> None:
    wide = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    arrays = [wide, wide[:, ::2], np.empty((0, 3), np.int64), np.float16(wide[:1])]
    tensors = [OipTensor(f"y{i}", "FP32", array.shape, array) for i, array in enumerate(arrays)]
    tensors.append(OipTensor("text", "BYTES", (1,), [b"abc"]))
    reply = large.encoded(ModelInferResponse(model_name="m", id="7"), tensors, streamed=streamed)
    assert isinstance(reply, Encoded)
    assert np.shares_memory(np.frombuffer(reply.parts[-9], np.uint8), wide)
    data = reply.SerializeToString()
    assert len(data) == reply.size
    read = ModelStreamInferResponse.FromString(data).infer_response if streamed else ModelInferResponse.FromString(data)
    assert (read.model_name, read.id, [output.name for output in read.outputs]) == (
        "m",
        "7",
        ["y0", "y1", "y2", "y3", "text"],
    )
    assert list(read.raw_output_contents) == [*(array.tobytes() for array in arrays), b"\x03\x00\x00\x00abc"]
    small = large.encoded(ModelInferResponse(model_name="m"), tensors[2:], streamed=streamed)
    assert isinstance(small, ModelStreamInferResponse if streamed else ModelInferResponse)


# MindSpore Serving's messages

NAMES = st.sampled_from(["x", "y", "", "ü" * 40])


@st.composite
def instances(draw: Any) -> Encoding:
    made = PredictRequest()
    made.servable_spec.name = draw(NAMES)
    for _ in range(draw(st.integers(0, 3))):
        items = made.instances.add().items
        for name in draw(st.lists(NAMES, max_size=3)):
            tensor: Any = items[name]
            tensor.dtype = 3
            tensor.shape.dims.extend(draw(st.lists(st.integers(-9, 1 << 40), max_size=3)))
            if draw(st.booleans()):
                tensor.data = draw(st.binary(min_size=1, max_size=4)) * (draw(SIZES) // 2)
            elif draw(st.booleans()):
                tensor.shm_data.memory_key = "k" * draw(SIZES)
            else:
                tensor.bytes_val.append(b"v" * draw(SIZES))
    return Encoding(made.SerializeToString())


@settings(max_examples=80, deadline=None)
@given(instances(), st.booleans(), st.integers(0, 300))
def test_instances_are_read_as_protobuf_reads_them(request: bytes, twice: bool, cut: int) -> None:
    data = request * (1 + twice)
    wanted = PredictRequest.FromString(data)
    found = ms_large.parse_request(memoryview(data))
    for index, instance in enumerate(found.message.instances):
        for name, raw in found.data_of(index).items():
            tensor: Any = instance.items[name]
            assert not tensor.data
            tensor.data = bytes(raw)
    assert found.message == wanted
    first = ms_large.first_tensor(data)
    assert first is None or first <= len(data)
    ms_large.first_tensor(data[: max(0, len(data) - cut)])
    try:
        PredictRequest.FromString(data[:-1])
    except DecodeError:
        with pytest.raises(DecodeError):
            ms_large.parse_request(data[:-1])


def test_the_first_tensor_of_an_instance_is_found() -> None:
    made = PredictRequest()
    made.servable_spec.name = "add"
    made.instances.add().items["x"].data = b"abc" * 100_000
    data = made.SerializeToString()
    first = ms_large.first_tensor(data[:70_000])
    assert first is not None
    assert data[first:].startswith(b"abcabc")
    [views] = ms_large.parse_request(data).data
    assert bytes(views["x"]) == b"abc" * 100_000


def test_instances_of_a_reply_are_what_protobuf_writes() -> None:
    wide = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    reply = PredictReply()
    reply.servable_spec.name = "add"
    sent = ms_large.encoded(reply, [{"y": wide, "s": "text"}, {"y": wide[:, ::2], "b": b"bytes"}, {"y": wide[:2]}])
    read = PredictReply.FromString(sent.SerializeToString())
    assert read.servable_spec.name == "add"
    assert [sorted(instance.items) for instance in read.instances] == [["s", "y"], ["b", "y"], ["y"]]
    for instance, array in zip(read.instances, (wide, wide[:, ::2], wide[:2])):
        tensor = instance.items["y"]
        assert (list(tensor.shape.dims), tensor.dtype) == (list(array.shape), 11)
        assert tensor.data == array.tobytes()
    assert list(read.instances[0].items["s"].bytes_val) == [b"text"]
