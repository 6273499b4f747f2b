"""A decoder as a list of operations over numbered buffers, which the native library runs in one call per step.

The native side works on bare addresses, so every method here checks that shapes fit before it adds an operation.
`pack.py` adds the weights, `step.py` runs the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from inflight.kernels.arrays import address
from inflight.kernels.layout import (
    BLOCK_TYPES,
    Bytes,
    Cost,
    DecodeArrays,
    Growth,
    Layer,
    Norm,
    PackedBytes,
    Routing,
    StepArrays,
    StepOutput,
    Table,
)
from inflight.kernels.library import Activation, Format, KvType, Mode, OpCode, Source, native
from inflight.kernels.lora import LowRankModule, PackedAdapter
from inflight.kernels.recurrent import RecurrentProgram
from inflight.kernels.step import StepRunner
from inflight.tensors import Floats


class NativeProgram(RecurrentProgram):
    """One decoder.

    Args:
        threads: that work on it.
        isa: one of `instruction_sets`; None: the best.

    Attributes:
        multiplied: of each call of `multiply`, the number of its operation and those of its products.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        super().__init__("Program", threads, isa or "")
        self._layers: list[Layer] = []
        self._tables: list[Table] = []  # the program reads their memory
        self.multiplied: list[tuple[int, tuple[int, ...]]] = []
        self._adapters: dict[int, PackedAdapter] = {}
        self._wide: dict[int, int] = {}  # buffers of `activated` by width; what one holds is used at once
        self._runner = StepRunner(self._program, self._widths)

    # Buffers, weights, rotations and layers, which operations name by number

    def buffer(self, width: int) -> int:
        """Floats [rows, width] that live for one step."""
        self._widths.append(width)
        return int(self._program.add_buffer(width))

    def packed(self, product: int) -> PackedBytes:
        """A product's packed bytes, which this program owns."""
        return self._packer.packed(product)

    def product_of(self, packed: PackedBytes, bias: Floats | None = None) -> int:
        """Adds a packed weight. Its memory is not copied and must outlive the program.

        Raises:
            ValueError: the bytes do not fit such a weight.
        """
        return self._packer.add_packed(packed, bias)

    def rope(
        self,
        inverse: Sequence[float],
        factor: float,
        far: Sequence[float] | None = None,
        original: int = 0,
        theta: float = 0.0,
        stretch: float = 0.0,
        axes: Sequence[int] = (),
    ) -> int:
        """Adds a rotation.

        Args:
            inverse: radians per position of each pair of components.
            factor: of cosines and sines.
            far: `inverse` of tokens that reach beyond `original`.
            theta, stretch: base and scale of dynamic NTK, which then takes the place of `far`; stretch 0: none.
            axes: number of the axis in `StepArrays.places` that turns each pair; empty: all turn by the position.
        """
        if axes and (len(axes) != len(inverse) or not all(0 <= axis < 3 for axis in axes)):
            raise ValueError(f"{len(axes)} axes do not fit {len(inverse)} pairs of components")
        rope = list(inverse), list(far or ()), factor, original, theta, stretch, list(axes)
        return int(self._program.add_rope(*rope))

    def table(self, table: Table) -> int:
        """Adds a table. Its memory is not copied: the program keeps the array."""
        form = Format[table.type] if table.type in BLOCK_TYPES else Format.FLOAT
        source = Source[{"BF16": "BF16", "F16": "HALF"}.get(table.type, "FLOAT")]
        self._tables.append(table)
        return int(self._program.add_table(address(table.data), form, source, table.n, table.k))

    def layer(self, layer: Layer, sinks: int | None = None) -> int:
        """Adds a layer's attention; `make_caches` makes its cache.

        Args:
            sinks: number of `weight`: for each head, the logit of a key without a value that every query sees.
        """
        if layer.heads % layer.kv_heads:
            raise ValueError(f"{layer.heads} heads do not divide into {layer.kv_heads} key heads")
        if not 0 < layer.dim <= 1024:
            raise ValueError(f"heads of {layer.dim} values; up to 1024 are supported")
        if not 0 <= layer.latent < layer.dim or (layer.latent and layer.kv_heads > 1):
            raise ValueError(f"a latent of {layer.latent} values is no part of one key of {layer.dim}")
        self._layers.append(layer)
        return int(
            self._program.add_layer(
                layer.heads,
                layer.kv_heads,
                layer.dim,
                layer.scale,
                layer.window or 0,
                layer.softcap or 0.0,
                -1 if sinks is None else sinks,
                -1 if layer.source is None else layer.source,
                layer.latent,
                layer.causal,
            )
        )

    def make_caches(self, blocks: int, block_size: int, kv: KvType) -> int:
        """Makes zeroed memory for all layers' keys and values; returns its bytes."""
        return int(self._program.make_caches(blocks, block_size, kv))

    # Copies of the cache's blocks and of states, for files. Another thread may make them beside a step that does not
    # touch these blocks and slots.

    @property
    def kept_bytes(self) -> int:
        """Bytes of a block's copy."""
        return int(self._program.block_bytes)

    def read_block(self, block: int, to: Bytes) -> None:
        """Copies a block of the cache, all layers' keys and values, to `kept_bytes` bytes.

        Raises:
            IndexError: there is no such block.
        """
        self._sized(to, self.kept_bytes)
        self._program.read_block(block, address(to))

    def write_block(self, block: int, from_: Bytes) -> None:
        """Puts such a copy into a block, which may be another one of another cache. Raises as `read_block`."""
        self._sized(from_, self.kept_bytes)
        self._program.write_block(block, address(from_))

    def read_state(self, slot: int, to: Bytes) -> None:
        """Copies a slot's state to `state_bytes` bytes.

        Raises:
            IndexError: there is no such slot.
        """
        self._sized(to, self.state_bytes)
        self._program.read_state(slot, address(to))

    def write_state(self, slot: int, from_: Bytes) -> None:
        """Puts such a copy into a slot. Raises as `read_state`."""
        self._sized(from_, self.state_bytes)
        self._program.write_state(slot, address(from_))

    def _sized(self, memory: Bytes, size: int) -> None:
        if memory.nbytes != size or not memory.flags.c_contiguous:
            raise ValueError(f"{memory.nbytes} bytes are no copy of {size}")

    # Operations, in the order in which they run

    def embed(self, table: int, to: int, scale: float = 1.0) -> None:
        """to = table[token] * scale."""
        self._fits(self._packer.shapes[table].k, to)
        self._add(OpCode.EMBED, from_=to, to=to, products=[table], scale=scale)

    def add_rows(self, to: int, number: int) -> None:
        """to += the rows `StepImages.added[number]`, at the tokens of images; a step that has none adds nothing."""
        self._add(OpCode.ADD_ROWS, from_=to, to=to, layer=number)

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
        """to = norm(from) Wᵀ + b, or to += scale * that, or to = act(its first half) * its second half; of a product
        that is not gated, to = act(that).

        Of several products, each in its own format, the outputs lie side by side.
        """
        products = [product] if isinstance(product, int) else list(product)
        packed = [self._packer.shapes[number] for number in products]
        for shape in packed:
            self._fits(shape.k, from_)
            if shape.gated and act is None:
                raise ValueError("a gated product needs an activation")
        gated = packed[0].gated
        if act is not None and len(packed) > 1:
            raise ValueError(
                "a product with an activation stands alone; several go into a wide buffer, and `gate` follows"
            )
        columns = sum(shape.n for shape in packed)
        self._fits(columns // 2 if gated else columns, to)
        mode = (Mode.GATE if gated else Mode.ACTIVATE) if act is not None else Mode.ADD if add else Mode.STORE
        if mode != Mode.ACTIVATE:  # an adapter's part would have to come before the activation
            self.multiplied.append((self._count, tuple(products)))
        self._add(
            OpCode.PRODUCT,
            from_=from_,
            to=to,
            products=products,
            mode=mode,
            scale=scale,
            act=act or Activation.SILU,
            **self._normed(norm, packed[0].k),
        )

    def gate(self, wide: int, to: int, act: Activation, scale: float = 1.0) -> None:
        """to = act(scale * first half of `wide`) * second half, after a product whose halves have two formats."""
        self._fits(2 * self._widths[to], wide)
        self._add(OpCode.GATE, from_=wide, to=to, act=act, scale=scale)

    def activated(
        self,
        from_: int,
        to: int,
        products: Sequence[int],
        act: Activation,
        *,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> None:
        """to = act(scale * gate(norm(from))) * up(norm(from)); of a product without a gate, to = act(up(norm(from))).

        Args:
            products: gate and up, as one gated product; side by side if they have two formats, or `scale` is not 1.
        """
        if len(products) == 1 and scale == 1.0:
            self.multiply(from_, to, products, norm=norm, act=act)
            return
        width = 2 * self._widths[to]
        if width not in self._wide:
            self._wide[width] = self.buffer(width)
        self.multiply(from_, self._wide[width], products, norm=norm)
        self.gate(self._wide[width], to, act, scale)

    def rotate(
        self,
        at: int,
        layer: int,
        rope: int | None,
        norms: tuple[Norm, Norm] | None = None,
        values: Norm | None = None,
        *,
        rotated: bool = False,
        growth: Growth | None = None,
    ) -> None:
        """Norms and rotates queries and keys in place, and stores keys and values in the cache.

        Args:
            at: queries, keys and values side by side; further columns may follow. Of a layer that reads another's keys
                and values, queries only.
            rope: None: no rotation.
            norms: of the heads of queries and of keys.
            values: the norm of the heads of values, with the same eps.
            rotated: the norms come behind the rotation.
            growth: of queries; None: they stay as they are.
        """
        spec = self._layers[layer]
        if self._widths[at] < (spec.heads + (2 * spec.kv_heads if spec.source is None else 0)) * spec.dim:
            raise ValueError(f"buffer {at} of {self._widths[at]} columns has no room for queries, keys and values")
        settings = self._normed(norms[0] if norms else None, spec.dim)
        self._normed(norms[1] if norms else None, spec.dim)
        self._normed(values, spec.dim)
        second, third = (-1 if each is None else each.weight for each in (norms[1] if norms else None, values))
        rotation = -1 if rope is None else rope
        if growth is not None:
            settings |= {"growth": growth.factor, "period": growth.period}
        settings["rotated"] = rotated
        self._add(OpCode.ROTATE, from_=at, to=at, layer=layer, rope=rotation, second=second, third=third, **settings)

    def attend(self, from_: int, to: int, layer: int) -> None:
        """to = attention of the queries, which are the first columns of `from`."""
        spec = self._layers[layer]
        self._fits(spec.heads * spec.value_dim, to)
        self._add(OpCode.ATTEND, from_=from_, to=to, layer=layer)

    def multiply_heads(self, from_: int, to: int, products: Sequence[int]) -> None:
        """Columns of each head in `to` = columns of that head in `from` times its own weight.

        Both buffers are divided evenly among the heads; a head may have more columns than are read or written, behind
        them.
        """
        heads = len(products)
        shapes = [self._packer.shapes[number] for number in products]
        if len(set(shapes)) != 1 or shapes[0].gated or self._widths[from_] % heads or self._widths[to] % heads:
            raise ValueError("the products of heads have one shape and format, and their buffers divide among them")
        if shapes[0].k > self._widths[from_] // heads or shapes[0].n > self._widths[to] // heads:
            raise ValueError(f"heads of {shapes[0]} have no room in buffers {from_} and {to}")
        self._add(OpCode.HEADS, from_=from_, to=to, products=list(products))

    def store_latent(self, queries: int, compressed: int, to: int, layer: int, rope: int, norm: Norm) -> None:
        """Stores a token's latent and its rotary key, and completes queries that were multiplied with keys' weights.

        Args:
            queries: of each head, the columns to be rotated last.
            compressed: the latent, which is normed in place, then the key, which is rotated.
            to: of each head, a query of the layer: its rotary part is written.
        """
        spec = self._layers[layer]
        rotary = spec.dim - spec.latent
        if not spec.latent or self._widths[queries] % spec.heads or self._widths[queries] < spec.heads * rotary:
            raise ValueError(f"buffer {queries} holds no queries of {spec}")
        self._fits(spec.dim, compressed)
        self._fits(spec.heads * spec.dim, to)
        settings = self._normed(norm, spec.latent)
        self._add(OpCode.LATENT, from_=queries, to=to, into=compressed, layer=layer, rope=rope, **settings)

    def end_unwanted(self) -> None:
        """A chunk of a prompt whose logits nobody wants ends here: no later operation stores keys and values."""
        self._add(OpCode.END_UNWANTED)

    def gate_by(self, from_: int, column: int, to: int, act: Activation) -> None:
        """to = act(to) * columns of `from`, from `column` on."""
        if not 0 <= column <= self._widths[from_] - self._widths[to]:
            raise ValueError(f"there are no {self._widths[to]} columns behind {column} of {self._widths[from_]}")
        self._add(OpCode.GATE_BY, from_=from_, to=to, column=column, act=act)

    def scale(self, at: int, factor: int) -> None:
        """at *= the one number of the `weight` `factor`."""
        self._norm_fits(factor, 1)
        self._add(OpCode.SCALE, from_=at, to=at, norm=factor)

    def add_table(self, at: int, table: int, norm: Norm, *, scale: float, factor: float) -> None:
        """at = factor * (norm of each part of `at` + scale * the token's row of the table); the norm's width is a
        part's."""
        self._fits(self._tables[table].k, at)
        if self._widths[at] % self._norms[norm.weight]:
            raise ValueError(f"{self._widths[at]} columns do not divide into parts of {self._norms[norm.weight]}")
        settings = self._normed(norm, self._norms[norm.weight])
        self._add(OpCode.ADD_TABLE, from_=at, to=at, layer=table, scale=scale, factor=factor, **settings)

    def xielu(self, at: int, squares: int, exponentials: int, all_: int) -> None:
        """at = xIELU(at) (Huang and Schlag, 2024): squares * x² + all * x above 0, and below
        (exponentials + all) * (e ** x - 1 - x) + all * x.

        Args:
            squares, exponentials, all_: numbers of `weight`, of one factor each.
        """
        for number in (squares, exponentials, all_):
            self._norm_fits(number, 1)
        self._add(OpCode.XIELU, from_=at, to=at, norm=squares, second=exponentials, third=all_)

    def norm_part(self, at: int, column: int, norm: Norm) -> None:
        """Columns of `at` = their norm: as many from `column` on as it has weights."""
        size = self._norms[norm.weight]
        if not 0 <= column <= self._widths[at] - size:
            raise ValueError(f"there are no {size} columns behind {column} of {self._widths[at]}")
        self._add(OpCode.NORM, from_=at, to=at, column=column, **self._normed(norm, size, alone=True))

    def norm(self, from_: int, to: int, norm: Norm, *, add: bool = False, scale: float = 1.0) -> None:
        """to = norm(from), or to += scale * norm(from)."""
        self._fits(self._widths[from_], to)
        if norm.layered and add:
            raise ValueError("a norm that takes the mean off is not added")
        self._add(
            OpCode.NORM,
            from_=from_,
            to=to,
            mode=Mode.ADD if add else Mode.STORE,
            scale=scale,
            **self._normed(norm, self._widths[to], alone=True),
        )

    def mixture(
        self,
        at: int,
        logits: int,
        gate_up: Sequence[int],
        down: Sequence[int],
        *,
        norm: Norm,
        routing: Routing,
        act: Activation,
        scale: float = 1.0,
        into: int | None = None,
        factors: int | None = None,
    ) -> None:
        """at += scale * the chosen experts' MLPs of norm(at), weighted as `routing` says by the router's `logits`.

        Experts whose first products are not gated have the activation of all their outputs.

        Args:
            into: another buffer, which then holds what would be added to `at`.
            factors: number of `weight`: by expert, what its weight is multiplied with.
        """
        if into is not None:
            self._fits(self._widths[at], into)
        if factors is not None:
            self._norm_fits(factors, len(gate_up))
        for product in (*gate_up, *down):
            first = gate_up[0] if product in gate_up else down[0]
            if self._packer.shapes[product] != self._packer.shapes[first]:
                raise ValueError("the experts of a layer have one shape and format")
        self._fits(len(gate_up), logits)
        wide, narrow = self._packer.shapes[gate_up[0]], self._packer.shapes[down[0]]
        self._fits(wide.k, at)
        self._fits(narrow.n, at)
        inner = wide.n // 2 if wide.gated else wide.n
        if narrow.gated or inner != narrow.k or not 0 < routing.chosen <= len(gate_up):
            raise ValueError(f"experts of {wide} and {narrow} do not fit together")
        if routing.bias >= 0:
            self._norm_fits(routing.bias, len(gate_up))
        size, rest = divmod(len(gate_up), routing.groups)
        if rest or not 0 < routing.kept <= routing.groups or routing.chosen > routing.kept * size:
            raise ValueError(
                f"{routing.chosen} of {len(gate_up)} experts do not fit {routing.kept} of {routing.groups} groups"
            )
        settings = self._normed(norm, wide.k)
        self._add(
            OpCode.MIXTURE,
            from_=at,
            to=logits,
            gate_up=list(gate_up),
            down=list(down),
            routing=_native_routing(routing),
            gated=wide.gated,
            act=act,
            scale=scale,
            into=-1 if into is None else into,
            third=-1 if factors is None else factors,
            **settings,
        )

    def gather(self, from_: int, to: int, norm: Norm) -> None:
        """to = norm of the rows whose logits are wanted. All later operations have these rows only."""
        self._fits(self._widths[from_], to)
        self._add(OpCode.GATHER, from_=from_, to=to, **self._normed(norm, self._widths[to], alone=True))

    def cap(self, at: int, divider: float, softcap: float | None) -> None:
        """at = softcap * tanh(at / divider / softcap)."""
        self._add(OpCode.CAP, from_=at, to=at, scale=divider, softcap=softcap or 0.0)

    def _normed(self, norm: Norm | None, width: int, *, alone: bool = False) -> dict[str, Any]:
        """An operation's settings. Args: alone: it does nothing else, so that every kind of norm is there."""
        if norm is None:
            return {}
        self._norm_fits(norm.weight, width)
        if norm.layered and (norm.centered or not alone):
            raise ValueError("norms that take the mean off are operations of their own, with plain weights")
        return {"norm": norm.weight, "eps": norm.eps, "centered": norm.centered, "layered": norm.layered}

    # Adapters

    def pack_adapter(self, modules: Mapping[int, Sequence[LowRankModule]], dtype: np.dtype[Any]) -> PackedAdapter:
        """Lays an adapter's factors out, after all operations were added. May be called during a step.

        Args:
            modules: what it adds to the products in `multiplied`, by the number of the operation.
            dtype: of its factors, bfloat16 or float32.

        Raises:
            ValueError: another dtype.
        """
        half: dict[int, int] = {}
        for operation, products in self.multiplied:
            shape = self._packer.shapes[products[0]]
            if operation in modules and shape.gated:
                half[operation] = shape.n // 2
        return PackedAdapter(modules, half, dtype)

    def add_adapter(self, number: int, adapter: PackedAdapter) -> None:
        """Makes an adapter known by a number, by which rows name it; not 0.

        Raises:
            ValueError: it does not fit the operations.
        """
        native.add_adapter(self._program, number, adapter.floats, *adapter.arguments)
        self._adapters[number] = adapter

    def drop_adapter(self, number: int) -> None:
        native.drop_adapter(self._program, number)
        self._adapters.pop(number, None)

    # Steps

    def run(self, step: StepArrays, logits: int, hidden: int) -> StepOutput:
        """Runs one step.

        Args:
            logits, hidden: the buffers to return.

        Raises:
            IndexError: a token, slot, position or block that the program does not have.
        """
        return self._runner.run(step, logits, hidden)

    def decode(self, step: DecodeArrays, append: bool, logits: int, hidden: int) -> StepOutput:
        """Runs one step for the newest token of every row.

        Args:
            append: each row's most likely next token becomes known.

        Raises:
            IndexError: as `run`; nothing is changed.
        """
        return self._runner.decode(step, append, logits, hidden)

    def measure(self, on: bool) -> None:
        """Switches the measurement of operations' costs on (from zero) or off."""
        self._program.measure(on)

    def costs(self) -> list[Cost]:
        """The cost of each operation, in their order; a product's name is that of its operation."""
        return [Cost(code.name.lower(), *rest) for code, *rest in self._program.costs()]


def _native_routing(routing: Routing) -> Any:
    record = native.Routing()
    for field in fields(routing):
        setattr(record, field.name, getattr(routing, field.name))
    return record
