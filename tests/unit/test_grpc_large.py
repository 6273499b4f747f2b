"""Large tensors over gRPC stay where they are: they are read as protobuf reads them, and sent as it writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.frontends.oip import large
from inflight.frontends.oip.tensors import OipTensor
from inflight.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from inflight.wire import Encoded

SIZES = st.sampled_from([0, 1, 100, 65_535, 65_536, 100_001])


@st.composite
def requests(draw: Any) -> ModelInferRequest:
    made = ModelInferRequest(model_name=draw(st.text(max_size=9)), id=draw(st.text(max_size=300)))
    for index in range(draw(st.integers(0, 3))):
        made.inputs.add(name=f"x{index}", datatype="UINT8", shape=draw(st.lists(st.integers(-9, 1 << 40), max_size=3)))
        made.raw_input_contents.append(draw(st.binary(min_size=1, max_size=4)) * (draw(SIZES) // 2))
    made.parameters["timeout"].int64_param = draw(st.integers(-9, 1 << 62))
    return made


@settings(max_examples=60, deadline=None)
@given(requests(), st.booleans())
def test_a_request_is_read_as_protobuf_reads_it(request: ModelInferRequest, reversed_fields: bool) -> None:
    data = request.SerializeToString()
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
    if len(data) >= large.LARGE and found.raws:
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
    data = ModelInferRequest(model_name="m", raw_input_contents=[b"x" * large.LARGE]).SerializeToString()
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
