"""`Model`, the result of `declare_model`: an argument of `add_stage`; stage functions run it by `Model.call`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from inflight.contract import CODES, Array, Value
from inflight.errors import ModelError, error_from_wire
from inflight.servable.checks import check_int
from inflight.servable.trace import _TensorDef

Instance: TypeAlias = "tuple[Value, ...]"
ModelCaller: TypeAlias = "Callable[[str, int, list[Instance]], list[Instance]]"
"""Runs instances on one sub-graph of a model: (key, sub-graph, instances) -> one row of outputs per instance."""
Describe: TypeAlias = "Callable[[str], tuple[tuple[int, int], ...] | None]"
"""(inputs count, outputs count) of each sub-graph of the model with that key; None: no such model."""

_FORMS = "call(x1, x2) runs one instance, call([[x1, x2], [x1, x2]]) runs several"


@dataclass(frozen=True)
class _Installed:
    run: ModelCaller
    describe: Describe


# One for the process, because the stage functions of a worker run in several threads and share its models.
_installed: _Installed | None = None


def install_model_caller(caller: ModelCaller, describe: Describe) -> None:
    """Sets the function by which `Model.call` runs this process's models. The worker does so before any stage runs.

    Args:
        caller: takes instances of C-contiguous arrays, as many as the model has inputs, of a language model texts and
            bytes too; called from any thread. A RuntimeError that it raises reaches the stage function with the model's
            name in front.
        describe: counts per sub-graph; -1 as inputs count where the back end does not know.
    """
    global _installed
    _installed = _Installed(caller, describe)


class Model:
    """One declared model.

    Attributes:
        model_key: the file names joined with `;`, or the callable's name.
        generates: it is a language model: it takes texts and bytes too, and any number of inputs.
    """

    def __init__(self, model_key: str, generates: bool = False) -> None:
        self.model_key = model_key
        self.generates = generates

    def __repr__(self) -> str:
        return f"Model({self.model_key!r})"

    def call(self, *args: Any, subgraph: int = 0) -> Any:
        """Runs the model from inside a stage function and waits for the result.

        Args:
            args: the inputs of one instance; or one list or tuple of instances, each a list or tuple of inputs.
                Inputs are arrays, numbers, or objects with `asnumpy()`; of a language model those of its stages: a
                prompt, then images if it reads them, then parameters as JSON. Any number of instances may be given.
            subgraph: which file of a model of several files, from 0.

        Returns:
            One instance: its output, or a tuple of its outputs if there are several. A list of instances: a tuple
            with one tuple of outputs for each.

        Raises:
            ModelError: wrong form, count or type of inputs, unknown model or sub-graph; texts start with
                `Model(<key>).call() failed`.
            InflightError: an error that the model raised, whose text starts likewise.
        """
        check_int("subgraph", subgraph, 0)
        prefix = f"Model({self.model_key}{f', subgraph={subgraph}' if subgraph else ''}).call() failed"
        if not args:
            raise ModelError(f"{prefix}: no inputs provided, {_FORMS}")
        many = len(args) == 1 and isinstance(args[0], (tuple, list))
        instances: Sequence[Any] = args[0] if many else [args]
        _check_form(prefix, instances)
        run = self._checked_caller(prefix, subgraph, instances)
        rows = [tuple(self._value(prefix, value) for value in instance) for instance in instances]
        try:
            outputs = run(self.model_key, subgraph, rows)
        except RuntimeError as error:
            raise error_from_wire(type(error).__name__, f"{prefix}: {error}") from error
        if many:
            return tuple(tuple(row) for row in outputs)
        return outputs[0][0] if len(outputs[0]) == 1 else tuple(outputs[0])

    def _value(self, prefix: str, value: Any) -> Value:
        if self.generates:
            if isinstance(value, str):
                return str(value)
            if isinstance(value, (bytes, bytearray, memoryview)):
                return bytes(value)
        return _as_array(prefix, value)

    def _checked_caller(self, prefix: str, subgraph: int, instances: Sequence[Sequence[Any]]) -> ModelCaller:
        if _installed is None:
            raise ModelError(
                f"{prefix}: no model is loaded in this process, Model.call works only in stage functions of a worker"
            )
        graphs = _installed.describe(self.model_key)
        if graphs is None:
            raise ModelError(f"{prefix}: the model is not declared, use the object that declare_model returned")
        if subgraph >= len(graphs):
            raise ModelError(
                f"{prefix}: The model does not have subgraph of index {subgraph}, "
                f"the subgraph count of the model is {len(graphs)}"
            )
        expected = -1 if self.generates else graphs[subgraph][0]
        for index, instance in enumerate(instances):
            if expected >= 0 and len(instance) != expected:
                raise ModelError(
                    f"{prefix}: The inputs count {len(instance)} of instance {index} is not equal to "
                    f"the inputs count {expected} of the model"
                )
        return _installed.run


def _check_form(prefix: str, instances: Sequence[Any]) -> None:
    if not instances:
        raise ModelError(f"{prefix}: Input instances count is 0, give at least one instance")
    for instance in instances:
        if not isinstance(instance, (tuple, list)):
            raise ModelError(
                f"{prefix}: inputs format invalid, an instance should be a tuple or list of inputs, "
                f"but is {type(instance)}; {_FORMS}"
            )
        if any(isinstance(value, _TensorDef) for value in instance):
            raise ModelError(
                f"{prefix}: the body of a method has no data, only placeholders; use add_stage there, "
                "and Model.call inside stage functions"
            )


def _as_array(prefix: str, value: Any) -> Array:
    asnumpy = getattr(value, "asnumpy", None)
    try:
        # Not np.ascontiguousarray: it turns an array without dimensions into one of shape (1,).
        array: Array = np.asarray(asnumpy() if callable(asnumpy) else value, order="C")
    except ValueError as error:
        raise ModelError(f"{prefix}: an input is no array, {error}") from error
    if array.dtype not in CODES:
        raise ModelError(
            f"{prefix}: a model takes numbers and bools of up to 64 bits, but an input is {type(value)} "
            f"with data type {array.dtype}"
        )
    return array
