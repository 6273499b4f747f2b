"""What tracing records: where each stage's inputs come from, in every shape a method's body may have."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.errors import InvalidRequest, RegistrationError
from inflight.servable import (
    BUILTIN_FUNCTIONS,
    FunctionSpec,
    MethodSpec,
    Ref,
    Registry,
    ServableSpec,
    add_stage,
    check_model_counts,
    declare_model,
    register_method,
    tracing,
)


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    with tracing("flow", tmp_path / "flow") as traced:
        yield traced


def one(x: Any) -> Any:
    return x


def two(x: Any, y: Any) -> Any:
    return x, y


def batch(instances: Any) -> Any:
    yield from instances


def wiring(method: MethodSpec) -> list[tuple[str, tuple[Ref, ...]]]:
    return [(stage.key, stage.inputs) for stage in method.stages]


def test_models_and_functions_in_any_order(registry: Registry) -> None:
    add = declare_model("add.onnx", "onnx")
    sub = declare_model("sub.onnx", "onnx")

    @register_method(["y", "z"])
    def predict(a: Any, b: Any, c: Any) -> Any:
        a, b = add_stage(two, a, b, outputs_count=2, tag="Cast")
        total = add_stage(add, a, b, outputs_count=1)
        rest = add_stage(sub, total, c, outputs_count=1)
        again = add_stage(add, rest, total, outputs_count=1)
        return add_stage(one, again, outputs_count=1), c

    method = registry.methods["predict"]
    assert (method.inputs, method.outputs) == (("a", "b", "c"), ("y", "z"))
    assert wiring(method) == [
        ("flow.two", (Ref(0, 0), Ref(0, 1))),
        ("add.onnx", (Ref(1, 0), Ref(1, 1))),
        ("sub.onnx", (Ref(2, 0), Ref(0, 2))),
        ("add.onnx", (Ref(3, 0), Ref(2, 0))),
        ("flow.one", (Ref(4, 0),)),
    ]
    assert method.returns == (Ref(5, 0), Ref(0, 2))
    assert [stage.index for stage in method.stages] == [1, 2, 3, 4, 5]
    assert [stage.kind for stage in method.stages] == ["function", "model", "model", "model", "function"]
    assert [stage.tag for stage in method.stages] == [
        "Cast",
        "Model 'add.onnx'",
        "Model 'sub.onnx'",
        "Model 'add.onnx'",
        "Function 'flow.one'",
    ]
    assert method.has_function_stage
    assert registry.functions["flow.two"] == FunctionSpec("flow.two", two, 2, 2, batched=False)


def test_batch_sizes_reach_functions_only(registry: Registry) -> None:
    model = declare_model("m.onnx")

    @register_method("y")
    def predict(x: Any) -> Any:
        x = add_stage(batch, x, outputs_count=1, batch_size=0)
        x = add_stage(batch, x, outputs_count=1, batch_size=16)
        x = add_stage(model, x, outputs_count=1, batch_size=4)
        x = add_stage(one, x, outputs_count=1)
        return add_stage("argmax_cpp", x, outputs_count=1, batch_size=4)

    stages = registry.methods["predict"].stages
    assert [stage.batch_size for stage in stages] == [0, 16, None, None, None]
    assert registry.functions["flow.batch"].batched
    assert (stages[-1].key, stages[-1].tag) == ("argmax_cpp", "Function 'argmax_cpp'")
    assert registry.functions["argmax_cpp"].inputs_count == 1


def test_control_flow_of_the_body_runs_at_registration(registry: Registry) -> None:
    depth = 3

    @register_method("y")
    def predict(x: Any, flag: Any = None) -> Any:
        for _ in range(depth):
            x = add_stage(one, x, outputs_count=1)
        if depth > 5 or flag is None:
            return flag
        try:
            values = [add_stage(one, value, outputs_count=1) for value in (x, flag)]
        finally:
            depth.bit_length()
        return tuple(values[1:])

    method = registry.methods["predict"]
    assert [stage.inputs for stage in method.stages] == [
        (Ref(0, 0),),
        (Ref(1, 0),),
        (Ref(2, 0),),
        (Ref(3, 0),),
        (Ref(0, 1),),
    ]
    assert method.returns == (Ref(5, 0),), "a placeholder, not the default, was given for 'flag'"


def test_inputs_may_be_returned_without_any_stage(registry: Registry) -> None:
    @register_method(("a", "b"))
    def swap(x: Any, y: Any) -> Any:
        return [y, x]

    method = registry.methods["swap"]
    assert (method.stages, method.returns) == ((), (Ref(0, 1), Ref(0, 0)))
    assert not method.has_function_stage


def test_several_methods_share_models_and_functions(registry: Registry) -> None:
    model = declare_model("m.onnx")

    def shared(x: Any) -> Any:
        def inner(value: Any) -> Any:
            return value

        return add_stage(inner, add_stage(one, x, outputs_count=1), outputs_count=1)

    @register_method("y")
    def first(x: Any) -> Any:
        return add_stage(model, shared(x), outputs_count=1)

    @register_method("y")
    def second(x: Any) -> Any:
        return add_stage(model, shared(first(x)), outputs_count=1)

    assert list(registry.methods) == ["first", "second"]
    assert list(registry.functions) == ["flow.one", "flow.inner"]
    assert len(registry.methods["second"].stages) == 6, "a method called in a body adds its stages there"


def test_nested_functions_that_differ_need_names(registry: Registry) -> None:
    def scaled(x: Any, factor: float) -> Any:
        def scale(value: Any) -> Any:
            return value * factor

        return add_stage(scale, x, outputs_count=1)

    with pytest.raises(RegistrationError, match=r"'flow\.scale' .* rename one of them"):

        @register_method("y")
        def predict(x: Any) -> Any:
            return scaled(scaled(x, 2.0), 3.0)


def test_a_placeholder_of_another_method_is_refused(registry: Registry) -> None:
    kept: list[Any] = []

    @register_method("y")
    def first(x: Any) -> Any:
        kept.append(x)
        return x

    with pytest.raises(RegistrationError, match="Each value of parameter"):

        @register_method("y")
        def second(x: Any) -> Any:
            return add_stage(one, kept[0], outputs_count=1)

    with pytest.raises(RegistrationError, match="Each value returned"):

        @register_method("y")
        def third(x: Any) -> Any:
            return kept[0]


def test_a_failed_method_leaves_nothing_open(registry: Registry) -> None:
    with pytest.raises(ZeroDivisionError):

        @register_method("y")
        def broken(x: Any) -> Any:
            return 1 // 0

    assert registry.methods == {}
    with pytest.raises(RegistrationError, match="'add_stage' can only be called in the body"):
        add_stage(one, outputs_count=1)


def test_wrapped_functions_keep_their_own_parameters(registry: Registry) -> None:
    @functools.wraps(two)
    def logged(*args: Any) -> Any:
        return two(*args)

    @register_method(("a", "b"))
    def predict(x: Any, y: Any) -> Any:
        return add_stage(logged, x, y, outputs_count=2)

    assert registry.functions["flow.two"].function is logged


def test_add_stage_methods_need_no_source(registry: Registry) -> None:
    names: dict[str, Any] = {"add_stage": add_stage, "one": one, "register_method": register_method}
    exec("@register_method('y')\ndef predict(x):\n    return add_stage(one, x, outputs_count=1)", names)
    register_method("y")(lambda x: x)
    assert list(registry.methods) == ["predict", "<lambda>"]


def test_threads_trace_without_seeing_each_other(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=10)
    specs: dict[str, ServableSpec] = {}

    def trace(name: str, depth: int) -> None:
        with tracing(name, tmp_path / name) as mine:
            model = declare_model(f"{name}.onnx")
            barrier.wait()

            @register_method("y")
            def predict(x: Any) -> Any:
                for _ in range(depth):
                    barrier.wait()
                    x = add_stage(one, x, outputs_count=1)
                return add_stage(model, x, outputs_count=1)

            specs[name] = mine.spec()

    threads = [threading.Thread(target=trace, args=(name, 20)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name in ("left", "right"):
        spec = specs[name]
        assert list(spec.models) == [f"{name}.onnx"]
        keys = [stage.key for stage in spec.methods["predict"].stages]
        assert keys == [f"{name}.one"] * 20 + [f"{name}.onnx"]


def test_model_counts_are_compared_with_the_loaded_model(registry: Registry) -> None:
    model = declare_model("m.onnx")

    @register_method("y")
    def predict(a: Any, b: Any, c: Any) -> Any:
        return add_stage(one, add_stage(model, a, b, c, outputs_count=1), outputs_count=1)

    spec = registry.spec()
    check_model_counts(spec, "m.onnx", 3, 1)
    check_model_counts(spec, "unused.onnx", 7, 7)
    with pytest.raises(
        RegistrationError,
        match="The inputs count 3 in register_method not equal to the count 2 defined in model",
    ):
        check_model_counts(spec, "m.onnx", 2, 1)
    with pytest.raises(
        RegistrationError,
        match="The outputs count 1 in register_method not equal to the count 2 defined in model",
    ):
        check_model_counts(spec, "m.onnx", 3, 2)


def test_a_spec_is_a_snapshot(registry: Registry) -> None:
    declare_model("a.onnx")
    spec = registry.spec()
    declare_model("b.onnx")
    assert list(spec.models) == ["a.onnx"]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32", "float64"])
def test_argmax_is_over_the_flattened_array(dtype: str) -> None:
    argmax = BUILTIN_FUNCTIONS["argmax_cpp"].function
    result = argmax(np.array([[1, 2, 3], [9, 9, 0]], dtype))
    assert (result.shape, result.dtype, int(result)) == ((), np.int64, 3)


@pytest.mark.parametrize("value", [np.zeros(2, np.float16), np.zeros(2, bool), "text", np.zeros(0, np.float32)])
def test_argmax_refuses_what_it_cannot_order(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="argmax_cpp"):
        BUILTIN_FUNCTIONS["argmax_cpp"].function(value)
