"""Runs instances of many requests as batches of one model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from inflight.contract import Array, Outcome, Row, Table, TensorSpec, Value, chain, join
from inflight.errors import InflightError, InvalidRequest, PredictFailed, StartError, describe
from inflight.pipeline.failures import FailureLog
from inflight.runtime import GraphSpec, LoadedModel
from inflight.servable import ModelSpec

_FAILURES = FailureLog()

_TYPE_NAMES = {"str": "kMSI_String", "bytes": "kMSI_Bytes"}


def type_name(dtype: str) -> str:
    """MindSpore Serving's internal name of a type, which its error texts show."""
    return _TYPE_NAMES.get(dtype) or f"kMSI_{dtype.capitalize()}"


class BatchedModel:
    """A loaded model that takes instances: checks, stacks, pads, runs, trims and splits.

    Attributes:
        batch_size: rows in one run; 1 for a model without batch dimension.
        fixed: the file fixes the batch, so a short batch is padded with copies of its first instance.
        runs: rows and seconds of each call of the model; the caller of `run` empties the list.
        began: called before each run of the model.
    """

    def __init__(self, spec: ModelSpec, model: LoadedModel) -> None:
        self.spec = spec
        self.model = model
        self.began: Callable[[], None] = lambda: None
        sizes = [self._graph_batch(graph) for graph in model.graphs]
        if len(set(sizes)) > 1:
            raise StartError(
                f"Load model failed, the sub-graphs of model '{spec.key}' have different batch sizes: {sizes}"
            )
        self.fixed = sizes[0] is not None
        self.batch_size = sizes[0] if sizes[0] is not None else spec.max_batch_size
        self.runs: list[tuple[int, float]] = []
        self._shared = spec.without_batch_dim_inputs if spec.with_batch_dim else ()
        self._all_batched = spec.with_batch_dim and not self._shared
        self._instances = [
            [self._instance_shape(index, tensor) for index, tensor in enumerate(graph.inputs)] for graph in model.graphs
        ]
        self._uniform = [
            bool(graph) and all(shape is not None and -1 not in shape for shape in graph) for graph in self._instances
        ]

    def _batched_input(self, index: int) -> bool:
        return self.spec.with_batch_dim and index not in self.spec.without_batch_dim_inputs

    def _graph_batch(self, graph: GraphSpec) -> int | None:
        """The batch size a graph fixes, or None where it takes any."""
        if not self.spec.with_batch_dim:
            return 1
        tensors = [tensor for index, tensor in enumerate(graph.inputs) if self._batched_input(index)]
        tensors += graph.outputs
        sizes: list[int] = []
        for tensor in tensors:
            if tensor.shape is None:
                continue
            if not tensor.shape:
                raise StartError(
                    f"Load model failed, '{tensor.name}' of model '{self.spec.key}' has no batch dimension; declare "
                    "the model with with_batch_dim=False or list the input in without_batch_dim_inputs"
                )
            sizes.append(tensor.shape[0])
        fixed = sorted({size for size in sizes if size != -1})
        if len(fixed) > 1 or (fixed and fixed[0] < 1):
            raise StartError(
                f"Load model failed, inputs and outputs of model '{self.spec.key}' have different batch sizes: "
                f"{fixed}; declare the model with with_batch_dim=False if their first dimension is no batch"
            )
        return fixed[0] if fixed else None

    def _instance_shape(self, index: int, tensor: TensorSpec) -> tuple[int, ...] | None:
        if tensor.shape is None:
            return None
        return tensor.shape[1:] if self._batched_input(index) else tensor.shape

    def run(self, rows: Sequence[Row], subgraph: int = 0) -> Sequence[Outcome]:
        """One outcome per row, in order: a table where the rows have one form and none fails. Any number of rows; they
        are split into runs of the batch size.

        Rows share a run where their arrays can be stacked and their inputs without a batch dimension are the same. Rows
        that do not fit the model get their own error. When a run of several rows fails, each is run alone, so that only
        the guilty one fails.
        """
        table = join([rows]) if self._all_batched else None
        if table is not None and self._fits(table, subgraph):
            return self._run_all(table, subgraph)
        outcomes: list[Outcome | None] = [None] * len(rows)
        groups: dict[tuple[object, ...], list[tuple[int, list[Array]]]] = {}
        values = Values()
        for index, row in enumerate(rows):
            try:
                arrays = self._checked(row, subgraph)
            except InflightError as error:
                outcomes[index] = error
                continue
            key = () if self._uniform[subgraph] else self._stack_key(arrays)
            if self._shared:
                key += tuple(values.number(arrays[at]) for at in self._shared if at < len(arrays))
            groups.setdefault(key, []).append((index, arrays))
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                results = self._run_isolated([arrays for _, arrays in part], subgraph)
                for (index, _), outcome in zip(part, results):
                    outcomes[index] = outcome
        return outcomes  # type: ignore[return-value]  # every index was filled above

    def _fits(self, table: Table, subgraph: int) -> bool:
        """Whether the columns are the model's inputs as they are."""
        graph = self.model.graphs[subgraph]
        return len(table.columns) == len(graph.inputs) and all(
            shape == column.shape[1:] and tensor.dtype == column.dtype
            for column, tensor, shape in zip(table.columns, graph.inputs, self._instances[subgraph])
        )

    def _run_all(self, table: Table, subgraph: int) -> Sequence[Outcome]:
        parts: list[Sequence[Outcome]] = []
        for start in range(0, len(table), self.batch_size):
            part = table[start : start + self.batch_size] if len(table) > self.batch_size else table
            try:
                parts.append(self._run_batch(list(part.columns), len(part), subgraph))
            except BaseException as error:  # a model may raise anything; single rows show which one is at fault
                parts.append(self._one_by_one(error, list(part), subgraph))
        return chain(parts)

    def _stack_key(self, arrays: Sequence[Array]) -> tuple[object, ...]:
        """Rows with the same key can be stacked; needed only where a shape or dtype is not fixed by the file."""
        batched = [array for index, array in enumerate(arrays) if self._batched_input(index)]
        return tuple(item for array in batched for item in (array.shape, array.dtype.num))

    def _checked(self, row: Sequence[Value], subgraph: int) -> list[Array]:
        graph = self.model.graphs[subgraph]
        shapes = self._instances[subgraph]
        if graph.inputs and len(row) != len(graph.inputs):
            raise InvalidRequest(
                f"the model '{self.spec.key}' takes {len(graph.inputs)} inputs, but {len(row)} were given"
            )
        arrays: list[Array] = []
        for index, value in enumerate(row):
            if not isinstance(value, np.ndarray):
                if not graph.inputs or graph.inputs[index].dtype is None:
                    raise InvalidRequest(f"Given model input {index} is a {type(value).__name__}, models take arrays")
                arrays.append(self._wrong_type(index, type(value).__name__, graph.inputs[index].dtype or ""))
                continue
            if graph.inputs:
                value = self._fitted(index, value, graph.inputs[index].dtype, shapes[index])
            arrays.append(value)
        return arrays

    @staticmethod
    def _wrong_type(index: int, given: str, wanted: str) -> Array:
        raise InvalidRequest(
            f"Given model input {index} data type {type_name(given)} not match the data type {type_name(wanted)} "
            "defined in model"
        )

    def _fitted(self, index: int, array: Array, dtype: str | None, shape: tuple[int, ...] | None) -> Array:
        """The array in the shape of one instance. As in MindSpore Serving, only the size in bytes must agree."""
        if shape is not None and array.shape != shape:
            if -1 in shape:
                if len(shape) != array.ndim or any(want not in (-1, have) for want, have in zip(shape, array.shape)):
                    raise InvalidRequest(
                        f"Given model input {index} shape {list(array.shape)} not match the shape {list(shape)} "
                        "defined in model, where -1 stands for any size"
                    )
            else:
                if array.size != math.prod(shape):
                    wanted = math.prod(shape) * np.dtype(dtype or array.dtype).itemsize
                    raise InvalidRequest(
                        f"Given model input {index} size {array.nbytes} not match the size {wanted} defined in model"
                    )
                array = array.reshape(shape)
        if dtype is not None and array.dtype != dtype:
            self._wrong_type(index, array.dtype.name, dtype)
        return array

    def _run_isolated(self, rows: list[list[Array]], subgraph: int) -> Sequence[Outcome]:
        """One run of rows that can be stacked."""
        try:
            inputs = [
                stack(list(values)) if self._batched_input(index) else values[0]
                for index, values in enumerate(zip(*rows))
            ]
            return self._run_batch(inputs, len(rows), subgraph)
        except BaseException as error:  # a model may raise anything; it must not end the worker
            return self._one_by_one(error, rows, subgraph)

    def _one_by_one(self, error: BaseException, rows: list[list[Array]], subgraph: int) -> Sequence[Outcome]:
        """After a run that failed: the error of its only row, or the outcome of each row in a run of its own."""
        if isinstance(error, PredictFailed):  # the model itself says that the whole batch has failed
            return [error] * len(rows)
        if len(rows) > 1:
            return [outcome for row in rows for outcome in self._run_isolated([row], subgraph)]
        failed = PredictFailed(f"Predict Failed, model '{self.spec.key}', error msg: {describe(error)}")
        _FAILURES.add(self.spec.key, error, str(failed))
        return [failed]

    def _run_batch(self, inputs: list[Array], count: int, subgraph: int) -> Sequence[Row]:
        """Runs at most as many instances as the batch size: padded where the file fixes it, outputs trimmed.

        Args:
            inputs: [count, ...], or what all instances share; of a model without batch dimension, of its one instance.
        """
        if not self.spec.with_batch_dim:
            return [self._call(inputs, subgraph, 1)]
        missing = self.batch_size - count if self.fixed else 0
        if missing:
            inputs = [
                np.concatenate([column, *[column[:1]] * missing]) if self._batched_input(index) else column
                for index, column in enumerate(inputs)
            ]
        outputs = self._call(inputs, subgraph, count)
        self._check_batch(outputs, count + missing)
        if not outputs:
            return [()] * count
        return Table([output[:count] for output in outputs] if missing else outputs)

    def _call(self, inputs: list[Array], subgraph: int, count: int) -> list[Array]:
        """One call of the model, for `count` instances."""
        self.began()
        start = time.perf_counter()
        try:
            outputs = self.model.run(inputs, subgraph)
        finally:
            self.runs.append((count, time.perf_counter() - start))
        return self._outputs(outputs, subgraph)

    @staticmethod
    def _check_batch(outputs: Sequence[Array], count: int) -> None:
        for number, output in enumerate(outputs):
            if output.ndim == 0 or output.shape[0] != count:
                raise ValueError(
                    f"output {number} has shape {list(output.shape)}, expected a first dimension of {count}"
                )

    def _outputs(self, outputs: list[Array], subgraph: int) -> list[Array]:
        expected = self.model.graphs[subgraph].outputs
        if expected and len(outputs) != len(expected):
            raise ValueError(f"the model returned {len(outputs)} outputs, expected {len(expected)}")
        # ascontiguousarray would make scalars one-dimensional.
        return [output if output.flags.c_contiguous else output.copy("C") for output in outputs]


class Values:
    """Numbers arrays by type, shape and bytes: equal arrays have the same number."""

    SMALL = 4096
    """Bytes up to which an array's whole content is its key; a larger array's key is a sample, and equal samples are
    compared in full."""

    def __init__(self) -> None:
        self._by_sample: dict[tuple[object, ...], list[tuple[int, Array]]] = {}
        self._count = 0

    def number(self, array: Array) -> int:
        raw = array.reshape(-1).view(np.uint8)
        sample = raw if raw.size <= self.SMALL else raw[:: raw.size // 512]
        alike = self._by_sample.setdefault((array.dtype.num, array.shape, sample.tobytes()), [])
        for number, other in alike:
            if raw.size <= self.SMALL or other is array or np.array_equal(other.reshape(-1).view(np.uint8), raw):
                return number
        self._count += 1
        alike.append((self._count, array))
        return self._count


def stack(rows: Sequence[Array]) -> Array:
    """Arrays of one shape [...] as one array [n, ...]."""
    if len(rows) == 1:
        return np.ascontiguousarray(rows[0])[np.newaxis] if rows[0].ndim else rows[0].reshape(1)
    if rows[0].ndim == 0:
        return np.array(rows)
    # Several times faster than np.stack for small arrays.
    return np.concatenate(rows).reshape((len(rows), *rows[0].shape))
