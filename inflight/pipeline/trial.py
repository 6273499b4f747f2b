"""Finds out by computing whether the rows of a model file's batch are independent of each other.

A file says which dimensions are open, not what they mean: boxes, time steps and samples look alike. So the graph is run
on made-up rows, alone and together. Its first dimension is a batch if every output for several rows is the outputs of
the single rows, one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from inflight.contract import DTYPE_CODES, Array, TensorSpec
from inflight.runtime import GraphSpec, LoadedModel

SIZES = (32, 64, 16, 8, 128, 224, 256, 320, 416, 512, 576, 640, 1024, 4096, 16000, 5, 4, 3, 2, 1)
"""Sizes that are tried for open dimensions other than the first, one size for all of them, until the graph runs.
Multiples of 32 come first, because networks that halve pictures need them; 1 comes last, because at that size many
graphs hide whether their rows depend on each other."""

ROW_ELEMENTS = 1 << 23
"""Elements of one row of one input up to which a size is tried."""

TIGHT = {2: 8e-3, 4: 1e-6, 8: 1e-14}
"""Differences, by bytes of the float type and relative to the output's largest element, up to which a row counts as
unchanged when its neighbours get other values: a few units in the last place. Shapes are the same then, and so is the
order of all sums, so that nothing but the neighbours can make a difference."""

LOOSE = {2: 2e-2, 4: 1e-4, 8: 1e-9}
"""The same for a row alone and among others: a runtime sums in another order for another number of rows. At least one
trial has to stay within it."""

WIDE = {2: 1e-1, 4: 1e-1, 8: 1e-3}
"""The limit for every trial. Some graphs amplify a changed order of sums for some inputs (Magika's classifier of files
to 1e-2 for bytes of 0 and 1, to 1e-7 for others); a graph that really mixes its rows exceeds this in every trial."""

LOOSE_ON_DEVICE = 1e-2
"""The least value of `LOOSE` on accelerators, which multiply float32 with 10 bits of mantissa (TF32)."""

ENOUGH = 5.0
"""Seconds after which trials go on only for a graph that is still undecided."""

SPARE = 1.0
"""Seconds up to which a graph whose rows were independent so far is tried with large numbers too: rows may depend on
each other only where some number exceeds a limit."""

QUICK = 0.3
"""A full batch is tried only if it is estimated to run in this many seconds."""

_Rows = dict[str, list[Array]]
"""Made-up rows by letter: one array [1, ...] for each input."""


@dataclass(frozen=True)
class Finding:
    """The result of the trial runs.

    Attributes:
        batched: the first dimension of all inputs and outputs is a batch of independent rows.
        reason: why it is not, for people; empty if it is.
        outputs: the graph's outputs, with dimensions that turned out to be otherwise than declared as -1.
    """

    batched: bool
    reason: str
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class _Draw:
    """How the numbers of one trial are drawn: floats, and integers below a limit that is valid for most tables."""

    low: float
    high: float
    below: int


_DRAWS = (_Draw(-1.7, 1.7, 2), _Draw(0.0, 1.0, 2), _Draw(0.0, 255.0, 10), _Draw(-3e4, 3e4, 256))
_ALWAYS = 2
"""Draws that every graph is tried with; the others are for graphs that are still undecided, or quick."""

_STRENGTHS = {"a": 1.0, "b": 4.0, "c": 0.25}
"""Rows of different magnitude, so that a maximum or a mean over all rows changes the result."""


class _Refuted(Exception):
    """The first dimension is no batch; the text says why."""


def first_dimension(graph: GraphSpec) -> int | None:
    """The first dimension that all inputs and outputs declare, -1 where it is open; None where they have none in
    common."""
    firsts = {tensor.shape[0] if tensor.shape else None for tensor in (*graph.inputs, *graph.outputs)}
    return firsts.pop() if len(firsts) == 1 else None


def examine(
    model: LoadedModel, max_batch_size: int, guard: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Finding:
    """Whether requests for the model's first graph can share a call.

    Args:
        max_batch_size: rows in one run, where the file leaves the batch open.
        guard: entered around each run, which may never end.
    """
    graph = model.graphs[0]
    first = first_dimension(graph)
    if first is None:
        return Finding(False, "its inputs and outputs have no first dimension in common", graph.outputs)
    if any(tensor.dtype not in DTYPE_CODES for tensor in graph.inputs):
        return Finding(False, "it does not say the types of its inputs", graph.outputs)
    trial = _Trial(model, first, max_batch_size, guard)
    try:
        trial.run()
    except _Refuted as refuted:
        return Finding(False, str(refuted), trial.outputs())
    return Finding(True, "", trial.outputs())


class _Trial:
    """The runs of one graph."""

    def __init__(
        self, model: LoadedModel, first: int, max_batch_size: int, guard: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._model = model
        self._guard = guard
        self._graph = model.graphs[0]
        self._fixed = first if first > 0 else None
        self._max = first if first > 0 else max_batch_size
        self._random = np.random.default_rng(20)
        self._seen: list[tuple[int, ...]] | None = None  # shapes of outputs for one row, or one fixed batch
        self._constant = {output.name for output in self._graph.outputs}
        self._agreed = False  # some trial kept to LOOSE
        self._seconds = 0.0  # of the first run
        self._on_device = model.device_type != "cpu"

    def outputs(self) -> tuple[TensorSpec, ...]:
        """The declared outputs, corrected by the shapes that came."""
        if self._seen is None:
            return self._graph.outputs
        return tuple(_corrected(spec, shape) for spec, shape in zip(self._graph.outputs, self._seen))

    def run(self) -> None:
        """Raises _Refuted where the first dimension is no batch of independent rows."""
        size, whole_numbers = self._runnable()
        start = time.monotonic()
        for number, draw in enumerate(_DRAWS):
            known = self._agreed and not self._constant
            if number >= _ALWAYS and self._on_device:
                break  # on a device an index beyond a table may be the end of the process
            if number and known and time.monotonic() - start > (ENOUGH if number < _ALWAYS else SPARE):
                break
            below = draw.below if whole_numbers == 2 else whole_numbers
            rows = {name: self._row(draw, size, below, strength) for name, strength in _STRENGTHS.items()}
            if number >= _ALWAYS and not self._runs(rows["a"]):
                continue
            if self._compare(rows, beside_only=known and number >= _ALWAYS):
                return
        if not self._agreed:
            raise _Refuted("a row among others gives another result than alone")
        if self._constant:
            raise _Refuted(
                f"its output '{min(self._constant)}' was the same for all trial inputs, which proves nothing"
            )

    def _runnable(self) -> tuple[int, int]:
        """Size of open dimensions, and what integers are below, with which one row runs."""
        opened = any(-1 in (tensor.shape or ())[1:] for tensor in self._graph.inputs)
        limits = (2, 1) if any(np.dtype(tensor.dtype).kind in "iu" for tensor in self._graph.inputs) else (2,)
        problem = "there is no size to try it with"
        for size in SIZES if opened else (1,):
            if any(math.prod(_row_shape(tensor, size)) > ROW_ELEMENTS for tensor in self._graph.inputs):
                continue
            for limit in limits:
                try:
                    start = time.monotonic()
                    self._seen = [output.shape for output in self._call([self._row(_DRAWS[0], size, limit, 1.0)])]
                    self._seconds = time.monotonic() - start
                except Exception as error:  # a model may raise anything
                    problem = _line(error)
                    continue
                return size, limit
        raise _Refuted(f"it does not run on made-up inputs ({problem})")

    def _compare(self, rows: _Rows, beside_only: bool = False) -> bool:
        """Runs the rows alone and together; True if the batch is fixed at 1, so that rows never share a run.

        Args:
            beside_only: rows among others are compared with each other and not with rows alone: numbers far from what
                a graph is made for amplify a changed order of sums without limit, but rows beside a row change none.
        """
        alone = {name: self._alone(row) for name, row in rows.items()}
        count = self._fixed or 1
        for outputs in alone.values():
            self._check_first(outputs, count)
        if self._max == 1:
            return True
        if not self._alike(self._alone(rows["a"]), alone["a"], [_scale([output]) for output in alone["a"]], WIDE):
            raise _Refuted("it gives other results when it is run again on the same input")
        self._note_constants(alone)
        scales = [_scale(outputs) for outputs in zip(*alone.values())]
        references = {name: [output[:1] for output in outputs] for name, outputs in alone.items()}
        places: dict[tuple[int, int, str], list[Array]] = {}
        tight = self._tolerance(rows, scales)
        agreed = True
        for pattern in self._patterns():
            try:
                together = self._call([rows[name] for name in pattern])
            except Exception as error:  # a model may raise anything
                raise _Refuted(f"it does not run on {len(pattern)} rows ({_line(error)})") from error
            self._check_first(together, len(pattern))
            for at, name in enumerate(pattern):
                row = [output[at : at + 1] for output in together]
                if not beside_only and not self._alike(row, references[name], scales, WIDE):
                    raise _Refuted(f"a row among {len(pattern)} gives another result than alone")
                agreed = agreed and self._alike(row, references[name], scales, LOOSE)
                seen = places.setdefault((len(pattern), at, name), row)
                if not self._alike(row, seen, scales, tight):
                    raise _Refuted("the result of a row changes with the rows beside it")
        self._agreed = self._agreed or agreed
        return False

    def _patterns(self) -> Iterator[str]:
        """Which rows are run together, by letter: in both orders, with a row that is there twice, and many."""
        if self._fixed is not None:
            for start in ("abc", "bca", "aab", "aca", "cba"):
                yield (start * self._fixed)[: self._fixed]
            return
        yield from ("ab", "ba", "aa", "ac", "ca")
        if self._max > 2 and self._seconds * self._max < QUICK:
            yield ("abcb" * self._max)[: self._max]
            yield ("acab" * self._max)[: self._max]

    def _tolerance(self, rows: _Rows, scales: Sequence[float]) -> dict[int, float]:
        """`TIGHT`, or `LOOSE` if the runtime does not repeat its own numbers exactly."""
        pattern = next(self._patterns())
        try:
            one, other = (self._call([rows[name] for name in pattern]) for _ in range(2))
        except Exception as error:  # a model may raise anything
            raise _Refuted(f"it does not run on {len(pattern)} rows ({_line(error)})") from error
        return TIGHT if self._alike(one, other, scales, TIGHT) else LOOSE

    def _alike(
        self, some: Sequence[Array], others: Sequence[Array], scales: Sequence[float], limits: dict[int, float]
    ) -> bool:
        for one, other, scale in zip(some, others, scales, strict=True):
            limit = limits.get(one.dtype.itemsize, 0.0)
            if limits is not TIGHT and self._on_device:
                limit = max(limit, LOOSE_ON_DEVICE)
            if not _close(one, other, limit * scale):
                return False
        return True

    def _check_first(self, outputs: Sequence[Array], count: int) -> None:
        for spec, output in zip(self._graph.outputs, outputs, strict=True):
            if not output.ndim or output.shape[0] != count:
                raise _Refuted(f"its output '{spec.name}' has shape {list(output.shape)} for a batch of {count}")

    def _note_constants(self, alone: dict[str, list[Array]]) -> None:
        first = alone["a"]
        for index, spec in enumerate(self._graph.outputs):
            if any(not _close(outputs[index], first[index], 0.0) for outputs in alone.values()):
                self._constant.discard(spec.name)

    def _alone(self, row: list[Array]) -> list[Array]:
        """One row, in copies where the file fixes how many."""
        try:
            return self._call([row] * (self._fixed or 1))
        except Exception as error:  # a model may raise anything
            raise _Refuted(f"it does not run on made-up inputs ({_line(error)})") from error

    def _runs(self, row: list[Array]) -> bool:
        try:
            self._call([row] * (self._fixed or 1))
        except Exception:  # a model may raise anything; this draw does not suit it
            return False
        return True

    def _call(self, rows: Sequence[list[Array]]) -> list[Array]:
        if self._fixed is not None and len(rows) == 1:
            rows = [rows[0]] * self._fixed
        inputs = [np.concatenate(column) for column in zip(*rows, strict=True)]
        with self._guard():
            outputs = self._model.run(inputs)
        if len(outputs) != len(self._graph.outputs):
            raise ValueError(f"it gives {len(outputs)} outputs in place of {len(self._graph.outputs)}")
        return [np.array(output) for output in outputs]

    def _row(self, draw: _Draw, size: int, below: int, strength: float) -> list[Array]:
        """One array [1, ...] for each input; integers are 1 where `below` is 1, since 0 often means that nothing is
        there."""
        row: list[Array] = []
        for tensor in self._graph.inputs:
            dtype = np.dtype(tensor.dtype)
            shape = (1, *_row_shape(tensor, size))
            if dtype.kind == "f":
                row.append((self._random.uniform(draw.low, draw.high, shape) * strength).astype(dtype))
            elif below == 1 and dtype.kind != "b":
                row.append(np.ones(shape, dtype))
            else:
                high = 2 if dtype.kind == "b" else below
                row.append(self._random.integers(0, min(high, 127), shape).astype(dtype))
        return row


def _row_shape(tensor: TensorSpec, size: int) -> tuple[int, ...]:
    return tuple(size if dimension == -1 else dimension for dimension in (tensor.shape or ())[1:])


def _scale(outputs: Sequence[Array]) -> float:
    """The largest finite magnitude."""
    largest = 0.0
    for output in outputs:
        if output.dtype.kind == "f" and output.size:
            largest = max(largest, float(np.max(np.abs(output), where=np.isfinite(output), initial=0)))
    return largest


def _close(one: Array, other: Array, limit: float) -> bool:
    """Whether two outputs are the same up to an absolute difference; integers, infinities and NaNs exactly."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    finite = np.isfinite(one)
    if not (
        np.array_equal(finite, np.isfinite(other)) and np.array_equal(one[~finite], other[~finite], equal_nan=True)
    ):
        return False
    difference = np.abs(one[finite].astype(np.float64) - other[finite].astype(np.float64))
    return not difference.size or float(difference.max()) <= limit


def _corrected(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    declared = spec.shape
    if declared is None or len(declared) != len(shape):
        return TensorSpec(spec.name, spec.dtype, (-1,) * len(shape))
    return TensorSpec(spec.name, spec.dtype, tuple(want if want == have else -1 for want, have in zip(declared, shape)))


def _line(error: BaseException) -> str:
    """The first line of an error's text, cut: back ends append whole call stacks."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:200]}..."
