"""An encoder of images or texts as a list of operations over buffers, which the native library runs in one call.

Every row takes part in one run, and attention goes both ways. A row's bits depend on the rows of its run and on nothing
else: they are the same on any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.kernels.arrays import address, aligned_floats
from inflight.kernels.layout import Integers
from inflight.kernels.library import Activation, Mode, TowerCode, native
from inflight.kernels.store import Store
from inflight.tensors import Floats


@dataclass(frozen=True)
class TowerNorm:
    """A norm's weights by number (`TowerProgram.weight`); bias None: an RMSNorm, else a LayerNorm."""

    weight: int
    bias: int | None
    eps: float


@dataclass(frozen=True)
class TowerArrays:
    """What a run reads.

    Attributes:
        rows: of each group of buffers.
        arrays: float32 [rows, width] of `read` and [rows, head size] of `rotate`: half of them cosines, then sines.
        partitions: lengths of neighbouring rows that see each other; the sum is the number of rows.
        tables: int64 [rows, parts], rows of the buffer that `gather` and `average` read.
    """

    rows: Sequence[int]
    arrays: Sequence[Floats]
    partitions: Sequence[Sequence[int]]
    tables: Sequence[Integers] = ()


@dataclass(frozen=True)
class ByDistance:
    """What attention adds to scaled scores by the distance of query and key alone (Raffel et al., 2020).

    Attributes:
        values: float32 [heads, 2 * reach - 1], by key - query + reach - 1.
    """

    values: Floats

    @property
    def reach(self) -> int:
        """One more than the largest distance."""
        return int(self.values.shape[1] + 1) // 2


@dataclass(frozen=True)
class ByContent:
    """What attention adds to scores, before their scale, by what query and key say of their distance (He et al., 2021).

    Attributes:
        by_query, by_key: buffers [rows, heads * places].
        places: int [2 * reach - 1]: the column of a head that is read, by query - key + reach - 1.
    """

    by_query: int
    by_key: int
    places: Integers

    @property
    def reach(self) -> int:
        """One more than the largest distance."""
        return (len(self.places) + 1) // 2


class TowerProgram(Store):
    """One encoder.

    Args:
        threads: that work on it.
        half: attention rounds queries, keys and values to bfloat16, where a part has more than 64 rows.
        isa: one of `instruction_sets`; None: the best.
    """

    def __init__(self, threads: int, *, half: bool, isa: str | None = None) -> None:
        super().__init__("Tower", threads, isa or "", half)
        self._groups: list[int] = []
        self._codes: list[TowerCode] = []
        self._outputs: list[int] = []
        self._arrays: dict[int, tuple[int, int]] = {}  # number: group and width
        self._partitions: dict[int, int] = {}  # number: group
        self._reach: dict[int, int] = {}  # number of a partition: rows of its longest part
        self._tables: dict[int, tuple[int, int, int]] = {}  # number: group of rows, parts, group that is read

    @property
    def splits(self) -> bool:
        """Whether products with float32 weights are computed from bfloat16 parts."""
        return bool(self._program.splits)

    def buffer(self, width: int, group: int = 0) -> int:
        """Floats [rows of the group, width] that live for one run."""
        self._widths.append(width)
        self._groups.append(group)
        return int(self._program.add_buffer(width, group))

    # Operations, in the order in which they run

    def read(self, to: int, array: int) -> None:
        """to = one of the run's arrays."""
        self._add(TowerCode.INPUT, to=to, from_=to, number=self._array(array, to, self._widths[to]))

    def multiply(
        self,
        from_: int,
        to: int,
        product: int | Sequence[int],
        *,
        norm: TowerNorm | None = None,
        act: Activation | None = None,
        gate: Activation | None = None,
        add: bool = False,
        scale: float = 1.0,
        column: int | None = None,
    ) -> None:
        """y = norm(from) Wᵀ + b; then to = y, or act(y), or to += scale * y, or to = gate(y's first half) * its second.

        Of several products, all of one format, the outputs lie side by side.

        Args:
            column: each product reads columns of its own, as many as it has inputs; those of the first begin here.
        """
        products = [product] if isinstance(product, int) else list(product)
        packed = [self._packer.shapes[number] for number in products]
        if column is not None and column + sum(shape.k for shape in packed) > self._widths[from_]:
            raise ValueError(f"the products read more columns than buffer {from_} has")
        if column is not None and norm is not None:
            raise ValueError("columns of a buffer are not normed")
        for shape in packed:
            if column is None:
                self._fits(shape.k, from_)
            elif shape.k != packed[0].k:
                raise ValueError("products of their own columns read equally many")
            if (shape.format, shape.offsets, shape.group) != (packed[0].format, packed[0].offsets, packed[0].group):
                raise ValueError("the products of one operation have one format")
            if shape.gated != (gate is not None):
                raise ValueError("a gated product and a gate go together")
        if gate is not None and (act is not None or len(packed) > 1 or add):
            raise ValueError("a gated product stands alone, without another activation")
        if act is not None and add:
            raise ValueError("an activated product is not added")
        mode = Mode.GATE if gate is not None else Mode.ACTIVATE if act is not None else Mode.ADD if add else Mode.STORE
        columns = sum(shape.n for shape in packed)
        self._fits(columns if gate is None else columns // 2, to)
        self._same_rows(from_, to)
        self._add(
            TowerCode.PRODUCT,
            from_=from_,
            to=to,
            products=products,
            mode=mode,
            scale=scale,
            act=act or gate or Activation.SILU,
            **({} if column is None else {"sliced": True, "column": column}),
            **self._normed(norm, packed[0].k),
        )

    def norm(self, from_: int, to: int, norm: TowerNorm, *, add: bool = False) -> None:
        """to = norm(from), or to += norm(from)."""
        if add and norm.bias is not None:
            raise ValueError("only an RMSNorm is added")
        self._fits(self._widths[from_], to)
        self._same_rows(from_, to)
        mode = Mode.ADD if add else Mode.STORE
        self._add(TowerCode.NORM, from_=from_, to=to, mode=mode, **self._normed(norm, self._widths[to]))

    def rotate(
        self, at: int, heads: int, array: int, kv_heads: int = 0, norms: Sequence[TowerNorm] | None = None
    ) -> None:
        """Rotates the heads of queries and keys in place by the angles of one of the run's arrays.

        Component i of a head's first half and component i of its second half are a pair.

        Args:
            at: queries, keys and values side by side.
            kv_heads: of keys and of values; 0: as many as of queries.
            norms: RMSNorms of each head of queries and of keys, in front of the rotation, and if there is a third, of
                values.
        """
        dim = self._dim(at, heads, kv_heads)
        settings: dict[str, Any] = {"kv_heads": kv_heads} if kv_heads else {}
        if norms is not None:
            if any(each.bias is not None or each.eps != norms[0].eps for each in norms):
                raise ValueError("heads have RMSNorms of one epsilon")
            settings |= self._normed(norms[0], dim)
            for kind, norm in zip(("key_norm", "value_norm"), norms[1:]):
                self._norm_fits(norm.weight, dim)
                settings[kind] = norm.weight
        number = self._array(array, at, dim)
        self._add(TowerCode.ROTATE, from_=at, to=at, heads=heads, number=number, **settings)

    def attend(
        self,
        from_: int,
        to: int,
        heads: int,
        scale: float,
        partition: int = 0,
        window: int = 0,
        kv_heads: int = 0,
        relative: ByDistance | ByContent | None = None,
    ) -> None:
        """to = attention among the rows of each part of one of the run's partitions.

        Args:
            from_: queries, keys and values side by side.
            window: rows before and behind that a row sees; 0: its whole part.
            kv_heads: as in `rotate`.
            relative: what is added to the scores; parts have at most as many rows as it reaches.
        """
        self._fits(self._dim(from_, heads, kv_heads) * heads, to)
        self._same_rows(from_, to)
        self._partitions[partition] = self._groups[from_]
        given = {"window": window, "kv_heads": kv_heads}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value}
        if relative is not None:
            self._reach[partition] = min(relative.reach, self._reach.get(partition, relative.reach))
            settings |= self._relative(relative, from_, heads, scale)
        self._add(
            TowerCode.ATTEND,
            from_=from_,
            to=to,
            heads=heads,
            scale=scale,
            number=partition,
            **settings,
        )

    def _relative(self, relative: ByDistance | ByContent, from_: int, heads: int, scale: float) -> dict[str, Any]:
        if isinstance(relative, ByDistance):
            if relative.values.shape != (heads, 2 * relative.reach - 1):
                raise ValueError(f"{relative.values.shape} values by distance are not those of {heads} heads")
            padded = np.zeros((heads, 2 * relative.reach + 16), np.float32)
            padded[:, : 2 * relative.reach - 1] = relative.values / np.float32(scale)
            return {"reach": relative.reach, "relative": self.weight(padded)}
        columns = self._widths[relative.by_query] // heads
        for buffer in (relative.by_query, relative.by_key):
            self._fits(columns * heads, buffer)
            self._same_rows(from_, buffer)
        if relative.places.min() < 0 or relative.places.max() >= columns:
            raise ValueError(f"a place is not below {columns}")
        places = [int(place) for place in relative.places]
        buffers = {"by_query": relative.by_query, "by_key": relative.by_key}
        return {"reach": relative.reach, "places": places, **buffers}

    def gather(self, from_: int, to: int, table: int) -> None:
        """to = rows of `from` side by side, by one of the run's tables."""
        parts = self._widths[to] // self._widths[from_]
        self._fits(parts * self._widths[from_], to)
        self._gathered(TowerCode.GATHER, from_, to, parts, table)

    def average(self, from_: int, to: int, parts: int, table: int) -> None:
        """to = means of `parts` rows of `from`, by one of the run's tables."""
        self._fits(self._widths[from_], to)
        self._gathered(TowerCode.AVERAGE, from_, to, parts, table)

    def adjust(
        self,
        from_: int,
        to: int,
        columns: int,
        *,
        from_column: int = 0,
        column: int = 0,
        factors: int | None = None,
        terms: int | None = None,
        limits: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        """Columns of `to` = columns of `from` * factors + terms, within limits; the buffers may be one.

        Args:
            columns: how many, from `from_column` and `column` on.
            factors, terms: numbers of weights of as many columns; None: nothing is multiplied or added.
            limits: the least and the largest value.
        """
        self._same_rows(from_, to)
        for buffer, first in ((from_, from_column), (to, column)):
            if not 0 <= first <= self._widths[buffer] - columns:
                raise ValueError(f"buffer {buffer} has no {columns} columns from {first} on")
        for weight in (factors, terms):
            if weight is not None:
                self._norm_fits(weight, columns)
        weights = {"norm": -1 if factors is None else factors, "norm_bias": -1 if terms is None else terms}
        places = {"from_column": from_column, "column": column, "columns": columns}
        self._add(TowerCode.ADJUST, from_=from_, to=to, low=limits[0], high=limits[1], **weights, **places)

    def gate(self, from_: int, to: int, act: Activation) -> None:
        """to = act(the first half of `from`) * the second."""
        self._fits(2 * self._widths[to], from_)
        self._same_rows(from_, to)
        self._add(TowerCode.GATE, from_=from_, to=to, act=act)

    def output(self, buffer: int) -> None:
        """A run returns the buffer, in the order of these calls."""
        self._outputs.append(buffer)
        self._program.add_output(buffer)

    def _gathered(self, code: TowerCode, from_: int, to: int, parts: int, table: int) -> None:
        self._tables[table] = (self._groups[to], parts, self._groups[from_])
        self._add(code, from_=from_, to=to, parts=parts, number=table)

    def _array(self, number: int, buffer: int, width: int) -> int:
        self._arrays[number] = (self._groups[buffer], width)
        return number

    def _dim(self, buffer: int, heads: int, kv_heads: int = 0) -> int:
        all_heads = heads + 2 * (kv_heads or heads)
        dim = self._widths[buffer] // all_heads
        self._fits(all_heads * dim, buffer)
        if kv_heads and heads % kv_heads:
            raise ValueError(f"{kv_heads} heads of keys do not divide {heads} of queries")
        if not 0 < dim <= 1024:
            raise ValueError(f"heads of {dim} values; up to 1024 are supported")
        return dim

    def _same_rows(self, first: int, second: int) -> None:
        if self._groups[first] != self._groups[second]:
            raise ValueError(f"buffers {first} and {second} are of two groups of rows")

    def _normed(self, norm: TowerNorm | None, width: int) -> dict[str, Any]:
        if norm is None:
            return {}
        bias = -1 if norm.bias is None else norm.bias
        for number in (norm.weight, norm.weight if bias < 0 else bias):
            self._norm_fits(number, width)
        return {"norm": norm.weight, "norm_bias": bias, "eps": norm.eps}

    def _add(self, code: TowerCode, **settings: Any) -> None:
        operation = native.TowerOperation()
        operation.code = code
        self._codes.append(code)
        self._append(operation, settings)

    def measure(self) -> None:
        """From now on runs take the time of each operation, for `seconds`."""
        self._program.measure()

    def seconds(self) -> list[tuple[TowerCode, float]]:
        """The last run's operations, each with the processor seconds of the calling thread."""
        return list(zip(self._codes, map(float, self._program.seconds())))

    def run(self, inputs: TowerArrays) -> list[Floats]:
        """Carries out the operations.

        Returns:
            Of each output a new float32 [rows, width].

        Raises:
            ValueError: an array, a partition or a table does not fit the operations.
        """
        rows = list(inputs.rows)
        if len(rows) != max(self._groups) + 1 or min(rows) < 1:
            raise ValueError(f"{rows} rows do not fit {max(self._groups) + 1} groups")
        arrays = [np.ascontiguousarray(array, np.float32) for array in inputs.arrays]
        tables = [np.ascontiguousarray(table, np.int64) for table in inputs.tables]
        for number, (group, width) in self._arrays.items():
            if arrays[number].shape != (rows[group], width):
                raise ValueError(f"array {number} is {arrays[number].shape}, not {(rows[group], width)}")
        for number, group in self._partitions.items():
            if sum(inputs.partitions[number]) != rows[group] or min(inputs.partitions[number]) < 1:
                raise ValueError(f"partition {number} does not divide {rows[group]} rows")
            if max(inputs.partitions[number]) > self._reach.get(number, rows[group]):
                raise ValueError(f"partition {number} has a part of more than {self._reach[number]} rows")
        for number, (group, parts, source) in self._tables.items():
            table = tables[number]
            if table.shape != (rows[group], parts) or table.min() < 0 or table.max() >= rows[source]:
                raise ValueError(f"table {number} is {table.shape}, not {(rows[group], parts)} of {rows[source]} rows")
        results = [aligned_floats(rows[self._groups[buffer]], self._widths[buffer]) for buffer in self._outputs]
        partitions = [list(lengths) for lengths in inputs.partitions]
        self._program.run(
            rows, [address(a) for a in arrays], partitions, [address(t) for t in tables], [address(r) for r in results]
        )
        return list(results)
