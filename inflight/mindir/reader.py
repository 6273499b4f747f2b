"""Reads a MindIR file into plain data: decrypts it, parses the protobuf, finds the weights beside it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from inflight.contract import Array
from inflight.errors import StartError
from inflight.mindir.crypto import decrypt, encryption_mode
from inflight.mindir.model import BFLOAT16, DTYPES, MONAD, MindIR, Node, Opaque, Port, TensorType
from inflight.proto import mind_ir_reader_pb2 as pb

_REFERENCE = "REF::"
_CONSTANT = "Constant"

# Attribute types, and the field that holds a scalar outside and inside a tuple.
_SCALARS: dict[int, tuple[str, str, Callable[[Any], Any]]] = {
    **dict.fromkeys((2, 3, 4, 5, 6, 7, 12, 13), ("i", "ints", int)),
    1: ("f", "floats", float),
    10: ("f", "floats", float),
    11: ("d", "doubles", float),
    16: ("f", "floats", float),
    8: ("s", "strings", lambda raw: raw.decode("utf-8", "replace")),
    9: ("i", "ints", bool),
}
_TENSOR, _TENSORS, _TUPLE, _LIST, _NONE = 17, 19, 20, 21, 25
_MONADS = frozenset({23, 24})


class _Weights:
    """Finds the values of tensors, in the file itself or in files beside it."""

    def __init__(self, file: Path, key: bytes | None, mode: str) -> None:
        self._folder = file.parent.resolve()
        self._name = file.name
        self._key = key
        self._mode = mode
        self._files: dict[str, Array] = {}

    def array(self, tensor: pb.Tensor) -> Array:
        """The tensor's values; read-only."""
        dtype = DTYPES.get(tensor.data_type)
        if dtype is None:
            raise StartError(
                f"Load model failed, '{self._name}' has a tensor '{tensor.name}' of element type number "
                f"{tensor.data_type}, which cannot be served: export the model with numbers only"
            )
        stored = np.dtype("uint16" if tensor.data_type == BFLOAT16 else dtype).newbyteorder("<")
        shape = tuple(tensor.dims)
        raw = self._external(tensor) if tensor.HasField("external_data") else tensor.raw_data
        if any(size < 0 for size in shape) or prod(shape) * stored.itemsize != len(raw):
            raise StartError(
                f"Load model failed, '{self._name}' is damaged: tensor '{tensor.name}' of shape {shape} and type "
                f"{dtype} comes with {len(raw)} bytes; export the model again"
            )
        values: Array = np.frombuffer(raw, stored).reshape(shape)
        if tensor.data_type == BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _external(self, tensor: pb.Tensor) -> Array:
        """The bytes that lie in another file, without reading that file whole."""
        where = tensor.external_data
        if where.location not in self._files:
            self._files[where.location] = self._open(where.location)
        data = self._files[where.location]
        if where.offset < 0 or where.length < 0 or where.offset + where.length > len(data):
            raise StartError(
                f"Load model failed, '{where.location}' beside '{self._name}' is too short for tensor "
                f"'{tensor.name}': copy the folder again from where the model was exported"
            )
        return data[where.offset : where.offset + where.length]

    def _open(self, location: str) -> Array:
        path = (self._folder / location).resolve()
        if not path.is_relative_to(self._folder):
            raise StartError(
                f"Load model failed, '{self._name}' asks for weights in '{location}', outside of its own folder: "
                "export the model again and keep its files together"
            )
        try:
            data: Array = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as failure:
            raise StartError(
                f"Load model failed, the weights '{location}' of '{self._name}' cannot be read ({failure}): copy them "
                "into the folder of the model file"
            ) from failure
        if encryption_mode(data[:4].tobytes()) is None:
            return data
        return np.frombuffer(decrypt(data.tobytes(), self._key, self._mode, location), np.uint8)


def read_mindir(file: Path, dec_key: bytes | None = None, dec_mode: str = "AES-GCM") -> MindIR:
    """Reads one `.mindir` file.

    Args:
        dec_key: 16, 24 or 32 bytes; None for a plain file.
        dec_mode: `AES-GCM`, `AES-CBC` or `SM4-CBC`.

    Raises:
        StartError: the file cannot be read, is damaged, is not MindIR, or key and mode do not fit it.
    """
    try:
        data = file.read_bytes()
    except OSError as failure:
        raise StartError(f"Load model failed, cannot read '{file}': {failure.strerror or failure}") from failure
    model = _parse(decrypt(data, dec_key, dec_mode, file.name), file.name, dec_key is not None)
    del data
    weights = _Weights(file, dec_key, dec_mode)
    primitives = {item.name: item for item in model.primitives}
    functions = tuple(function.name for function in model.functions)
    values: dict[str, Any] = {item.name: weights.array(item) for item in model.graph.parameter}
    nodes: dict[str, Node] = {}
    calls: list[str] = []
    for node in model.graph.node:
        if not node.output:
            raise StartError(f"Load model failed, '{file.name}' is damaged: a node has no output; export it again")
        if node.op_type == _CONSTANT:
            values[node.output[0]] = _constant(node, weights)
            continue
        reference = node.op_type.removeprefix(_REFERENCE)
        primitive = primitives.get(reference)
        if primitive is None:
            calls.append(reference)
        nodes[node.output[0]] = _node(node, primitive, reference, weights)
    inputs = tuple(_port(item) for item in model.graph.input)
    _check_distinct(inputs, values, nodes, file.name)
    return MindIR(
        version=model.model_version or model.producer_version,
        inputs=inputs,
        values=values,
        nodes=nodes,
        outputs=tuple((item.name, _declared(item)) for item in model.graph.output),
        functions=functions,
        calls=tuple(calls),
        primitives=tuple(dict.fromkeys(item.op_type for item in model.primitives)),
    )


def _parse(data: bytes, name: str, decrypted: bool) -> pb.Model:
    model = pb.Model()
    try:
        model.ParseFromString(data)
    except DecodeError as failure:
        # One wrong key in 256 gives padding that looks right.
        reason = "it is no MindIR file, or cut short: export it with file_format='MINDIR', or copy it again"
        if decrypted:
            reason = "dec_key is not the key it was exported with, or it is damaged"
        raise StartError(f"Load model failed, '{name}' cannot be read: {reason}") from failure
    if not model.HasField("graph") or not model.graph.output:
        raise StartError(
            f"Load model failed, '{name}' holds no graph: export it with mindspore.export(..., file_format='MINDIR')"
        )
    if model.HasField("little_endian") and not model.little_endian:
        raise StartError(f"Load model failed, '{name}' was exported on a big-endian machine: export it on another one")
    return model


def _check_distinct(inputs: tuple[Port, ...], values: dict[str, Any], nodes: dict[str, Node], name: str) -> None:
    ports = [port.name for port in inputs]
    if len(set(ports)) != len(ports) or not values.keys().isdisjoint(ports) or not nodes.keys().isdisjoint(ports):
        raise StartError(f"Load model failed, '{name}' is damaged: two values have one name; export it again")


def _constant(node: pb.Node, weights: _Weights) -> Any:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _value(attribute, weights)
    return Opaque("a constant without a value")


def _node(node: pb.Node, primitive: pb.Primitive | None, reference: str, weights: _Weights) -> Node:
    attributes: dict[str, Any] = {}
    if primitive is not None:
        attributes = {item.name: _value(item, weights) for item in primitive.attribute}
    result = next((_result(item) for item in node.attribute if item.name == "shape"), None)
    return Node(
        name=node.output[0],
        primitive=reference if primitive is None else primitive.op_type,
        inputs=tuple(node.input),
        attributes=attributes,
        result=result,
    )


def _port(item: pb.ValueInfo) -> Port:
    return Port(item.name, _type(item.tensor[0]) if item.tensor else TensorType(None, None))


def _declared(item: pb.ValueInfo) -> Any:
    if item.tensor:
        return _type(item.tensor[0])
    return _result(item.attr_info) if item.HasField("attr_info") else None


def _result(attribute: pb.Attribute) -> Any:
    """A TensorType, a tuple of results, or None."""
    if attribute.type in (_TUPLE, _LIST):
        return tuple(_result(item) for item in attribute.values)
    if attribute.tensors:
        return _type(attribute.tensors[0])
    return _type(attribute.t) if attribute.HasField("t") else None


def _type(tensor: pb.Tensor) -> TensorType:
    dims = tuple(tensor.dims)
    known = all(size >= -1 for size in dims)
    return TensorType(DTYPES.get(tensor.data_type), dims if known else None)


def _value(attribute: pb.Attribute, weights: _Weights) -> Any:
    """Python scalars, texts, None, arrays, TensorType (a dtype), Opaque, and tuples of these."""
    kind = attribute.type
    if kind in _SCALARS:
        single, repeated, convert = _SCALARS[kind]
        if attribute.HasField(single):
            return convert(getattr(attribute, single))
        inside = getattr(attribute, repeated)
        return convert(inside[0]) if inside else convert(getattr(attribute, single))
    if kind in (_TUPLE, _LIST):
        return tuple(_value(item, weights) for item in attribute.values)
    if kind in (_TENSOR, _TENSORS):
        return _tensor_value(attribute, weights)
    if kind == _NONE:
        return None
    return MONAD if kind in _MONADS else Opaque(f"a value of MindIR's attribute type {kind}")


def _tensor_value(attribute: pb.Attribute, weights: _Weights) -> Any:
    tensor = attribute.tensors[0] if attribute.tensors else attribute.t
    holds_data = bool(tensor.raw_data) or tensor.HasField("external_data") or 0 in tensor.dims
    # A tensor without data is how a dtype is written.
    return weights.array(tensor) if holds_data else _type(tensor)
