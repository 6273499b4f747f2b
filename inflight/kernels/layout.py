"""Records that describe a program: formats, layers, packed weights, a step's arrays and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.kernels.library import Format, KvType, native
from inflight.tensors import BLOCKS, Floats

BLOCK_TYPES: tuple[str, ...] = tuple(form.name for form in Format if form >= Format.Q8_0) if native is not None else ()
"""ggml's types that are computed at their own number of bits, by their names in `Blocks`."""

MAX_INPUTS, MAX_GROUP = 1 << 16, 1 << 15
"""Inputs that one scale may span, so that sums of integers fit 32 bits: of a whole row, and of a group."""

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
    """One layer's attention; the fields are as in `inflight.nn.AttentionSpec`.

    Attributes:
        source: the number of the layer whose keys and values this one reads; None: it has its own.
        latent: the first components of a key, which are its value too; 0: values are as wide as keys.
        causal: no query sees a key behind its own, whatever `StepArrays.until` says.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    source: int | None = None
    latent: int = 0
    causal: bool = False

    @property
    def value_dim(self) -> int:
        """Components of a value."""
        return self.latent or self.dim

    def block_bytes(self, block_size: int, kv: KvType) -> int:
        """Bytes of the cache's own keys and values for one block; heads are padded to a multiple of 16 values."""
        if self.source is not None:
            return 0
        entry: int = -(-self.dim // 16) * 16 * native.kv_bytes(kv) + (4 if kv is KvType.INT8 else 0)
        return (1 if self.latent else 2) * block_size * self.kv_heads * entry


@dataclass(frozen=True)
class Routing:
    """How a mixture chooses a token's experts, and their weights.

    Attributes:
        chosen: experts of a token.
        sigmoid: an expert's score is σ of its logit; else the softmax over all experts.
        normalise: the chosen experts' scores are divided by their sum, to which `floor` is added.
        bias: number of a weight [experts] that is added to the scores for the choice only; -1: nothing is.
        groups, kept: experts lie in groups, and only those of the `kept` best groups are chosen from: a group is as
            good as its two best experts together, or with `single` as its best one.
        scale: of the weights.
    """

    chosen: int
    sigmoid: bool = False
    normalise: bool = False
    bias: int = -1
    groups: int = 1
    kept: int = 1
    floor: float = 0.0
    scale: float = 1.0
    single: bool = False


@dataclass(frozen=True)
class Table:
    """A table [n, k] whose rows tokens read, as it lies in a file.

    Attributes:
        type: F32, BF16 or F16, or one of `BLOCK_TYPES`.
        data: uint8, all rows; may be a view of a mapped file.

    Raises:
        ValueError: the bytes do not fit type and shape.
    """

    type: str
    n: int
    k: int
    data: Bytes

    def __post_init__(self) -> None:
        form = BLOCKS.get(self.type)
        size = self.k * (4 if self.type == "F32" else 2) if form is None else self.k // form.values * form.bytes
        if self.data.nbytes != self.n * size or not self.data.flags.c_contiguous:
            raise ValueError(f"{self.data.nbytes} bytes are no table of {self.n} rows of {size}")


@dataclass(frozen=True)
class Norm:
    """A norm of an operation's input.

    Attributes:
        weight: number of its weight (`NativeProgram.weight`).
        centered: the weight is stored as its distance from 1.
        layered: the mean is taken off first (Ba et al., 2016, without a bias). Operations of their own have it, not
            the input of a product.
    """

    weight: int
    eps: float
    centered: bool = False
    layered: bool = False


@dataclass(frozen=True)
class Growth:
    """Queries are multiplied by 1 + factor * ln(1 + ⌊position / period⌋), as in Llama 4.

    Attributes:
        period: in tokens, at least 1.
    """

    factor: float
    period: int


@dataclass(frozen=True)
class StepImages:
    """What images give to the tokens of one step.

    Attributes:
        at: int64 [M], the tokens, ascending.
        rows: float32 [M, H], their embeddings.
        added: each float32 [M, H]; the operation `add_rows` of the same number adds them.
    """

    at: Integers
    rows: Floats
    added: Sequence[Floats] = ()


@dataclass(frozen=True)
class Saves:
    """Copies of rows' recurrent states.

    Attributes:
        at: int64 [S], tokens of the step, ascending; the state behind each is copied.
        to: int64 [S], the slots.
    """

    at: Integers
    to: Integers


@dataclass(frozen=True)
class StepArrays:
    """The tokens of one step.

    Attributes:
        tokens, positions, slots: int64 [T].
        lengths: tokens of each row, R of them, sum T.
        tables: int32 [R, blocks].
        logits_at: int64 [S], ascending.
        reach: int64 [T], the length of the sequence by which each token is rotated; None: up to the token itself.
        images: None: all embeddings are the table's.
        places: int64 [3, T], positions by axis, by which rotations with axes turn; None: `positions` on all axes.
        until: int64 [T], position of the last key that each token sees; None: its own.
        states: int64 [R], the slot of each row's recurrent state; None: the program has no recurrent layers.
        saves: states to be copied on the way; None: none.
        adapters: int64 [R], the number of each row's adapter, 0 for none; None: no row has one.
    """

    tokens: Integers
    positions: Integers
    slots: Integers
    lengths: list[int]
    tables: Integers
    logits_at: Integers
    reach: Integers | None = None
    images: StepImages | None = None
    places: Integers | None = None
    until: Integers | None = None
    states: Integers | None = None
    saves: Saves | None = None
    adapters: Integers | None = None


@dataclass(frozen=True)
class DecodeArrays:
    """The rows of a batch, all of which decode: the batch's own arrays, which the step changes.

    Attributes:
        tokens: int32 [R, width], known tokens of each row.
        blocks: int32 [R, blocks], block tables.
        known: int64 [R].
        computed: int64 [R], positions of the tokens to compute now; one more after the step.
        shift: int64 [R], added to the positions by which rotations with axes turn; None: nothing.
        states: int64 [R], the slot of each row's recurrent state; None: the program has no recurrent layers.
        adapters: as in `StepArrays`.
    """

    tokens: Integers
    blocks: Integers
    known: Integers
    computed: Integers
    shift: Integers | None = None
    states: Integers | None = None
    adapters: Integers | None = None


@dataclass(frozen=True)
class StepOutput:
    """A step's results; valid until the next step.

    Attributes:
        logits: float32 [S, vocabulary].
        hidden: float32 [S, H], the hidden states that the logits were computed from.
        best: int64 [S], the index of each row's largest logit (of equal ones the first); -1: a logit is not a number.
    """

    logits: np.ndarray[Any, np.dtype[np.float32]]
    hidden: np.ndarray[Any, np.dtype[np.float32]]
    best: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Cost:
    """The cost of one operation in the steps since `NativeProgram.measure`; `operations` are arithmetic ones."""

    name: str
    product: int
    seconds: float
    bytes: float
    operations: float


@dataclass(frozen=True)
class Packed:
    """The shape of a packed weight.

    Attributes:
        format: of its values.
        offsets: each scale has an offset.
        gated: see `NativeProgram.product`.
        n, k: outputs and inputs.
        group: inputs that share a scale; 0: all inputs of an output do.
    """

    format: Format
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
