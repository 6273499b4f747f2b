"""`register_method` and `add_stage`: a method's body runs once, with placeholders, and leaves its stages."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from inflight.errors import RegistrationError
from inflight.servable.builtin import BUILTIN_FUNCTIONS
from inflight.servable.checks import check_bool, check_int, check_seconds, check_str, check_strs
from inflight.servable.helpers import check_stages, helper_targets
from inflight.servable.model import Model
from inflight.servable.spec import FunctionSpec, MethodSpec, Ref, StageSpec
from inflight.servable.trace import MethodTrace, Registry, _TensorDef, current_method, current_registry

Function = TypeVar("Function", bound=Callable[..., Any])


def register_method(
    output_names: str | tuple[str, ...] | list[str],
    *,
    max_wait_ms: float = 0,
    queue_size: int | None = None,
    priority: int = 0,
    timeout: float | None = None,
    mindspore_values: bool = False,
    execution_timeout: float | None = None,
    exclusive: bool = False,
) -> Callable[[Function], Function]:
    """Makes the decorated function a method that clients call by the function's name.

    The parameters' names are the names of the method's inputs; defaults are ignored. The body runs once, now.

    Args:
        output_names: names of the returned placeholders, in order.
        max_wait_ms: milliseconds a stage may wait for a fuller batch; 0: it takes the instances that wait.
        queue_size: instances that may wait in the server, or None for the server's own limit.
        priority: methods with a higher number go first.
        timeout: seconds a request may take in all, or None.
        mindspore_values: MindSpore Serving's treatment of values: later stages see the edits that a function makes to
            its inputs, and a returned list of one element counts as that element. `mindspore_serving` sets it.
        execution_timeout: seconds that one call of a stage's function or model may take, before its worker counts as
            hung and is replaced; None: the server's `--execution-timeout`; 0: no limit.
        exclusive: no other function of the servable runs on the worker while one of this method waits in `Model.call`,
            as in MindSpore Serving; with `mindspore_values` it is always so.

    Returns:
        The decorator; it returns the function itself.

    Raises:
        RegistrationError: a parameter of the wrong type or value, a signature or a return that cannot be traced,
            or a second method of that name.
    """
    outputs = check_strs("output_names", output_names)
    wait = check_seconds("max_wait_ms", max_wait_ms)
    if queue_size is not None:
        check_int("queue_size", queue_size, 1)
    check_int("priority", priority)
    check_bool("mindspore_values", mindspore_values)
    check_bool("exclusive", exclusive)
    limit = None if timeout is None else check_seconds("timeout", timeout, exclusive=True)
    longest = None if execution_timeout is None else check_seconds("execution_timeout", execution_timeout)

    def register(function: Function) -> Function:
        registry = current_registry()
        name, inputs = _check_signature(function)
        trace = MethodTrace(name, targets=helper_targets(function))
        returns = _trace(registry, trace, function, len(inputs))
        _check_returns(name, returns, outputs)
        # The last check, as in MindSpore Serving: other errors of the second method come first.
        if name in registry.methods:
            raise RegistrationError(f"Method {name} has been registered more than once.")
        stages = tuple(trace.stages)
        registry.methods[name] = MethodSpec(
            name,
            inputs,
            outputs,
            stages,
            returns,
            wait,
            queue_size,
            priority,
            limit,
            mindspore_values,
            longest,
            exclusive or mindspore_values,
        )
        return function

    return register


def _check_signature(function: object) -> tuple[str, tuple[str, ...]]:
    """Name and input names of a method."""
    if not inspect.isfunction(function):
        raise RegistrationError(f"register_method decorates a function, but actually {type(function)}")
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise RegistrationError(
            f"Method '{name}' cannot be async or a generator: write a plain 'def' that returns placeholders; "
            "a stage function may be a generator, with batch_size"
        )
    parameters = inspect.signature(function).parameters
    for key, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise RegistrationError(f"'{name}' input {key} cannot be {parameter.kind.name} !")
    return name, tuple(parameters)


def _check_returns(name: str, returns: Sequence[Ref], outputs: Sequence[str]) -> None:
    if len(returns) != len(outputs):
        raise RegistrationError(
            f"Method return output size {len(returns)} not match registered {len(outputs)}, "
            f"method '{name}' has the output_names {', '.join(outputs)}"
        )


def _trace(registry: Registry, trace: MethodTrace, function: Callable[..., Any], inputs_count: int) -> tuple[Ref, ...]:
    """Runs the body and returns where each returned value comes from."""
    outer, registry.method = registry.method, trace
    try:
        returned = function(*(_TensorDef(trace, Ref(0, index)) for index in range(inputs_count)))
    finally:
        registry.method = outer
    check_stages(trace)
    values = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    if not all(isinstance(value, _TensorDef) and value.trace is trace for value in values):
        raise RegistrationError(
            "Each value returned is a placeholder for data and must come from the method inputs or the outputs of "
            f"add_stage, method '{trace.name}' returned {returned!r}"
        )
    return tuple(value.ref for value in values)


def add_stage(
    stage: Callable[..., Any] | Model | str,
    *args: Any,
    outputs_count: int,
    batch_size: int | None = None,
    tag: str | None = None,
) -> Any:
    """Adds a call of a model or a Python function to the method whose body is running.

    Args:
        stage: what `declare_model` returned, a function written with `def`, or `argmax_cpp`.
        args: placeholders: inputs of the method or outputs of earlier stages.
        outputs_count: outputs of the stage.
        batch_size: for functions. None: the function takes the inputs of one instance. Otherwise it takes one
            tuple of instances, each a tuple of inputs, and returns or yields one entry per instance; n: at most
            n instances, 0: as many as the method's model takes.
        tag: how error texts name the stage.

    Returns:
        One placeholder, or a tuple of `outputs_count` placeholders if there are several.

    Raises:
        RegistrationError: called outside a method's body, or a wrong parameter, or counts that do not agree with
            the function, with the model, or with another use of it.
    """
    # The checks are in MindSpore Serving's order, so that a script with two faults gets the same error.
    registry, trace = current_method("add_stage")
    if tag is not None:
        check_str("tag", tag)
    for value in args:
        if not isinstance(value, _TensorDef) or value.trace is not trace:
            raise RegistrationError(
                "Each value of parameter *args is a placeholder for data and must come from the method inputs or "
                f"the outputs of add_stage, but in method '{trace.name}' one is {value!r}"
            )
    inputs = tuple(value.ref for value in args)
    index = len(trace.stages) + 1
    if isinstance(stage, Model):
        key = _use_model(registry, trace, stage, len(inputs), outputs_count)
        added = StageSpec(index, "model", key, inputs, outputs_count, None, tag or f"Model '{key}'")
    else:
        function = _find_function(registry, trace, stage, len(inputs), outputs_count, batch_size)
        size = batch_size if function.batched else None
        added = StageSpec(
            index, "function", function.key, inputs, outputs_count, size, tag or f"Function '{function.key}'"
        )
        registry.functions[function.key] = function
    trace.stages.append(added)
    outputs = tuple(_TensorDef(trace, Ref(index, output)) for output in range(outputs_count))
    return outputs[0] if outputs_count == 1 else outputs


def _use_model(registry: Registry, trace: MethodTrace, model: Model, inputs_count: int, outputs_count: int) -> str:
    key = model.model_key
    if key not in registry.models:
        raise RegistrationError(
            f"Check failed in method '{trace.name}', the parameter 'stage' of add_stage must be function or Model "
            f"returned by declare_model, but model '{key}' is not declared in servable '{registry.name}'"
        )
    check_int("outputs_count", outputs_count, 1)
    old_inputs, old_outputs = registry.model_counts.setdefault(key, (inputs_count, outputs_count))
    if registry.models[key].generator is not None:
        old_inputs = inputs_count  # a prompt, with images or parameters where a stage has them
    for what, count, old in (("inputs", inputs_count, old_inputs), ("outputs", outputs_count, old_outputs)):
        if count != old:
            raise RegistrationError(
                f"RegisterInputOutputInfo failed, {what} count {count} not match old count {old}, model '{key}', "
                f"method '{trace.name}'"
            )
    return key


def _find_function(
    registry: Registry,
    trace: MethodTrace,
    stage: object,
    inputs_count: int,
    outputs_count: int,
    batch_size: int | None,
) -> FunctionSpec:
    """The stage's function, checked against its signature and against earlier uses."""
    if isinstance(stage, str):
        if stage not in BUILTIN_FUNCTIONS:
            raise RegistrationError(
                f"Check failed in method '{trace.name}', stage function '{stage}' is unknown, the built-in ones "
                f"are: {', '.join(BUILTIN_FUNCTIONS)}; give your own function as an object, not by name"
            )
        check_int("outputs_count", outputs_count, 1)
        old: FunctionSpec | None = BUILTIN_FUNCTIONS[stage]
        new = FunctionSpec(stage, BUILTIN_FUNCTIONS[stage].function, inputs_count, outputs_count, batched=False)
    elif inspect.isfunction(stage):
        key = f"{registry.name}.{stage.__name__}"
        _check_parameters(stage, inputs_count, batch_size)
        check_int("outputs_count", outputs_count, 1)
        old = registry.functions.get(key)
        new = FunctionSpec(key, stage, inputs_count, outputs_count, batch_size is not None)
    else:
        raise RegistrationError(
            f"Check failed in method '{trace.name}', the parameter 'stage' of add_stage must be function or Model "
            f"returned by declare_model, now is {type(stage)}: wrap the call in a function written with 'def'"
        )
    if old is not None:
        _check_same_use(trace, old, new)
    if inspect.isfunction(stage):
        _check_function(stage, inputs_count, batch_size)
    return new


def _check_same_use(trace: MethodTrace, old: FunctionSpec, new: FunctionSpec) -> None:
    pairs = (("inputs", new.inputs_count, old.inputs_count), ("outputs", new.outputs_count, old.outputs_count))
    for what, count, last in pairs:
        if count != last:
            raise RegistrationError(
                f"Stage function '{new.key}' {what} count {count} not match last registered count {last}, "
                f"method name '{trace.name}'"
            )
    if old.batched != new.batched:
        raise RegistrationError(
            f"Failed to add stage function {new.key}: parameter 'batch_size' in multiple 'add_stage' should be "
            "enabled or disabled consistently"
        )
    if not _same_function(old.function, new.function):
        raise RegistrationError(
            f"Stage function '{new.key}' in method '{trace.name}' is another function than the one of that name "
            "used before: rename one of them, so that each stage function has its own name"
        )


def _same_function(first: Callable[..., Any], second: Callable[..., Any]) -> bool:
    """Whether two functions are the same: also a nested `def` that ran twice and closed over the same objects."""
    if first is second:
        return True
    if first.__code__ is not second.__code__:
        return False
    try:
        kept = [*(first.__defaults__ or ()), *(cell.cell_contents for cell in first.__closure__ or ())]
        other = [*(second.__defaults__ or ()), *(cell.cell_contents for cell in second.__closure__ or ())]
    except ValueError:  # a cell that is still empty
        return False
    return len(kept) == len(other) and all(map(operator.is_, kept, other))


def _check_parameters(function: Callable[..., Any], inputs_count: int, batch_size: int | None) -> None:
    if batch_size is not None:
        check_int("batch_size", batch_size, 0)
        return
    count = len(inspect.signature(function).parameters)
    if count != inputs_count:
        raise RegistrationError(
            f"function {function.__name__} input args count {count} not match the count {inputs_count} registered in "
            "method"
        )


def _check_function(function: Callable[..., Any], inputs_count: int, batch_size: int | None) -> None:
    """What MindSpore Serving did not look at."""
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise RegistrationError(f"function {name} is async, a stage function should be a plain 'def' or a generator")
    if batch_size is None and inspect.isgeneratorfunction(function):
        raise RegistrationError(
            f"function {name} is a generator, which yields one result per instance: set 'batch_size' in add_stage"
        )
    try:
        inspect.signature(function).bind(*range(1 if batch_size is not None else inputs_count))
    except TypeError as error:
        called = "one tuple of instances" if batch_size is not None else "positional inputs"
        raise RegistrationError(f"function {name} cannot be called with {called}: {error}") from error
