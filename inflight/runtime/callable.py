"""Any Python callable as a model: a function, an object with `__call__`, a class built once for each worker.

It serves libraries that have no runtime of their own, and stands in for the other runtimes in tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from inflight.contract import CODES, Array, GraphSpec, TensorSpec
from inflight.errors import StartError
from inflight.runtime.base import LoadedModel, LoadRequest, Runtime
from inflight.runtime.support import present_devices, refuse_config_file

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class CallableModel(LoadedModel):
    """Calls the target with one batched array for each input; it returns one array, or a tuple or list of arrays.

    Inputs are named after the target's positional parameters that have no default. Their dtypes and shapes
    are not known. An empty `GraphSpec.inputs` says that the target takes any number of arrays (`*args`, or a built-in
    without a signature); `GraphSpec.outputs` is always empty, because only a call shows how many there are.

    The target gets copies of the inputs, which it may change or keep; its results are copied too.
    """

    def __init__(self, targets: Sequence[Callable[..., Any]], device_type: str) -> None:
        self._targets = tuple(targets)
        self.graphs = tuple(_graph(target) for target in self._targets)
        self.device_type = device_type

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        expected = len(self.graphs[subgraph].inputs)
        if expected and len(inputs) != expected:
            raise ValueError(f"The model takes {expected} inputs, not {len(inputs)}")
        result = self._targets[subgraph](*[np.array(value) for value in inputs])
        values = result if isinstance(result, (tuple, list)) else (result,)
        return [_array(value, number) for number, value in enumerate(values)]

    def close(self) -> None:
        self._targets = ()


class CallableRuntime(Runtime):
    """The target of the request, or one imported by name: a file called `package.module:attribute`.

    A class is called once without arguments when the model is loaded, and the instance answers the batches: the
    place to load weights.
    """

    formats: ClassVar[tuple[str, ...]] = ("callable",)
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        return present_devices()

    @classmethod
    def load(cls, request: LoadRequest) -> CallableModel:
        refuse_config_file(request, "callable")
        device_type = request.device_type or "cpu"
        if device_type not in cls.devices():
            raise StartError(
                f"This machine has no device of type '{device_type}'; use one of: {', '.join(cls.devices())}"
            )
        targets = [request.target] if request.target is not None else [_by_name(file.name) for file in request.files]
        if not targets:
            raise StartError(
                "Load model failed, give declare_model a callable or a name like 'package.module:function'"
            )
        return CallableModel([_instance(target) for target in targets], device_type)


def _by_name(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise StartError(f"Load model failed, '{name}' does not name a callable; write 'package.module:attribute'")
    try:
        target: Any = import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as failure:
        raise StartError(f"Load model failed, the callable '{name}' cannot be imported: {failure}") from failure
    return target


def _instance(target: Any) -> Callable[..., Any]:
    built = target() if inspect.isclass(target) else target
    if not callable(built):
        raise StartError(
            f"Load model failed, {target!r} cannot be called; give a function, or a class with a method __call__"
        )
    return built  # type: ignore[no-any-return]


def _graph(target: Callable[..., Any]) -> GraphSpec:
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # built-ins may have no signature
        return GraphSpec((), ())
    if any(item.kind is item.VAR_POSITIONAL for item in parameters):
        return GraphSpec((), ())
    for item in parameters:
        if item.kind is item.KEYWORD_ONLY and item.default is item.empty:
            raise StartError(
                f"Load model failed, the callable needs the keyword argument '{item.name}', but models get their "
                "inputs by position; give it a default or make it positional"
            )
    required = [item for item in parameters if item.kind in _POSITIONAL and item.default is item.empty]
    return GraphSpec(tuple(TensorSpec(item.name) for item in required), ())


def _array(value: Any, number: int) -> Array:
    # Always a copy: the caller may write into the array, and the target may have kept it.
    array = np.array(value, order="C")
    if array.dtype not in CODES:
        raise TypeError(
            f"Output {number} of the callable is of type {type(value).__name__} (as an array: {array.dtype}); "
            "return arrays of the numeric types or bool"
        )
    return array
