"""The CPU engine: a decoder as one native call a step, where the native library is there."""

from inflight.kernels.program import (
    ISA,
    Activation,
    Cost,
    Format,
    KvType,
    Layer,
    NativeProgram,
    Norm,
    Packed,
    PackedBytes,
    Precision,
    StepArrays,
    instruction_sets,
    native_reason,
    top_k,
)
from inflight.kernels.quantised import Quantised, quantise, stack

__all__ = [
    "ISA",
    "Activation",
    "Cost",
    "Format",
    "KvType",
    "Layer",
    "NativeProgram",
    "Norm",
    "Packed",
    "PackedBytes",
    "Precision",
    "Quantised",
    "StepArrays",
    "instruction_sets",
    "native_reason",
    "quantise",
    "stack",
    "top_k",
]
