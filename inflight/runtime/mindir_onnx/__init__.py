"""MindIR files without MindSpore: read, decrypted, converted to ONNX in memory."""

from inflight.runtime.mindir_onnx.convert import (
    COLLECTIVES,
    ConvertedGraph,
    collectives_in,
    convert,
    supported_primitives,
)
from inflight.runtime.mindir_onnx.model import ConversionRefused, MindIR, TensorType
from inflight.runtime.mindir_onnx.reader import read_mindir
from inflight.runtime.mindir_onnx.signature import read_signature

__all__ = [
    "COLLECTIVES",
    "ConversionRefused",
    "ConvertedGraph",
    "MindIR",
    "TensorType",
    "collectives_in",
    "convert",
    "read_mindir",
    "read_signature",
    "supported_primitives",
]
