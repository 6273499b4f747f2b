"""What programs are described with: formats, layers, weights, a step's arrays and its results."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np


class Format(enum.IntEnum):
    """How a packed weight keeps its values; `csrc/types.h` has the layouts."""

    FLOAT = 0
    BF16 = 1
    INT8 = 2
    GROUP8 = 3
    GROUP4 = 4
    Q8_0 = 5
    Q4_0 = 6
    Q4_1 = 7
    Q5_0 = 8
    Q5_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 15
    IQ4_XS = 16
    MXFP4 = 17


BLOCK_TYPES = tuple(format.name for format in Format if format >= Format.Q8_0)
"""ggml's types that are computed at their own number of bits, by the names that `Blocks` has for them."""


class KvType(enum.IntEnum):
    """What the cache holds; INT8 has a scale for each position and head."""

    FLOAT = 0
    BF16 = 1
    INT8 = 2


MOST_INPUTS, MOST_GROUPED = 1 << 16, 1 << 15
"""Inputs that one scale may span, so that sums of integers fit 32 bits: of a whole row, and of a group."""

KV_BYTES = {KvType.FLOAT: 4, KvType.BF16: 2, KvType.INT8: 1}


class Activation(enum.IntEnum):
    """What a gate goes through."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Integers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Precision:
    """How float weights are packed.

    Attributes:
        format: of the packed weight.
        group: inputs that share a scale, in the grouped formats.
    """

    format: Format
    group: int = 0


@dataclass(frozen=True)
class Layer:
    """One layer's attention, as `inflight.nn.AttentionSpec` has it."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def block_bytes(self, block_size: int, kv: KvType) -> int:
        """Bytes of the cache's keys and values for one block; heads are padded to a multiple of 16 values."""
        each: int = -(-self.dim // 16) * 16 * KV_BYTES[kv] + (4 if kv is KvType.INT8 else 0)
        return 2 * block_size * self.kv_heads * each


@dataclass(frozen=True)
class Norm:
    """A norm of what an operation reads.

    Attributes:
        weight: number of its weight.
        centered: the weight is kept as its distance from 1.
    """

    weight: int
    eps: float
    centered: bool = False


@dataclass(frozen=True)
class StepArrays:
    """The tokens of one step.

    Attributes:
        tokens, positions, slots: int64 [T].
        lengths: tokens of each row, R of them, sum T.
        tables: int32 [R, blocks].
        logits_at: int64 [S], ascending.
        reach: int64 [T], the length of the sequence that a token turns by, where a rotation asks; None: up to itself.
    """

    tokens: Integers
    positions: Integers
    slots: Integers
    lengths: list[int]
    tables: Integers
    logits_at: Integers
    reach: Integers | None = None


@dataclass(frozen=True)
class DecodeArrays:
    """The rows of a batch that decode, in its own arrays, which the step goes on in.

    Attributes:
        tokens: int32 [R, width], known tokens of each row.
        blocks: int32 [R, blocks], block tables.
        known: int64 [R].
        computed: int64 [R], places of the tokens to compute now; one more after the step.
    """

    tokens: Integers
    blocks: Integers
    known: Integers
    computed: Integers


@dataclass(frozen=True)
class StepOutput:
    """What a step gave; valid until the next one.

    Attributes:
        logits: float32 [S, vocabulary].
        hidden: float32 [S, H], what the logits were made of.
        best: int64 [S], the first of each row's largest logits; -1 of a row whose logits are not all numbers.
    """

    logits: np.ndarray[Any, np.dtype[np.float32]]
    hidden: np.ndarray[Any, np.dtype[np.float32]]
    best: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Cost:
    """What one operation took in the steps since `NativeProgram.measure`."""

    name: str
    product: int
    seconds: float
    bytes: float
    operations: float


@dataclass(frozen=True)
class Packed:
    """What a packed weight is.

    Attributes:
        format: a `Format`; `offsets`: its scales have offsets; `gated`: see `NativeProgram.product`.
        n, k: outputs and inputs; `group`: inputs that share a scale, 0 where all of an output do.
    """

    format: int
    offsets: bool
    gated: bool
    n: int
    k: int
    group: int


@dataclass(frozen=True)
class PackedBytes:
    """A packed weight: its panels, aligned to 64, and the scales of its outputs (float32; INT8 only)."""

    shape: Packed
    data: Bytes
    scales: Bytes
