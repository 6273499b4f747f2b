"""Runs Python stage functions on a batch of instances and checks what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.contract import CODES, Array, Outcome, Texts, Value
from inflight.errors import DeadlineExceeded, InflightError, ModelError, describe
from inflight.pipeline.failures import FailureLog
from inflight.servable import FunctionSpec, MethodSpec, StageSpec

MAX_RANK = 32
"""Dimensions of nested lists of texts, as numpy had for arrays."""

Fail = Callable[[BaseException], InflightError]

_FAILURES = FailureLog()


class BadResult(ValueError):
    """What a stage function returned cannot be used."""


@dataclass(frozen=True)
class Form:
    """The result that a function has to return for one instance.

    Attributes:
        function: its name, for error texts.
        count: its outputs.
        unwrap: a list of one element stands for that element, of any type, as in MindSpore Serving.
    """

    function: str
    count: int
    unwrap: bool = False

    def outputs(self, result: Any) -> Sequence[Any]:
        """The outputs of one result: a tuple is as many outputs as it has elements, and so is a list of arrays, texts
        or bytes. A list of numbers, of texts, or of lists, is one output where one is declared.

        Raises:
            BadResult: there are more or fewer than declared.
        """
        if isinstance(result, tuple):
            items: Sequence[Any] = result
        elif isinstance(result, list):
            if self.count == 1 and not (self.unwrap and len(result) == 1) and self._is_one(result):
                return (result,)
            items = result
        elif self.count == 1:
            return (result,)
        else:
            raise BadResult(
                f"the function returned one {type(result).__name__}, expected {self.count} outputs in a tuple "
                f"from '{self.function}'"
            )
        if len(items) != self.count:
            hint = "; return an array where all of it is one output" if self.count == 1 else ""
            raise BadResult(
                f"the function returned {len(items)} outputs, expected {self.count} from '{self.function}', as its "
                f"outputs_count says{hint}"
            )
        return items

    def _is_one(self, result: list[Any]) -> bool:
        """Whether a list is one value."""
        texts = not self.unwrap and bool(result) and all(isinstance(item, _TEXT) for item in result)
        return texts or not any(map(_is_value, result))


Inputs = Callable[[int], list[list[Any]]]
"""Gives a function's inputs for the instances from an index on. Each call makes them anew, since functions may edit
them."""


At = Callable[[int, int], None]


def run_stage(
    function: FunctionSpec, method: MethodSpec, stage: StageSpec, inputs: Inputs, count: int, at: At
) -> list[Outcome]:
    """One outcome for each of `count` instances, in order; a failed instance never fails another one. `at(first, last)`
    is called before each call of user code, with the range of instances [first, last) that it is for.

    User code may raise anything: KeyboardInterrupt, SystemExit and GeneratorExit too are caught here, and none of it
    ends the worker. (A worker's real signals raise nothing, they are handled on a thread of their own.)
    """

    def fail(error: BaseException) -> InflightError:
        failed = failure(method.name, stage, error)
        _FAILURES.add(f"{method.name}/{stage.index}", error, str(failed))
        return failed

    form = Form(function.key, function.outputs_count, method.mindspore_values)
    if stage.batch_size is None:
        outcomes: list[Outcome] = []
        for index, row in enumerate(inputs(0)):
            at(index, index + 1)
            outcomes.append(_one(function, form, row, fail))
        return outcomes
    return _batch(function, form, inputs, count, fail, at)


def failure(method: str, stage: StageSpec, error: BaseException) -> InflightError:
    """The error of a failed stage, in MindSpore Serving's words. The time-out of a model that the function called stays
    a `DeadlineExceeded`."""
    kind = DeadlineExceeded if isinstance(error, DeadlineExceeded) else ModelError
    return kind(
        f"Call {stage.tag} Failed, method: '{method}', stage index(begin with 1): {stage.index}, "
        f"error msg: {describe(error)}"
    )


def _one(function: FunctionSpec, form: Form, row: list[Value], fail: Fail) -> Outcome:
    try:
        return as_row(function.function(*row), form, row)
    except BaseException as error:
        return fail(error)


def _batch(function: FunctionSpec, form: Form, inputs: Inputs, count: int, fail: Fail, at: At) -> list[Outcome]:
    """Calls a batch function until every row has an outcome.

    An exception before the first result fails all remaining rows; an exception while iterating fails the row whose
    result was asked for, and the function is called again with the rows after it.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        rest = inputs(len(outcomes))
        at(len(outcomes), count)
        try:
            results = _iterate(function.function, rest)
        except BaseException as error:
            outcomes += [fail(error)] * len(rest)
            break
        for row in rest:
            at(len(outcomes), count)
            try:
                outcomes.append(as_row(next(results), form, row))
            except BadResult as error:
                outcomes.append(fail(error))
            except StopIteration:
                missing = BadResult(
                    f"the function returned {len(outcomes) - (count - len(rest))} results for {len(rest)} "
                    "instances; return or yield one result for each instance"
                )
                outcomes += [fail(missing)] * (count - len(outcomes))
                break
            except BaseException as error:
                outcomes.append(fail(error))
                break
    return outcomes


def _iterate(function: Callable[..., Any], rows: Sequence[Sequence[Value]]) -> Iterator[Any]:
    results = function(tuple(tuple(row) for row in rows))
    if isinstance(results, (list, tuple)) or hasattr(results, "__next__"):
        return iter(results)
    raise BadResult(
        f"a function with batch_size must return a list or tuple, or yield, one result for each instance, "
        f"but it returned {type(results).__name__}"
    )


def as_row(result: Any, form: Form, inputs: Sequence[Value] = ()) -> list[Value]:
    """A function's result for one instance as values, one for each output.

    Args:
        inputs: the function's inputs for this instance. An input that is returned stays as it is (once); every other
            array is copied, since a function may fill one buffer for each instance and return it every time.

    Raises:
        BadResult: the number of outputs or a type is wrong.
    """
    if form.count == 1:
        return [_kept(result if type(result) is np.ndarray else form.outputs(result)[0], inputs)]
    items = form.outputs(result)
    row: list[Value] = []
    for item in items:
        # An input that is returned as two outputs becomes two values.
        repeated = any(item is value for value in row)
        row.append(_kept(item, () if repeated else inputs))
    return row


def _is_value(item: Any) -> bool:
    """Whether an element of a list is an output by itself, and not a number or a list."""
    if isinstance(item, (np.ndarray, *_TEXT)):
        return True
    return not isinstance(item, (bool, int, float, list, np.generic)) and (
        hasattr(item, "__array__") or callable(getattr(item, "asnumpy", None))
    )


_TEXT = (str, bytes, bytearray, memoryview)

_OWN = (list, bool, int, float, np.ndarray, np.generic)
"""Types that numpy converts into new memory; arrays made of other objects may view the object's memory."""


def _kept(item: Any, inputs: Sequence[Value]) -> Value:
    """The value, in memory that the function will not write again."""
    value = as_value(item)
    if not isinstance(value, np.ndarray):
        return value
    for given in inputs:
        if value is given:
            return value
    if value is item or not isinstance(item, _OWN):
        copy: Array = value.copy()
        return copy
    return value


def texts_of(value: Any) -> Value | None:
    """A list, a tuple or an array of texts, or of bytes; None: the value is something else.

    Raises:
        BadResult: lists of different lengths, texts beside other things, or no valid Unicode.
    """
    shape: tuple[int, ...]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "USTO" or (
            value.dtype.kind == "O" and not isinstance(next(value.flat, None), _TEXT)
        ):
            return None
        shape, items = value.shape, value.ravel().tolist()
    else:
        shape, first = _shape_of(value)
        if not isinstance(first, _TEXT):
            return None
        items = [value]
        for size in shape:
            items = _inner(items, size)
    if all(isinstance(item, str) for item in items):
        for item in items:
            if not item.isascii():
                _check_text(item)
        return Texts(shape, [str(item) for item in items]) if shape else str(items[0])
    if any(isinstance(item, str) or not isinstance(item, _TEXT) for item in items):
        kinds = " beside ".join(sorted({type(item).__name__ for item in items}))
        raise BadResult(f"the function returned {kinds} in one list; return texts only, or bytes only")
    return Texts(shape, [bytes(item) for item in items]) if shape else bytes(items[0])


def _shape_of(value: Any) -> tuple[tuple[int, ...], Any]:
    """The dimensions of nested lists, by their first elements, and the very first element."""
    shape: list[int] = []
    while isinstance(value, (list, tuple)) and len(shape) < MAX_RANK:
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape), value


def _inner(items: list[Any], size: int) -> list[Any]:
    """The elements of lists of this length, one level deeper."""
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) != size:
            found = f"one of {len(item)}" if isinstance(item, (list, tuple)) else f"a {type(item).__name__}"
            raise BadResult(
                f"the function returned a list of {size} texts beside {found}; make lists of texts equally long, "
                "filled up with empty texts, say"
            )
    return [each for item in items for each in item]


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadResult(
            f"the function returned a str that is not valid Unicode, return bytes instead: {error}"
        ) from None


def as_value(value: Any) -> Value:
    """A stage function's output as a value: texts, bytes, or a C-contiguous array of a numeric or bool type.

    Lists and numpy arrays of texts, or of bytes, become `Texts`. Python's bool, int and float become bool, int64 and
    float64 scalars; objects with `asnumpy` are converted.

    Raises:
        BadResult: the type cannot be sent to a model or a client.
    """
    if isinstance(value, np.ndarray) and value.dtype in CODES:
        return value if value.flags.c_contiguous else np.ascontiguousarray(value)
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value)
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    convert = getattr(value, "asnumpy", None)
    if callable(convert):
        return as_value(convert())
    if value is None:
        raise BadResult("the function returned None; return an array, a number, a str or bytes")
    texts = texts_of(value)
    if texts is not None:
        return texts
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadResult(f"a {type(value).__name__} cannot be made an array: {error}") from None
    if array.dtype not in CODES:
        raise BadResult(
            f"unsupported output of type {type(value).__name__} (as array: {array.dtype}); "
            "return an array of bool, int8 to float64, a number, a str or bytes"
        )
    return np.ascontiguousarray(array).reshape(array.shape)
