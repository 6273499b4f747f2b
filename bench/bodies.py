"""Requests as bytes: the same array in each protocol's form, and the checks of the replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

JSON = "application/json"
BINARY = "application/octet-stream"

Check = Callable[[bytes, "dict[str, str]"], None]


class WrongReply(RuntimeError):
    """A server's answer differs from the model's result."""


@dataclass(frozen=True)
class Body:
    """One request.

    Attributes:
        data: the body; a gRPC message without its frame.
        headers: of the HTTP request; empty for gRPC.
        check: called with a reply's body and headers; raises WrongReply.
    """

    data: bytes
    headers: dict[str, str]
    check: Check


Named = dict[str, np.ndarray]


def v2_json(inputs: Named, outputs: Named) -> Body:
    """Open Inference Protocol, REST, numbers as JSON. Every array's first dimension counts instances."""
    tensors = [
        {"name": name, "shape": list(value.shape), "datatype": "FP32", "data": _rounded(value.ravel())}
        for name, value in inputs.items()
    ]

    def check(data: bytes, headers: dict[str, str]) -> None:
        reply = json.loads(data)
        for tensor in reply.get("outputs", []):
            got = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
            _compare(tensor["name"], got, outputs)
        if len(reply.get("outputs", [])) != len(outputs):
            raise WrongReply(f"the reply has no outputs: {data[:300]!r}")

    return Body(_compact({"inputs": tensors}), {"Content-Type": JSON}, check)


def v2_binary(inputs: Named, outputs: Named) -> Body:
    """Open Inference Protocol, REST, with the binary extension both ways."""
    tensors = [
        {
            "name": name,
            "shape": list(value.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": value.nbytes},
        }
        for name, value in inputs.items()
    ]
    header = _compact({"inputs": tensors, "parameters": {"binary_data_output": True}})
    data = b"".join([header, *(value.tobytes() for value in inputs.values())])

    def check(data: bytes, headers: dict[str, str]) -> None:
        size = int(headers.get("inference-header-content-length", 0))
        if not size:
            raise WrongReply(f"the reply is not binary: {data[:300]!r}")
        at = size
        for tensor in json.loads(data[:size])["outputs"]:
            end = at + tensor["parameters"]["binary_data_size"]
            got = np.frombuffer(data[at:end], np.float32).reshape(tensor["shape"])
            _compare(tensor["name"], got, outputs)
            at = end

    return Body(data, {"Content-Type": BINARY, "Inference-Header-Content-Length": str(len(header))}, check)


def mindspore_json(inputs: Named, outputs: Named) -> Body:
    """MindSpore Serving's REST form: one object per instance."""
    count = len(next(iter(inputs.values())))
    instances = [{name: _rounded(value[row]) for name, value in inputs.items()} for row in range(count)]

    def check(data: bytes, headers: dict[str, str]) -> None:
        rows = json.loads(data).get("instances", [])
        if len(rows) != count or not all(name in row for row in rows for name in outputs):
            raise WrongReply(f"the reply does not have {count} instances: {data[:300]!r}")
        for name in outputs:
            _compare(name, np.array([row[name] for row in rows], np.float32), outputs)

    return Body(_compact({"instances": instances}), {"Content-Type": JSON}, check)


def mindspore_grpc(servable: str, inputs: Named, outputs: Named) -> Body:
    """A serialised `PredictRequest`; the method is called `predict`."""
    from inflight.proto.ms_service_pb2 import MS_FLOAT32, PredictReply, PredictRequest

    request = PredictRequest()
    request.servable_spec.name = servable
    request.servable_spec.method_name = "predict"
    count = len(next(iter(inputs.values())))
    for row in range(count):
        instance = request.instances.add()
        for name, value in inputs.items():
            tensor = instance.items[name]
            tensor.shape.dims.extend(value.shape[1:])
            tensor.dtype = MS_FLOAT32
            tensor.data = value[row].tobytes()

    def check(data: bytes, headers: dict[str, str]) -> None:
        reply = PredictReply.FromString(data)
        if len(reply.instances) != count or reply.error_msg:
            raise WrongReply(f"the reply does not have {count} instances: {str(reply)[:300]}")
        for name in outputs:
            tensors = [instance.items[name] for instance in reply.instances]
            rows = [np.frombuffer(t.data, np.float32).reshape(tuple(t.shape.dims)) for t in tensors]
            _compare(name, np.stack(rows), outputs)

    return Body(request.SerializeToString(), {}, check)


def v2_grpc(model: str, inputs: Named, outputs: Named) -> Body:
    """A serialised `ModelInferRequest` with raw contents."""
    from inflight.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse

    request = ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, "FP32"
        tensor.shape.extend(value.shape)
        request.raw_input_contents.append(value.tobytes())

    def check(data: bytes, headers: dict[str, str]) -> None:
        reply = ModelInferResponse.FromString(data)
        if len(reply.outputs) != len(outputs):
            raise WrongReply(f"the reply has no outputs: {str(reply)[:300]}")
        for tensor, raw in zip(reply.outputs, reply.raw_output_contents):
            _compare(tensor.name, np.frombuffer(raw, np.float32).reshape(tuple(tensor.shape)), outputs)

    return Body(request.SerializeToString(), {}, check)


def same_bytes(body: Body) -> Body:
    """The same request to a server that returns the body."""

    def check(data: bytes, headers: dict[str, str]) -> None:
        if data != body.data:
            raise WrongReply(f"the reply has {len(data)} bytes that differ from the request's {len(body.data)}")

    return Body(body.data, body.headers, check)


def same_message(body: Body) -> Body:
    """As `same_bytes`, for a server that parses: a protobuf map may come back in another order."""
    from inflight.proto.ms_service_pb2 import PredictRequest

    def check(data: bytes, headers: dict[str, str]) -> None:
        if PredictRequest.FromString(data) != PredictRequest.FromString(body.data):
            raise WrongReply("the reply is another message than the request")

    return Body(body.data, body.headers, check)


def grpc_frame(message: bytes) -> bytes:
    """A gRPC message as framed in HTTP/2: the flag for no compression, its length, its bytes."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _compare(name: str, got: np.ndarray, outputs: Named) -> None:
    wanted = outputs.get(name)
    if wanted is None:
        raise WrongReply(f"the reply has an output '{name}' that nobody asked for")
    if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=1e-3, atol=1e-4):
        raise WrongReply(f"output '{name}' has shape {got.shape}, wanted {wanted.shape}, or other numbers")


def _rounded(value: np.ndarray) -> list[object]:
    """Numbers as a client would write them: the shortest text that gives the same float32."""
    listed: list[object] = [
        _rounded(item) if isinstance(item, np.ndarray) else float(np.format_float_positional(item, trim="0"))
        for item in value
    ]
    return listed


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
