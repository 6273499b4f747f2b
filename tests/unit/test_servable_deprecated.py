"""The helpers of before add_stage: they still work, warn in the log, and fail with the old texts."""
# ruff: noqa: RET504 - the helpers count the names that their result is assigned to

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from inflight.errors import RegistrationError
from inflight.servable import (
    Ref,
    Registry,
    add_stage,
    call_postprocess,
    call_postprocess_pipeline,
    call_preprocess,
    call_preprocess_pipeline,
    call_servable,
    declare_servable,
    register_method,
    tracing,
)


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    with tracing("old", tmp_path / "old") as traced:
        yield traced


@pytest.fixture
def model(registry: Registry) -> Any:
    return declare_servable(servable_file="m.mindir", model_format="MindIR", with_batch_dim=False)


def two(x: Any, y: Any) -> Any:
    return x, y


def pair(instances: Any) -> Any:
    yield from instances


def test_the_three_helpers_make_three_stages(registry: Registry, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "inflight")

    @register_method(output_names=["a", "b"])
    def predict(x: Any, y: Any) -> Any:
        """A docstring is no statement."""
        x, y = call_preprocess(two, x, y)
        z = call_servable(x, y)
        kept = z
        [a, b] = call_postprocess(two, kept, y)
        return a, b

    method = registry.methods["predict"]
    assert [(stage.key, stage.inputs, stage.outputs_count, stage.tag) for stage in method.stages] == [
        ("old.two", (Ref(0, 0), Ref(0, 1)), 2, "Preprocess"),
        ("m.mindir", (Ref(1, 0), Ref(1, 1)), 1, "Model 'm.mindir'"),
        ("old.two", (Ref(2, 0), Ref(1, 1)), 2, "Postprocess"),
    ]
    assert [stage.batch_size for stage in method.stages] == [None, None, None]
    assert not registry.models["m.mindir"].with_batch_dim
    for helper in ("call_preprocess", "call_servable", "call_postprocess"):
        assert f"'{helper}' is deprecated" in caplog.text


def test_pipeline_helpers_take_batches(registry: Registry, model: Any) -> None:
    @register_method("y")
    def predict(x: Any) -> Any:
        x = call_preprocess_pipeline(pair, x)
        y = call_servable(x)
        y = call_postprocess_pipeline(pair, y)
        return y

    stages = registry.methods["predict"].stages
    assert [stage.batch_size for stage in stages] == [0, None, 0]
    assert [stage.tag for stage in stages] == ["Preprocess", "Model 'm.mindir'", "Postprocess"]


def refuse(function: Any, text: str) -> None:
    with pytest.raises(RegistrationError) as failure:
        register_method("y")(function)
    assert text in str(failure.value)


def test_call_servable_needs_exactly_one_model(registry: Registry) -> None:
    def predict(x: Any) -> Any:
        y = call_servable(x)
        return y

    refuse(predict, "There is no model declared, you can use declare_model to declare models")
    declare_servable("a.mindir", "MindIR")
    register_method("y")(predict)
    registry.methods.clear()
    declare_servable("b.mindir", "MindIR")
    refuse(
        predict,
        "There are more than one servable declared when the interface 'call_servable' is used, "
        "use 'add_stage' to replace 'call_servable'",
    )


def test_call_servable_may_not_be_missing(model: Any) -> None:
    def predict(x: Any, y: Any) -> Any:
        x, y = call_preprocess(two, x, y)
        return x

    refuse(predict, "Not find the invoke of 'call_servable'")


def test_each_helper_comes_once(model: Any) -> None:
    def preprocess(x: Any) -> Any:
        x = call_preprocess_pipeline(pair, x)
        x = call_preprocess(pair, x)
        y = call_servable(x)
        return y

    refuse(preprocess, "call_preprocess or call_preprocess_pipeline should not be invoked more than once")

    def servable(x: Any) -> Any:
        x = call_servable(x)
        y = call_servable(x)
        return y

    refuse(servable, "call_servable should not be invoked more than once")

    def postprocess(x: Any) -> Any:
        x = call_servable(x)
        x = call_postprocess_pipeline(pair, x)
        y = call_postprocess_pipeline(pair, x)
        return y

    refuse(postprocess, "call_postprocess or call_postprocess_pipeline should not be invoked more than once")


def test_the_helpers_come_in_order(model: Any) -> None:
    def late_preprocess(x: Any) -> Any:
        x = call_servable(x)
        y = call_preprocess(pair, x)
        return y

    refuse(late_preprocess, "call_servable should be invoked after call_preprocess")

    def late_pipeline(x: Any) -> Any:
        x = call_servable(x)
        y = call_preprocess_pipeline(pair, x)
        return y

    refuse(late_pipeline, "call_servable should be invoked after call_preprocess_pipeline")

    def early_postprocess(x: Any) -> Any:
        x = call_postprocess_pipeline(pair, x)
        x = call_preprocess_pipeline(pair, x)
        y = call_servable(x)
        return y

    refuse(
        early_postprocess,
        "call_postprocess or call_postprocess_pipeline should be invoked after call_preprocess_pipeline",
    )

    def late_servable(x: Any) -> Any:
        x = call_postprocess_pipeline(pair, x)
        y = call_servable(x)
        return y

    refuse(late_servable, "call_postprocess or call_postprocess_pipeline should be invoked after call_servable")


def complex_text(name: str) -> str:
    return (
        "complex statements such as conditions and loops are not supported in register_method when the interface "
        f"'{name}' is used, use 'add_stage' to replace '{name}'"
    )


def test_methods_with_helpers_are_plain_assignments(model: Any) -> None:
    def loop(x: Any) -> Any:
        for _ in range(1):
            pass
        y = call_servable(x)
        return y

    refuse(loop, complex_text("call_servable"))

    def condition(x: Any) -> Any:
        if x is not None:
            y = call_servable(x)
        return y

    refuse(condition, complex_text("call_servable"))

    def returned(x: Any) -> Any:
        return call_servable(x)

    refuse(returned, complex_text("call_servable"))

    def mixed(x: Any) -> Any:
        x = add_stage(pair, x, outputs_count=1, batch_size=1)
        x = call_preprocess_pipeline(pair, x)
        y = call_servable(x)
        return y

    refuse(mixed, complex_text("call_preprocess_pipeline;call_servable"))

    def hidden(x: Any) -> Any:
        y = call_servable(x)
        return add_stage(pair, y, outputs_count=1, batch_size=1)

    refuse(hidden, complex_text("call_servable"))

    def after(x: Any) -> Any:
        z = [add_stage(pair, x, outputs_count=1, batch_size=1)]
        y = call_servable(z[0])
        return y

    refuse(after, complex_text("call_servable"))

    def skipped(x: Any) -> Any:
        stop = [0, 1]
        stop[0] = stop[1]
        return call_postprocess_pipeline(pair, x)

    refuse(skipped, complex_text("call_postprocess_pipeline"))


def test_helpers_need_inputs(model: Any) -> None:
    def predict(x: Any) -> Any:
        y = call_servable()
        return y

    refuse(predict, "Invalid 'call_servable' invoke args")


def test_helpers_need_readable_source(model: Any) -> None:
    names: dict[str, Any] = {"call_servable": call_servable}
    exec("def predict(x):\n    y = call_servable(x)\n    return y", names)
    refuse(names["predict"], "its source is not available")


def test_source_with_text_at_the_margin_is_read(registry: Registry, model: Any) -> None:
    @register_method("y")
    def predict(x: Any) -> Any:
        """
Text without indentation.
"""  # fmt: skip
        y = call_servable(x)
        return y

    assert len(registry.methods["predict"].stages) == 1


def test_helpers_belong_into_a_method(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="'call_servable' can only be called in the body"):
        call_servable()
