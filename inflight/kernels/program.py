"""A decoder's operations over numbered buffers: built here, readable, run by `csrc` in one call a step.

Every method that adds an operation checks what it is given, since the other side works on bare addresses.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from inflight.kernels.quantised import Quantised

try:
    from inflight.kernels import _native  # type: ignore[attr-defined]
except ImportError as error:  # built without a compiler
    _native = None
    _missing = str(error)
else:
    _missing = ""

ISA = "INFLIGHT_CPU_ISA"
"""Environment variable that names one of `instruction_sets`, for tests."""
ENGINE = "INFLIGHT_CPU_ENGINE"
"""Environment variable: `torch` leaves the native engine out."""

_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Format(enum.IntEnum):
    """How a packed weight keeps its values; `csrc/types.h` has the layouts."""

    FLOAT = 0
    BF16 = 1
    INT8 = 2
    GROUP8 = 3
    GROUP4 = 4


class KvType(enum.IntEnum):
    """What the cache holds; INT8 has a scale for each position and head."""

    FLOAT = 0
    BF16 = 1
    INT8 = 2


MOST_INPUTS, MOST_GROUPED = 1 << 16, 1 << 15
"""Inputs that one scale may span, so that sums of integers fit 32 bits: of a whole row, and of a group."""

KV_DTYPES = {KvType.FLOAT: torch.float32, KvType.BF16: torch.bfloat16, KvType.INT8: torch.int8}


class _Code(enum.IntEnum):
    EMBED = 0
    PRODUCT = 1
    ROTATE = 2
    ATTEND = 3
    NORM = 4
    GATHER = 5
    CAP = 6
    MIXTURE = 7


class _Mode(enum.IntEnum):
    STORE = 0
    ADD = 1
    GATE = 2


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
        each: int = -(-self.dim // 16) * 16 * KV_DTYPES[kv].itemsize + (4 if kv is KvType.INT8 else 0)
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
    """The tokens of one step; all contiguous, on the CPU.

    Attributes:
        tokens, positions, slots: int64 [T].
        lengths: tokens of each row, R of them, sum T.
        tables: int32 [R, blocks].
        logits_at: int64 [S], ascending.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: list[int]
    tables: torch.Tensor
    logits_at: torch.Tensor


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
        best: int64 [S] on the host, the first of each row's largest logits.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
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


def _view(address: int, size: int) -> Bytes:
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _address(data: Bytes) -> int:
    return int(data.__array_interface__["data"][0])


def native_reason() -> str | None:
    """Why the native engine cannot run here; None where it can."""
    if os.environ.get(ENGINE, "").lower() == "torch":
        return f"{ENGINE} is torch"
    if _native is None:
        return f"the package was built without a C++ compiler; install it again where there is one ({_missing})"
    return None


def instruction_sets() -> list[str]:
    """What this machine runs, the fastest first; empty without the native library."""
    return list(_native.available()) if _native is not None else []


class Top(NamedTuple):
    """values float32 [rows, k], largest first; indices int64 [rows, k], of equal values the lower first."""

    values: torch.Tensor
    indices: torch.Tensor


def top_k(logits: torch.Tensor, k: int) -> Top:
    """The k largest of each row, float32 [rows, n]; natively where the library is there and the rows are on the CPU."""
    rows, n = logits.shape
    if _native is None or logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        return Top(*torch.topk(logits, k, dim=-1))
    values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    _native.top_k(logits.data_ptr(), rows, logits.stride(0), n, k, values.data_ptr(), indices.data_ptr())
    return Top(values, indices)


def _packable(weight: Quantised) -> bool:
    """Whether the packed formats can hold it: groups of whole steps whose sums fit 32 bits."""
    k = weight.shape[1]
    if weight.group < k:
        return weight.group % 8 == 0 and weight.group <= MOST_GROUPED
    return k <= MOST_GROUPED or (weight.bits == 8 and weight.offsets is None and k <= MOST_INPUTS)


class NativeProgram:
    """One decoder.

    Args:
        threads: that work on it.
        isa: one of `instruction_sets`; None: INFLIGHT_CPU_ISA, else the best.

    Attributes:
        isa: the one in use.
        bytes: memory of the packed weights.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        if _native is None:
            raise RuntimeError(native_reason())
        self._program: Any = _native.Program(threads, isa if isa is not None else os.environ.get(ISA, ""))
        self._widths: list[int] = []
        self._products: list[Packed] = []
        self._layers: list[Layer] = []
        self._norms: list[int] = []
        self._held_packed: list[PackedBytes] = []
        self._rows = StepOutput(torch.empty(0), torch.empty(0), np.empty(0, np.int64))
        self._output = self._rows
        self._decoding: DecodeArrays | None = None  # those that the arguments of `decode` are made for
        self._arguments: tuple[int, ...] = ()

    @property
    def isa(self) -> str:
        return str(self._program.isa)

    @property
    def bytes(self) -> int:
        return int(self._program.bytes)

    # What operations work on

    def buffer(self, width: int) -> int:
        """Floats [rows, width] that live for one step."""
        self._widths.append(width)
        return int(self._program.add_buffer(width))

    def product(
        self,
        weight: torch.Tensor | Quantised,
        bias: torch.Tensor | None = None,
        precision: Precision | None = None,
        *,
        gated: bool = False,
    ) -> int:
        """Packs a weight [n, k]; the original is not needed any more.

        Args:
            weight: float32, bfloat16 or float16, or integers.
            bias: [n].
            precision: what floats become; None: float32 stays, the others become bfloat16.
            gated: the first half of the outputs goes through an activation and is multiplied with the second.
        """
        added = None if bias is None else bias.float().contiguous()
        n, k = weight.shape
        if added is not None and added.shape != (n,):
            raise ValueError(f"a bias of {list(added.shape)} does not fit a weight of {[n, k]}")
        held = 0 if added is None else added.data_ptr()
        if isinstance(weight, Quantised) and not _packable(weight):
            weight = weight.dequantise(torch.bfloat16)
        if isinstance(weight, Quantised):
            return self._codes(weight, held, gated)
        if weight.dtype not in _SOURCES:
            raise ValueError(f"a weight must be float32, bfloat16 or float16, not {weight.dtype}")
        if precision is None:
            precision = Precision(Format.FLOAT if weight.dtype == torch.float32 else Format.BF16)
        whole = weight.contiguous()
        self._products.append(Packed(precision.format, False, gated, n, k, precision.group))
        return int(
            self._program.add_floats(
                whole.data_ptr(), _SOURCES[whole.dtype], held, precision.format, gated, n, k, precision.group
            )
        )

    def _codes(self, weight: Quantised, bias: int, gated: bool) -> int:
        n, k = weight.shape
        whole = weight.bits == 8 and weight.group >= k and weight.offsets is None and k <= MOST_INPUTS
        format = Format.INT8 if whole else Format.GROUP8 if weight.bits == 8 else Format.GROUP4
        group = -(-k // 8) * 8 if weight.group >= k else weight.group
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        offsets = None if weight.offsets is None else weight.offsets.contiguous()
        self._products.append(Packed(format, offsets is not None, gated, n, k, 0 if whole else group))
        return int(
            self._program.add_codes(
                codes.data_ptr(),
                scales.data_ptr(),
                0 if offsets is None else offsets.data_ptr(),
                bias,
                format,
                gated,
                n,
                k,
                0 if whole else group,
            )
        )

    def packed(self, product: int) -> PackedBytes:
        """A product's packed bytes, where they lie in this program."""
        data, size, scales, scales_size = self._program.packed(product)
        return PackedBytes(self._products[product], _view(data, size), _view(scales, scales_size))

    def product_of(self, packed: PackedBytes, bias: torch.Tensor | None = None) -> int:
        """A weight that is packed already, where it lies; its memory must outlive the program.

        Raises:
            ValueError: the bytes are not those of such a weight.
        """
        shape = packed.shape
        whole = _native.packed_bytes(shape.format, shape.offsets, shape.gated, shape.n, shape.k, shape.group)
        panels = -(-shape.n // 2 // 16) if shape.gated else -(-shape.n // 32)
        scales = panels * 32 * 4 if shape.format == Format.INT8 else 0
        if len(packed.data) != whole or len(packed.scales) != scales or (bias is not None and bias.numel() != shape.n):
            raise ValueError(f"{len(packed.data)} bytes are no packed weight {shape}")
        added = None if bias is None else bias.float().contiguous()
        self._products.append(shape)
        self._held_packed.append(packed)
        return int(
            self._program.add_packed(
                _address(packed.data),
                _address(packed.scales) if len(packed.scales) else 0,
                0 if added is None else added.data_ptr(),
                shape.format,
                shape.offsets,
                shape.gated,
                shape.n,
                shape.k,
                shape.group,
            )
        )

    def weight(self, values: torch.Tensor) -> int:
        """A norm's weight."""
        held = values.float().contiguous()
        self._norms.append(held.numel())
        return int(self._program.add_norm(held.data_ptr(), held.numel()))

    def rope(
        self, inverse: Sequence[float], factor: float, far: Sequence[float] | None = None, original: int = 0
    ) -> int:
        """A rotation: radians a position, of each pair of components; `far` from position `original` on."""
        return int(self._program.add_rope(list(inverse), list(far or ()), factor, original))

    def layer(self, layer: Layer) -> int:
        """A layer whose cache is set later."""
        if layer.heads % layer.kv_heads:
            raise ValueError(f"{layer.heads} heads do not divide into {layer.kv_heads} key heads")
        if not 0 < layer.dim <= 1024:
            raise ValueError(f"heads of {layer.dim} values; up to 1024 are supported")
        self._layers.append(layer)
        return int(
            self._program.add_layer(
                layer.heads, layer.kv_heads, layer.dim, layer.scale, layer.window or 0, layer.softcap or 0.0
            )
        )

    def make_caches(self, blocks: int, block_size: int, kv: KvType) -> int:
        """Memory of all layers' keys and values, zeroed; returns its bytes."""
        return int(self._program.make_caches(blocks, block_size, int(kv)))

    # Operations, in their order

    def embed(self, table: int, to: int, scale: float = 1.0) -> None:
        """to = table[token] * scale."""
        self._fits(self._products[table].k, to)
        self._add(_Code.EMBED, from_=to, to=to, product=table, scale=scale)

    def multiply(
        self,
        from_: int,
        to: int,
        product: int,
        *,
        norm: Norm | None = None,
        add: bool = False,
        scale: float = 1.0,
        act: Activation | None = None,
    ) -> None:
        """to = norm(from) Wᵀ + b, or to += scale * that, or to = act(its first half) * its second half."""
        packed = self._products[product]
        self._fits(packed.k, from_)
        self._fits(packed.n // 2 if packed.gated else packed.n, to)
        if packed.gated != (act is not None):
            raise ValueError("a gated product and an activation go together")
        mode = _Mode.GATE if act is not None else _Mode.ADD if add else _Mode.STORE
        self._add(
            _Code.PRODUCT,
            from_=from_,
            to=to,
            product=product,
            mode=mode,
            scale=scale,
            act=act or Activation.SILU,
            **self._normed(norm, packed.k),
        )

    def rotate(self, at: int, layer: int, rope: int | None, norms: tuple[Norm, Norm] | None = None) -> None:
        """Queries and keys in place: norms of heads, rotation; keys and values go to their slots."""
        spec = self._layers[layer]
        self._fits((spec.heads + 2 * spec.kv_heads) * spec.dim, at)
        settings = self._normed(norms[0] if norms else None, spec.dim)
        self._normed(norms[1] if norms else None, spec.dim)
        second = norms[1].weight if norms else -1
        turning = -1 if rope is None else rope
        self._add(_Code.ROTATE, from_=at, to=at, layer=layer, rope=turning, second=second, **settings)

    def attend(self, from_: int, to: int, layer: int) -> None:
        """to = attention of the queries that lead `from`."""
        spec = self._layers[layer]
        self._fits(spec.heads * spec.dim, to)
        self._add(_Code.ATTEND, from_=from_, to=to, layer=layer)

    def norm(self, from_: int, to: int, norm: Norm, *, add: bool = False, scale: float = 1.0) -> None:
        """to = norm(from), or to += scale * norm(from)."""
        self._fits(self._widths[from_], to)
        self._add(
            _Code.NORM,
            from_=from_,
            to=to,
            mode=_Mode.ADD if add else _Mode.STORE,
            scale=scale,
            **self._normed(norm, self._widths[to]),
        )

    def mixture(
        self,
        at: int,
        logits: int,
        gate_up: Sequence[int],
        down: Sequence[int],
        *,
        norm: Norm,
        chosen: int,
        normalise: bool,
        act: Activation,
        scale: float = 1.0,
    ) -> None:
        """at += scale * the chosen experts' MLPs of norm(at), weighted by the softmax of the router's `logits`."""
        for product in (*gate_up, *down):
            packed, shape = self._products[product], self._products[gate_up[0] if product in gate_up else down[0]]
            if packed != shape:
                raise ValueError("the experts of a layer have one shape and format")
        self._fits(len(gate_up), logits)
        wide, narrow = self._products[gate_up[0]], self._products[down[0]]
        self._fits(wide.k, at)
        self._fits(narrow.n, at)
        if not wide.gated or narrow.gated or wide.n != 2 * narrow.k or not 0 < chosen <= len(gate_up):
            raise ValueError(f"experts of {wide} and {narrow} do not fit together")
        settings = self._normed(norm, wide.k)
        self._add(
            _Code.MIXTURE,
            from_=at,
            to=logits,
            gate_up=list(gate_up),
            down=list(down),
            chosen=chosen,
            normalise=normalise,
            act=act,
            scale=scale,
            **settings,
        )

    def gather(self, from_: int, to: int, norm: Norm) -> None:
        """to = norm of the rows whose logits are wanted; what follows works on these."""
        self._fits(self._widths[from_], to)
        self._add(_Code.GATHER, from_=from_, to=to, **self._normed(norm, self._widths[to]))

    def cap(self, at: int, divider: float, softcap: float | None) -> None:
        """at = softcap * tanh(at / divider / softcap)."""
        self._add(_Code.CAP, from_=at, to=at, scale=divider, softcap=softcap or 0.0)

    def _fits(self, width: int, buffer: int) -> None:
        if self._widths[buffer] != width:
            raise ValueError(f"{width} columns do not fit buffer {buffer} of {self._widths[buffer]}")

    def _normed(self, norm: Norm | None, width: int) -> dict[str, Any]:
        if norm is None:
            return {}
        if self._norms[norm.weight] != width:
            raise ValueError(f"a norm of {self._norms[norm.weight]} values does not fit {width} columns")
        return {"norm": norm.weight, "eps": norm.eps, "centered": norm.centered}

    def _add(self, code: _Code, **settings: Any) -> None:
        operation = _native.Operation()
        operation.code = int(code)
        for name, value in settings.items():
            setattr(operation, name, int(value) if isinstance(value, enum.IntEnum) else value)
        self._program.add(operation)

    # Steps

    def run(self, step: StepArrays, logits: int, hidden: int) -> StepOutput:
        """One step; `logits` and `hidden` are the buffers that are wanted.

        Raises:
            IndexError: a token, slot, position or block that the program does not have.
        """
        wanted = step.logits_at.numel()
        out, self._decoding = self._results(wanted, logits, hidden), None
        self._program.run(
            step.tokens.data_ptr(),
            step.positions.data_ptr(),
            step.slots.data_ptr(),
            step.lengths,
            step.tables.data_ptr(),
            step.logits_at.data_ptr(),
            step.tokens.numel(),
            step.tables.shape[1],
            wanted,
            out.logits.data_ptr(),
            out.hidden.data_ptr(),
            hidden,
            out.best.ctypes.data,
        )
        return out

    def decode(self, step: DecodeArrays, append: bool, logits: int, hidden: int) -> StepOutput:
        """One step for the newest token of every row; `append`: the most likely ones become known.

        Raises:
            IndexError: as `run`; nothing is changed.
        """
        if step is not self._decoding:
            self._decoding, out = step, self._results(len(step.known), logits, hidden)
            self._arguments = (
                step.tokens.ctypes.data,
                step.tokens.shape[1],
                step.blocks.ctypes.data,
                step.blocks.shape[1],
                step.known.ctypes.data,
                step.computed.ctypes.data,
                len(step.known),
                out.logits.data_ptr(),
                out.hidden.data_ptr(),
                hidden,
                out.best.ctypes.data,
            )
        self._program.decode(append, *self._arguments)
        return self._output

    def _results(self, wanted: int, logits: int, hidden: int) -> StepOutput:
        if self._output.logits.shape != (wanted, self._widths[logits]):
            self._output = self._room(wanted, logits, hidden)
        return self._output

    def _room(self, wanted: int, logits: int, hidden: int) -> StepOutput:
        """Memory for a step's results: that of former steps, where it is large enough."""
        if len(self._rows.best) < wanted or not len(self._rows.best):
            rows = max(8, wanted)
            self._rows = StepOutput(
                torch.empty(rows, self._widths[logits]),
                torch.empty(rows, self._widths[hidden]),
                np.empty(rows, np.int64),
            )
        found = self._rows
        return StepOutput(found.logits[:wanted], found.hidden[:wanted], found.best[:wanted])

    def measure(self, on: bool) -> None:
        """Counts what each operation costs from now on, or not."""
        self._program.measure(on)

    def costs(self) -> list[Cost]:
        return [Cost(*each) for each in self._program.costs()]
