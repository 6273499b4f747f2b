"""A decoder's operations over numbered buffers: built here, readable, run by `csrc` in one call a step.

Every method that adds an operation checks what it is given, since the other side works on bare addresses.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.kernels.layout import (
    MOST_GROUPED,
    MOST_INPUTS,
    Activation,
    Bytes,
    Cost,
    DecodeArrays,
    Format,
    Integers,
    KvType,
    Layer,
    Norm,
    Packed,
    PackedBytes,
    Precision,
    StepArrays,
    StepOutput,
)
from inflight.kernels.library import native, native_reason
from inflight.tensors import BFLOAT16, Blocks, Floats, Quantised, Weight, widened

_SOURCES = {np.dtype(np.float32): 0, BFLOAT16: 1, np.dtype(np.float16): 2}


CACHE_LINE = 64


class _Code(enum.IntEnum):
    EMBED = 0
    PRODUCT = 1
    ROTATE = 2
    ATTEND = 3
    NORM = 4
    GATHER = 5
    CAP = 6
    MIXTURE = 7
    GATE = 8


class _Mode(enum.IntEnum):
    STORE = 0
    ADD = 1
    GATE = 2


def _view(address: int, size: int) -> Bytes:
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _address(data: np.ndarray[Any, Any]) -> int:
    """Where a contiguous array lies."""
    return int(data.__array_interface__["data"][0])


def _long(values: Integers) -> Integers:
    return np.ascontiguousarray(values, np.int64)


def _room(rows: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Memory for float32 [rows, width] that begins with a cache line."""
    raw = np.empty(rows * width * 4 + CACHE_LINE, np.uint8)
    begin = -_address(raw) % CACHE_LINE
    return raw[begin : begin + rows * width * 4].view(np.float32).reshape(rows, width)


def _packable(weight: Quantised) -> bool:
    """Whether the packed formats can hold it: groups of whole steps whose sums fit 32 bits."""
    k = weight.shape[1]
    if weight.group < k:
        return weight.group % 8 == 0 and weight.group <= MOST_GROUPED
    return k <= MOST_GROUPED or (weight.bits == 8 and weight.offsets is None and k <= MOST_INPUTS)


def _stacked(parts: Sequence[Blocks]) -> tuple[int, int]:
    """Shape of blocks that lie one above the other."""
    if len({(part.type, part.shape[1]) for part in parts}) != 1:
        raise ValueError("blocks of one weight have one type and as many inputs")
    return sum(part.shape[0] for part in parts), parts[0].shape[1]


class NativeProgram:
    """One decoder.

    Args:
        threads: that work on it.
        isa: one of `instruction_sets`; None: the best.

    Attributes:
        isa: the one in use.
        bytes: memory of the packed weights.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        if native is None:
            raise RuntimeError(native_reason())
        self._program: Any = native.Program(threads, isa or "")
        self._widths: list[int] = []
        self._products: list[Packed] = []
        self._layers: list[Layer] = []
        self._norms: list[int] = []
        self._held_packed: list[PackedBytes] = []
        self._rows = StepOutput(_room(0, 0), _room(0, 0), np.empty(0, np.int64))
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
        weight: Weight | Sequence[Blocks],
        bias: Floats | None = None,
        precision: Precision | None = None,
        *,
        gated: bool = False,
    ) -> int:
        """Packs a weight [n, k]; the original is not needed any more.

        Args:
            weight: float32, bfloat16 or float16, integers, or blocks; also several of blocks of one type, one above the
                other. Blocks keep their type.
            bias: [n].
            precision: what floats become; None: float32 stays, the others become bfloat16.
            gated: the first half of the outputs goes through an activation and is multiplied with the second.
        """
        added = None if bias is None else widened(bias)
        if isinstance(weight, Blocks):
            weight = [weight]
        n, k = _stacked(weight) if isinstance(weight, Sequence) else weight.shape
        if added is not None and added.shape != (n,):
            raise ValueError(f"a bias of {list(added.shape)} does not fit a weight of {[n, k]}")
        held = 0 if added is None else _address(added)
        if isinstance(weight, Sequence):
            return self._blocks(weight, (n, k), held, gated)
        if isinstance(weight, Quantised) and not _packable(weight):
            weight = weight.dequantise().astype(BFLOAT16)
        if isinstance(weight, Quantised):
            return self._codes(weight, held, gated)
        if weight.dtype not in _SOURCES:
            raise ValueError(f"a weight must be float32, bfloat16 or float16, not {weight.dtype}")
        if precision is None:
            precision = Precision(Format.FLOAT if weight.dtype == np.float32 else Format.BF16)
        whole = np.ascontiguousarray(weight)
        self._products.append(Packed(precision.format, False, gated, n, k, precision.group))
        return int(
            self._program.add_floats(
                _address(whole), _SOURCES[whole.dtype], held, precision.format, gated, n, k, precision.group
            )
        )

    def _blocks(self, parts: Sequence[Blocks], shape: tuple[int, int], bias: int, gated: bool) -> int:
        format = Format[parts[0].type]
        held = [np.ascontiguousarray(part.data) for part in parts]
        self._products.append(Packed(format, False, gated, *shape, 0))
        return int(
            self._program.add_blocks([(_address(data), len(data)) for data in held], bias, format, gated, *shape)
        )

    def _codes(self, weight: Quantised, bias: int, gated: bool) -> int:
        n, k = weight.shape
        whole = weight.bits == 8 and weight.group >= k and weight.offsets is None and k <= MOST_INPUTS
        format = Format.INT8 if whole else Format.GROUP8 if weight.bits == 8 else Format.GROUP4
        group = -(-k // 8) * 8 if weight.group >= k else weight.group
        codes, scales = np.ascontiguousarray(weight.codes), np.ascontiguousarray(weight.scales)
        offsets = None if weight.offsets is None else np.ascontiguousarray(weight.offsets)
        self._products.append(Packed(format, offsets is not None, gated, n, k, 0 if whole else group))
        return int(
            self._program.add_codes(
                _address(codes),
                _address(scales),
                0 if offsets is None else _address(offsets),
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

    def product_of(self, packed: PackedBytes, bias: Floats | None = None) -> int:
        """A weight that is packed already, where it lies; its memory must outlive the program.

        Raises:
            ValueError: the bytes are not those of such a weight.
        """
        shape = packed.shape
        whole = native.packed_bytes(shape.format, shape.offsets, shape.gated, shape.n, shape.k, shape.group)
        panels = -(-shape.n // 2 // 16) if shape.gated else -(-shape.n // 32)
        scales = panels * 32 * 4 if shape.format == Format.INT8 else 0
        if len(packed.data) != whole or len(packed.scales) != scales or (bias is not None and bias.size != shape.n):
            raise ValueError(f"{len(packed.data)} bytes are no packed weight {shape}")
        added = None if bias is None else widened(bias)
        self._products.append(shape)
        self._held_packed.append(packed)
        return int(
            self._program.add_packed(
                _address(packed.data),
                _address(packed.scales) if len(packed.scales) else 0,
                0 if added is None else _address(added),
                shape.format,
                shape.offsets,
                shape.gated,
                shape.n,
                shape.k,
                shape.group,
            )
        )

    def weight(self, values: Floats) -> int:
        """A norm's weight."""
        held = widened(values)
        self._norms.append(held.size)
        return int(self._program.add_norm(_address(held), held.size))

    def rope(
        self,
        inverse: Sequence[float],
        factor: float,
        far: Sequence[float] | None = None,
        original: int = 0,
        theta: float = 0.0,
        stretch: float = 0.0,
    ) -> int:
        """A rotation: radians a position, of each pair of components.

        For tokens that reach beyond `original` it is `far`, or what dynamic NTK makes of `theta` and `stretch`.
        """
        dynamic = (theta, stretch) if stretch else ()
        return int(self._program.add_rope(list(inverse), list(far or ()), factor, original, *dynamic))

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
        self._add(_Code.EMBED, from_=to, to=to, products=[table], scale=scale)

    def multiply(
        self,
        from_: int,
        to: int,
        product: int | Sequence[int],
        *,
        norm: Norm | None = None,
        add: bool = False,
        scale: float = 1.0,
        act: Activation | None = None,
    ) -> None:
        """to = norm(from) Wᵀ + b, or to += scale * that, or to = act(its first half) * its second half.

        Of several products, each in its own format, the outputs lie side by side.
        """
        products = [product] if isinstance(product, int) else list(product)
        packed = [self._products[number] for number in products]
        for each in packed:
            self._fits(each.k, from_)
            if each.gated != (act is not None):
                raise ValueError("a gated product and an activation go together")
        if act is not None and len(packed) > 1:
            raise ValueError("a gated product stands alone; several go into a wide buffer, and `gate` follows")
        columns = sum(each.n for each in packed)
        self._fits(columns if act is None else columns // 2, to)
        mode = _Mode.GATE if act is not None else _Mode.ADD if add else _Mode.STORE
        self._add(
            _Code.PRODUCT,
            from_=from_,
            to=to,
            products=products,
            mode=mode,
            scale=scale,
            act=act or Activation.SILU,
            **self._normed(norm, packed[0].k),
        )

    def gate(self, wide: int, to: int, act: Activation) -> None:
        """to = act(first half of `wide`) * second half: what a gated product does, for halves of two formats."""
        self._fits(2 * self._widths[to], wide)
        self._add(_Code.GATE, from_=wide, to=to, act=act)

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
        operation = native.Operation()
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
        tokens, positions, slots, at = map(_long, (step.tokens, step.positions, step.slots, step.logits_at))
        tables = np.ascontiguousarray(step.tables, np.int32)
        reach = None if step.reach is None else _long(step.reach)
        out, self._decoding = self._results(len(at), logits, hidden), None
        self._program.run(
            _address(tokens),
            _address(positions),
            _address(slots),
            step.lengths,
            _address(tables),
            _address(at),
            len(tokens),
            tables.shape[1],
            len(at),
            _address(out.logits),
            _address(out.hidden),
            hidden,
            _address(out.best),
            *(() if reach is None else (_address(reach),)),
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
                _address(step.tokens),
                step.tokens.shape[1],
                _address(step.blocks),
                step.blocks.shape[1],
                _address(step.known),
                _address(step.computed),
                len(step.known),
                _address(out.logits),
                _address(out.hidden),
                hidden,
                _address(out.best),
            )
        self._program.decode(append, *self._arguments)
        return self._output

    def _results(self, wanted: int, logits: int, hidden: int) -> StepOutput:
        if self._output.logits.shape != (wanted, self._widths[logits]):
            self._output = self._held(wanted, logits, hidden)
        return self._output

    def _held(self, wanted: int, logits: int, hidden: int) -> StepOutput:
        """Memory for a step's results: that of former steps, where it is large enough."""
        if len(self._rows.best) < wanted or not len(self._rows.best):
            rows = max(8, wanted)
            self._rows = StepOutput(
                _room(rows, self._widths[logits]),
                _room(rows, self._widths[hidden]),
                np.empty(rows, np.int64),
            )
        found = self._rows
        return StepOutput(found.logits[:wanted], found.hidden[:wanted], found.best[:wanted])

    def measure(self, on: bool) -> None:
        """Counts what each operation costs from now on, or not."""
        self._program.measure(on)

    def costs(self) -> list[Cost]:
        return [Cost(*each) for each in self._program.costs()]
