"""Runs Python stage functions on a batch of instances and checks what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from inflight.errors import ModelError, describe
from inflight.pipeline.failures import FailureLog
from inflight.servable import FunctionSpec, MethodSpec, StageSpec
from inflight.types import CODES, Array, Outcome, Value

Fail = Callable[[BaseException], ModelError]

_FAILURES = FailureLog()


class BadResult(ValueError):
    """What a stage function returned cannot be used."""


def run_stage(function: FunctionSpec, method: MethodSpec, stage: StageSpec, rows: list[list[Value]]) -> list[Outcome]:
    """One outcome per row, in order; a failed row never fails another one.

    User code may raise anything: KeyboardInterrupt, SystemExit and GeneratorExit too are caught here, and none of it
    ends the worker. (A worker's real signals raise nothing, they are handled on a thread of their own.)
    """

    def fail(error: BaseException) -> ModelError:
        failed = failure(method.name, stage, error)
        _FAILURES.add(f"{method.name}/{stage.index}", error, str(failed))
        return failed

    if stage.batch_size is None:
        return [_one(function, row, fail) for row in rows]
    return _batch(function, rows, fail)


def failure(method: str, stage: StageSpec, error: BaseException) -> ModelError:
    """The error of a failed stage, in MindSpore Serving's words."""
    return ModelError(
        f"Call {stage.tag} Failed, method: '{method}', stage index(begin with 1): {stage.index}, "
        f"error msg: {describe(error)}"
    )


def _one(function: FunctionSpec, row: list[Value], fail: Fail) -> Outcome:
    try:
        return as_row(function.function(*row), function.outputs_count, row)
    except BaseException as error:
        return fail(error)


def _batch(function: FunctionSpec, rows: list[list[Value]], fail: Fail) -> list[Outcome]:
    """Calls a batch function until every row has an answer.

    An exception before the first result fails all rows left; one while iterating fails the row it came for, and the
    function is called again with the rows after it.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(rows):
        rest = rows[len(outcomes) :]
        try:
            results = _iterate(function.function, rest)
        except BaseException as error:
            outcomes += [fail(error)] * len(rest)
            break
        for row in rest:
            try:
                outcomes.append(as_row(next(results), function.outputs_count, row))
            except BadResult as error:
                outcomes.append(fail(error))
            except StopIteration:
                missing = BadResult(
                    f"the function returned {len(outcomes) - (len(rows) - len(rest))} results for {len(rest)} "
                    "instances; return or yield one result for each instance"
                )
                outcomes += [fail(missing)] * (len(rows) - len(outcomes))
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


def as_row(result: Any, count: int, inputs: Sequence[Value] = ()) -> list[Value]:
    """A function's result for one instance as `count` values.

    Args:
        inputs: what the function was given for this instance: returned as it is, while every other array is copied,
            since a function may fill one buffer for each instance and return that again and again.

    Raises:
        BadResult: the number of outputs or a type is wrong.
    """
    if count == 1 and not (isinstance(result, (tuple, list)) and len(result) == 1 and _nested(result)):
        return [_kept(result[0] if isinstance(result, tuple) and len(result) == 1 else result, inputs)]
    if not isinstance(result, (tuple, list)):
        raise BadResult(f"the function returned one {type(result).__name__}, expected {count} outputs in a tuple")
    if len(result) != count:
        raise BadResult(f"the function returned {len(result)} outputs, expected {count}")
    return [_kept(item, inputs) for item in result]


def _kept(item: Any, inputs: Sequence[Value]) -> Value:
    """The value, in memory that the function will not write again."""
    value = as_value(item)
    if value is item and isinstance(value, np.ndarray) and not any(value is one for one in inputs):
        copy: Array = value.copy()
        return copy
    return value


def _nested(result: Sequence[Any]) -> bool:
    """A one-element list that wraps an array, text or bytes is a row; `[3]` is an array of one number."""
    return isinstance(result[0], (np.ndarray, str, bytes))


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadResult(
            f"the function returned a str that is not valid Unicode, return bytes instead: {error}"
        ) from None


def as_value(value: Any) -> Value:
    """A stage function's output as a value: texts, bytes, or a C-contiguous array of a numeric or bool type.

    Python's bool, int and float become bool, int64 and float64 scalars; objects with `asnumpy` are converted.

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
