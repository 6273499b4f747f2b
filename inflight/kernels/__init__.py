"""The CPU engine: runs a decoder in one native call per step, if the native library was built."""

from inflight.kernels.layout import (
    BLOCK_TYPES,
    Bytes,
    Cost,
    DecodeArrays,
    Delta,
    Layer,
    Norm,
    Packed,
    PackedBytes,
    Precision,
    Saves,
    StepArrays,
    StepImages,
)
from inflight.kernels.library import (
    ACTIVATIONS,
    Activation,
    Format,
    KvType,
    checksum,
    instruction_sets,
    native_file,
    native_reason,
    top_k,
)
from inflight.kernels.program import NativeProgram
from inflight.kernels.sampling import Sampled, SamplerRow, log_softmax_at, sample
from inflight.kernels.tower import TowerArrays, TowerNorm, TowerProgram

__all__ = [
    "ACTIVATIONS",
    "BLOCK_TYPES",
    "Activation",
    "Bytes",
    "Cost",
    "DecodeArrays",
    "Delta",
    "Format",
    "KvType",
    "Layer",
    "NativeProgram",
    "Norm",
    "Packed",
    "PackedBytes",
    "Precision",
    "Sampled",
    "SamplerRow",
    "Saves",
    "StepArrays",
    "StepImages",
    "TowerArrays",
    "TowerNorm",
    "TowerProgram",
    "checksum",
    "instruction_sets",
    "log_softmax_at",
    "native_file",
    "native_reason",
    "sample",
    "top_k",
]
