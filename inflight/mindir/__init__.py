"""MindIR files without MindSpore: read, decrypted, converted to ONNX in memory."""

from inflight.mindir.convert import (
    COLLECTIVES,
    ConvertedGraph,
    collectives_in,
    convert,
    supported_primitives,
)
from inflight.mindir.model import ConversionRefused, MindIR, TensorType
from inflight.mindir.parts import EXCHANGES, Exchange, Parts, convert_parts
from inflight.mindir.reader import read_mindir
from inflight.mindir.signature import read_signature

__all__ = [
    "COLLECTIVES",
    "EXCHANGES",
    "ConversionRefused",
    "ConvertedGraph",
    "Exchange",
    "MindIR",
    "Parts",
    "TensorType",
    "collectives_in",
    "convert",
    "convert_parts",
    "read_mindir",
    "read_signature",
    "supported_primitives",
]
