"""Every text of the registration functions that scripts match, and the values they accept."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight import servable
from inflight.errors import RegistrationError, StartError
from inflight.servable import (
    AclOptions,
    AscendDeviceInfo,
    Context,
    GPUDeviceInfo,
    GpuOptions,
    Registry,
    add_stage,
    allow_formats,
    declare_model,
    load_servable,
    register_method,
    tracing,
)

HEAD = """
from inflight.servable import Model, add_stage, declare_model, register_method
model = declare_model("a.onnx", "onnx")
other = declare_model("b.onnx", "onnx")
def one(x): return x
def two(x, y): return x, y
def batch(instances):
    for instance in instances: yield instance
"""


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    with tracing("add", tmp_path / "add") as traced:
        yield traced


def load_text(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> servable.ServableSpec:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "add"
    folder.mkdir()
    (folder / "servable_config.py").write_text(text)
    return load_servable(tmp_path, "add")


METHOD_ERRORS = [
    (
        "an undefined stage",
        "def f(x): return add_stage(absent, x, outputs_count=1)",
        "name 'absent' is not defined",
    ),
    (
        "a method twice",
        "def f(x): return x\n@register_method('y')\ndef f(x): return x",
        "Method f has been registered more than once.",
    ),
    ("**kwargs", "def f(**kw): return kw", "'f' input kw cannot be VAR_KEYWORD !"),
    ("*args", "def f(*xs): return xs", "'f' input xs cannot be VAR_POSITIONAL !"),
    ("keyword only", "def f(x, *, k): return x", "'f' input k cannot be KEYWORD_ONLY !"),
    (
        "a stage input that is data",
        "def f(x): return add_stage(two, x, 1, outputs_count=1)",
        "Each value of parameter *args is a placeholder for data and must come from the method inputs",
    ),
    (
        "a returned constant",
        "def f(x): return 3",
        "Each value returned is a placeholder for data and must come from the method inputs",
    ),
    ("nothing returned", "def f(x): add_stage(one, x, outputs_count=1)", "Each value returned is a placeholder"),
    (
        "two outputs for one name",
        "def f(x): return add_stage(two, x, x, outputs_count=2)",
        "Method return output size 2 not match registered 1",
    ),
    (
        "a function with other parameters",
        "def f(x): return add_stage(lambda a, b, c: a, x, x, outputs_count=1)",
        "function <lambda> input args count 3 not match the count 2 registered in method",
    ),
    (
        "counts of outputs differ between uses",
        "def f(x):\n  add_stage(one, x, outputs_count=2)\n  return add_stage(one, x, outputs_count=1)",
        "'add.one' outputs count 1 not match last registered count 2",
    ),
    (
        "counts of inputs differ between uses",
        "def f(x):\n  add_stage(batch, x, x, outputs_count=1, batch_size=2)\n"
        "  return add_stage(batch, x, x, x, outputs_count=1, batch_size=2)",
        "'add.batch' inputs count 3 not match last registered count 2",
    ),
    (
        "batch_size once and not again",
        "def f(x):\n  add_stage(one, x, outputs_count=1, batch_size=1)\n  return add_stage(one, x, outputs_count=1)",
        "parameter 'batch_size' in multiple 'add_stage' should be enabled or disabled consistently",
    ),
    (
        "model inputs differ between uses",
        "def f(x):\n  add_stage(model, x, x, outputs_count=1)\n  return add_stage(model, x, outputs_count=1)",
        "RegisterInputOutputInfo failed, inputs count 1 not match old count 2",
    ),
    (
        "model outputs differ between uses",
        "def f(x):\n  add_stage(model, x, outputs_count=2)\n  return add_stage(model, x, outputs_count=1)",
        "RegisterInputOutputInfo failed, outputs count 1 not match old count 2",
    ),
    (
        "unpacking more than two",
        "def f(x):\n  a, b = add_stage(model, x, outputs_count=3)\n  return a",
        "too many values to unpack (expected 2",
    ),
    (
        "unpacking one",
        "def f(x):\n  a, b = add_stage(model, x, outputs_count=1)\n  return a",
        "cannot unpack non-iterable _TensorDef object",
    ),
    (
        "a Model of an undeclared key",
        "def f(x): return add_stage(Model('c.onnx'), x, outputs_count=1)",
        "the parameter 'stage' of add_stage must be function or Model returned by declare_model",
    ),
    (
        "a builtin as stage",
        "def f(x): return add_stage(len, x, outputs_count=1)",
        "now is <class 'builtin_function",
    ),
    ("an unknown text as stage", "def f(x): return add_stage('softmax', x, outputs_count=1)", "argmax_cpp"),
    (
        "argmax of two arrays",
        "def f(x): return add_stage('argmax_cpp', x, x, outputs_count=1)",
        "'argmax_cpp' inputs count 2 not match last registered count 1",
    ),
    ("no outputs_count", "def f(x): return add_stage(one, x)", "outputs_count"),
    (
        "outputs_count a text",
        "def f(x): return add_stage(one, x, outputs_count='1')",
        "Parameter 'outputs_count' should be int, but actually <class 'str'>",
    ),
    (
        "outputs_count 0",
        "def f(x): return add_stage(one, x, outputs_count=0)",
        "Parameter 'outputs_count' should be >= 1",
    ),
    (
        "batch_size negative",
        "def f(x): return add_stage(batch, x, outputs_count=1, batch_size=-1)",
        "Parameter 'batch_size' should be >= 0",
    ),
    (
        "tag no text",
        "def f(x): return add_stage(one, x, outputs_count=1, tag=3)",
        "Parameter 'tag' should be str, but actually <class 'int'>",
    ),
    ("tag empty", "def f(x): return add_stage(one, x, outputs_count=1, tag='')", "'tag' should not be empty str"),
    (
        "a condition on data",
        "def f(x):\n  if x: return x\n  return add_stage(one, x, outputs_count=1)",
        "Move the condition on data into a function",
    ),
    ("an async method", "async def f(x): return x", "Method 'f' cannot be async or a generator"),
    ("a generator method", "def f(x): yield x", "Method 'f' cannot be async or a generator"),
    (
        "a generator without batch_size",
        "def f(x): return add_stage(batch, x, outputs_count=1)",
        "set 'batch_size' in add_stage",
    ),
    (
        "a batch function of two arguments",
        "def f(x): return add_stage(two, x, x, outputs_count=1, batch_size=4)",
        "function two cannot be called with one tuple of instances",
    ),
    (
        "an async stage",
        "def f(x):\n  async def late(v): return v\n  return add_stage(late, x, outputs_count=1)",
        "function late is async",
    ),
    (
        "two functions of one name",
        "def f(x):\n  y = add_stage(lambda a: a, x, outputs_count=1)\n"
        "  return add_stage(lambda a: a + 1, y, outputs_count=1)",
        "rename one of them",
    ),
]


@pytest.mark.parametrize(("body", "text"), [case[1:] for case in METHOD_ERRORS], ids=[c[0] for c in METHOD_ERRORS])
def test_a_wrong_method_fails_the_start_with_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, text: str
) -> None:
    source = f"{HEAD}\n@register_method('y')\n{body}\n"
    with pytest.raises(StartError) as failure:
        load_text(tmp_path, source, monkeypatch)
    assert str(failure.value).startswith("import add.servable_config failed, ")
    assert text in str(failure.value)


TWO_FAULTS = [
    ("a method twice, wrong", "def f(x): return x\n@register_method('y')\ndef f(x): return 3", "Each value returned"),
    (
        "a method twice, with other outputs",
        "def f(x): return x\n@register_method('y')\ndef f(x): return x, x",
        "Method return output size 2 not match registered 1",
    ),
    ("a method twice", "def f(x): return x\n@register_method('y')\ndef f(x): return x", "registered more than once"),
    (
        "a tag and an argument",
        "def f(x): return add_stage(one, 3, outputs_count=0, tag=5)",
        "Parameter 'tag' should be",
    ),
    ("an argument and sizes", "def f(x): return add_stage(one, 3, outputs_count=0, batch_size='a')", "Each value of"),
    ("a stage and counts", "def f(x): return add_stage(3, x, outputs_count=0, batch_size='a')", "now is <class 'int'>"),
    (
        "a model's name and counts",
        "def f(x): return add_stage(Model('c'), x, outputs_count=0)",
        "returned by declare_model",
    ),
    ("parameters and counts", "def f(x): return add_stage(two, x, outputs_count=0)", "function two input args count 2"),
    (
        "batch_size and outputs",
        "def f(x): return add_stage(batch, x, outputs_count=0, batch_size=-1)",
        "'batch_size' should",
    ),
    (
        "counts and batch_size of a second use",
        "def f(x):\n  y = add_stage(batch, x, outputs_count=1, batch_size=2)\n"
        "  return add_stage(batch, x, outputs_count=2)",
        "outputs count 2 not match last registered count 1",
    ),
    (
        "a generator that was used with a batch",
        "def f(x):\n  y = add_stage(batch, x, outputs_count=1, batch_size=2)\n"
        "  return add_stage(batch, x, outputs_count=1)",
        "should be enabled or disabled consistently",
    ),
    (
        "a batch_size that a model does not have",
        "def f(x): return add_stage(model, x, outputs_count=1, batch_size='a')",
        None,
    ),
]
"""Methods with more than one fault: the one that MindSpore Serving told."""


@pytest.mark.parametrize(("body", "text"), [case[1:] for case in TWO_FAULTS], ids=[c[0] for c in TWO_FAULTS])
def test_the_first_fault_is_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, text: str | None
) -> None:
    source = f"{HEAD}\n@register_method('y')\n{body}\n"
    if text is None:
        assert load_text(tmp_path, source, monkeypatch).methods
        return
    with pytest.raises(StartError) as failure:
        load_text(tmp_path, source, monkeypatch)
    assert text in str(failure.value)


def test_the_first_fault_of_a_declaration_is_the_peers(registry: Registry) -> None:
    declare_model("used.onnx", "onnx")
    wrong: dict[str, Any] = {
        "with_batch_dim": 1,
        "model_file": 3,
        "without_batch_dim_inputs": "a",
        "model_format": 3,
        "context": 3,
        "config_file": 3,
    }
    right: dict[str, Any] = {"model_file": "used.onnx", "model_format": "onnx"}
    for name in list(wrong):
        with pytest.raises(RegistrationError, match=f"Parameter '{name}'"):
            declare_model(**{**right, **wrong})
        del wrong[name]
    with pytest.raises(RegistrationError, match="has already been used"):
        declare_model(**right)


DECLARE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"model_file": 3}, "Parameter 'model_file' should be str or tuple/list of str, but actually <class 'int'>"),
    ({"model_file": ""}, "The item of parameter 'model_file' should not be empty str"),
    ({"model_file": ()}, "Parameter 'model_file' should not be empty"),
    ({"model_file": ("a", 3)}, "The item of parameter 'model_file' should be str, but actually <class 'int'>"),
    ({"model_file": ["a", "a"]}, "The item value 'a' in parameter 'model_file' should not be repeated"),
    ({"model_format": 3}, "Parameter 'model_format' should be str, but actually <class 'int'>"),
    ({"model_format": ""}, "Parameter 'model_format' should not be empty str"),
    ({"model_format": "OM"}, "model format 'OM' is not supported"),
    ({"model_format": "pickle"}, "it can only be one of onnx, torch, callable, mindir, mindir_lite"),
    ({"with_batch_dim": 1}, "Parameter 'with_batch_dim' should be bool, but actually <class 'int'>"),
    (
        {"without_batch_dim_inputs": "0"},
        "Parameter 'without_batch_dim_inputs' should be int or tuple/list of int, but actually <class 'str'>",
    ),
    (
        {"without_batch_dim_inputs": -1},
        "The item value '-1' in parameter 'without_batch_dim_inputs' should be >= 0",
    ),
    (
        {"without_batch_dim_inputs": (1, 1)},
        "The item value '1' in parameter 'without_batch_dim_inputs' should not",
    ),
    ({"without_batch_dim_inputs": True}, "'without_batch_dim_inputs' should be int, but actually <class 'bool'>"),
    ({"options": 3}, "Parameter 'options' should be None, GpuOptions or AclOptions, but actually <class 'int'>"),
    ({"context": 3}, "Parameter 'context' should be Context, but actually <class 'int'>"),
    ({"config_file": 3}, "Parameter 'config_file' should be str, but actually <class 'int'>"),
    ({"config_file": ""}, "Parameter 'config_file' should not be empty str"),
    ({"max_batch_size": 0}, "Parameter 'max_batch_size' should be >= 1"),
    ({"model_file": "here", "model_format": "callable"}, "'<package.module>:<attribute>'"),
    (
        {"model_file": "numpy:absent", "model_format": "callable"},
        "callable model 'numpy:absent' cannot be imported",
    ),
    ({"model_file": "numpy:pi", "model_format": "callable"}, "should be callable, but actually <class 'float'>"),
    ({"model_file": np.add, "model_format": "onnx"}, "leave model_format out"),
]


@pytest.mark.parametrize(("change", "text"), DECLARE_ERRORS)
def test_a_wrong_declaration_says_what_is_wrong(registry: Registry, change: dict[str, Any], text: str) -> None:
    with pytest.raises(RegistrationError) as failure:
        declare_model(**{"model_file": "a.onnx", "model_format": "onnx", **change})
    assert text in str(failure.value)
    assert registry.models == {}


@pytest.mark.parametrize("again", ["a.onnx", ("c.onnx", "a.onnx"), ("a.onnx", "b.onnx")])
def test_a_file_belongs_to_one_declaration(registry: Registry, again: Any) -> None:
    declare_model(("a.onnx", "b.onnx"), "onnx")
    with pytest.raises(RuntimeError, match=r"model file 'a\.onnx' has already been used"):
        declare_model(again, "onnx")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, None),
        ("ONNX", "onnx"),
        ("MindIR", "mindir"),
        ("MindIR_Lite", "mindir_lite"),
        ("mindir_opt", "mindir_lite"),
    ],
)
def test_formats_are_stored_in_one_spelling(registry: Registry, given: str | None, stored: str | None) -> None:
    model = declare_model("a.x", given)
    assert registry.models[model.model_key].format == stored


def test_a_plugins_format_is_known_once_allowed(registry: Registry) -> None:
    allow_formats(("ONNX", "TensorRT"))
    try:
        declare_model("a.plan", "tensorrt")
        with pytest.raises(RegistrationError, match="one of onnx, torch, callable, mindir, mindir_lite, tensorrt,"):
            declare_model("b", "pickle")
    finally:
        allow_formats(())
    with pytest.raises(RegistrationError, match="'tensorrt' is unknown"):
        declare_model("b.plan", "tensorrt")


def test_a_model_keeps_everything_it_was_declared_with(registry: Registry) -> None:
    context = Context(thread_num=2, thread_affinity_core_list=[1, 2], enable_parallel=True)
    context.append_device_info(GPUDeviceInfo(precision_mode="fp16"))
    context.append_device_info(AscendDeviceInfo(input_format="NCHW"))
    model = declare_model(
        ["a.onnx", "b.onnx"],
        "onnx",
        False,
        AclOptions(input_format="ND"),
        (0, 2),
        context,
        "mix.cfg",
        max_batch_size=8,
    )
    spec = registry.models["a.onnx;b.onnx"]
    assert model.model_key == spec.key == "a.onnx;b.onnx"
    assert spec.files == ("a.onnx", "b.onnx")
    assert (spec.with_batch_dim, spec.without_batch_dim_inputs, spec.max_batch_size) == (False, (0, 2), 8)
    assert (spec.thread_num, spec.config_file, spec.target) == (2, "mix.cfg", None)
    assert spec.device_options["gpu"].options == {"precision_mode": "fp16"}
    assert spec.device_options["ascend"].options == {"input_format": "NCHW"}


def test_options_count_where_no_context_is_given(registry: Registry) -> None:
    declare_model("a.mindir", "MindIR", options=GpuOptions(precision_mode="fp16"))
    assert registry.models["a.mindir"].device_options["gpu"].options == {"precision_mode": "fp16"}


def test_a_bare_zero_is_dropped_with_a_warning(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "inflight"):
        declare_model("a.onnx", without_batch_dim_inputs=0)
        declare_model("b.onnx", without_batch_dim_inputs=1)
    assert registry.models["a.onnx"].without_batch_dim_inputs == ()
    assert registry.models["b.onnx"].without_batch_dim_inputs == (1,)
    assert "(0,)" in caplog.text


def test_callables_are_models(registry: Registry) -> None:
    def scale(x: Any) -> Any:
        return x * 2

    for model, key, target in [
        (declare_model(scale), "scale", scale),
        (declare_model(np.add, "callable"), "add", np.add),
        (declare_model("numpy:linalg.norm", "Callable"), "numpy:linalg.norm", np.linalg.norm),
    ]:
        assert model.model_key == key
        spec = registry.models[key]
        assert (spec.target, spec.files, spec.format) == (target, (), "callable")
    with pytest.raises(RegistrationError, match="'scale' has already been declared"):
        declare_model(scale)


OPTION_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"output_names": 3},
        "Parameter 'output_names' should be str or tuple/list of str, but actually <class 'int'>",
    ),
    ({"output_names": ""}, "The item of parameter 'output_names' should not be empty str"),
    ({"output_names": ["y", "y"]}, "The item value 'y' in parameter 'output_names' should not be repeated"),
    ({"output_names": ()}, "Parameter 'output_names' should not be empty"),
    ({"max_wait_ms": -1}, "Parameter 'max_wait_ms' should be >= 0"),
    ({"max_wait_ms": float("nan")}, "Parameter 'max_wait_ms' should be >= 0"),
    ({"max_wait_ms": "5"}, "Parameter 'max_wait_ms' should be int or float, but actually <class 'str'>"),
    ({"queue_size": 0}, "Parameter 'queue_size' should be >= 1"),
    ({"queue_size": 1.5}, "Parameter 'queue_size' should be int, but actually <class 'float'>"),
    ({"priority": "high"}, "Parameter 'priority' should be int, but actually <class 'str'>"),
    ({"timeout": 0}, "Parameter 'timeout' should be > 0"),
    ({"timeout": float("inf")}, "Parameter 'timeout' should be > 0 and finite"),
    ({"timeout": True}, "Parameter 'timeout' should be int or float, but actually <class 'bool'>"),
]


@pytest.mark.parametrize(("change", "text"), OPTION_ERRORS)
def test_wrong_method_options_say_what_is_wrong(registry: Registry, change: dict[str, Any], text: str) -> None:
    with pytest.raises(RegistrationError) as failure:
        register_method(**{"output_names": "y", **change})
    assert text in str(failure.value)


def test_method_options_arrive(registry: Registry) -> None:
    @register_method(("a", "b"), max_wait_ms=2, queue_size=100, priority=-1, timeout=0.5)
    def swap(x: Any, y: Any) -> Any:
        return y, x

    method = registry.methods["swap"]
    assert (method.max_wait_ms, method.queue_size, method.priority, method.timeout) == (2.0, 100, -1, 0.5)
    assert swap(1, 2) == (2, 1), "the function itself is returned"


def test_declaring_outside_of_a_servable_config_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"only be declared while a servable_config\.py is imported"):
        declare_model("a.onnx")
    with pytest.raises(RuntimeError, match=r"servable_config\.py"):
        register_method("y")(lambda x: x)


def test_add_stage_outside_of_a_method_is_refused(registry: Registry) -> None:
    with pytest.raises(RuntimeError, match="'add_stage' can only be called in the body"):
        add_stage(lambda x: x, outputs_count=1)


def test_the_door_exports_what_exists() -> None:
    assert sorted(set(servable.__all__)) == sorted(servable.__all__)
    assert all(hasattr(servable, name) for name in servable.__all__)
