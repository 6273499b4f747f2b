"""Configurations written as MindSpore Serving's public examples are, through the drop-in module."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from inflight import servable
from inflight.servable import load_servable

TENSOR_ADD = """
import numpy as np
from mindspore_serving.server import register

def cast(x1, x2):
    return x1.astype(np.float32), x2.astype(np.float32)

model = register.declare_model(model_file="tensor_add.mindir", model_format="MindIR", with_batch_dim=False)

@register.register_method(output_names=["y"])
def add_common(x1, x2):
    y = register.add_stage(model, x1, x2, outputs_count=1)
    return y

@register.register_method(output_names=["y"])
def add_cast(x1, x2):
    x1, x2 = register.add_stage(cast, x1, x2, outputs_count=2)
    y = register.add_stage(model, x1, x2, outputs_count=1)
    return y
"""
ADD_SUB = """
from mindspore_serving.server import register

add_model = register.declare_model(model_file="tensor_add.mindir", model_format="MindIR", with_batch_dim=False)
sub_model = register.declare_model(model_file="tensor_sub.mindir", model_format="MindIR", with_batch_dim=False)

@register.register_method(output_names=["y"])
def predict(x1, x2, x3):
    y = register.add_stage(add_model, x1, x2, outputs_count=1)
    y = register.add_stage(sub_model, y, x3, outputs_count=1)
    return y
"""
BEFORE_ADD_STAGE = """
import numpy as np
from mindspore_serving.server import register

def halves(x):
    return x / 2, x / 2

def join(instances):
    for total, in instances:
        yield total.astype(np.float64)

register.declare_servable(servable_file="tensor_add.mindir", model_format="MindIR", with_batch_dim=False)

@register.register_method(output_names=["y"])
def double(x):
    x1, x2 = register.call_preprocess(halves, x)
    y = register.call_servable(x1, x2)
    y = register.call_postprocess_pipeline(join, y)
    return y
"""
LENET = """
import numpy as np
from mindspore_serving.server import register

def decode(image):
    return (image.reshape(1, 32, 32) / 255).astype(np.float32)

def best(scores):
    return np.argmax(scores)

context = register.Context(thread_num=1)
context.append_device_info(register.GPUDeviceInfo(precision_mode="fp16"))
net = register.declare_model(model_file="lenet.mindir", model_format="MindIR", context=context)

@register.register_method(output_names=["result"])
def predict(image):
    x = register.add_stage(decode, image, outputs_count=1)
    x = register.add_stage(net, x, outputs_count=1)
    x = register.add_stage(best, x, outputs_count=1)
    return x
"""
RESNET = """
import os
import numpy as np
from mindspore_serving.server import register

here = os.path.dirname(os.path.realpath(__file__))
with open(os.path.join(here, "labels.txt")) as file:
    labels = file.read().split()

def decode_batch(instances):
    for instance in instances:
        yield np.asarray(instance[0], np.float32)

def top1(score):
    return labels[int(np.argmax(score))]

def top5(score):
    order = np.argsort(score)[::-1][:5]
    return ";".join(labels[i] for i in order), score[order]

def whole(instances):
    scores = resnet.call([[image] for image, in decode_batch(instances)])
    return [top1(row[0]) for row in scores]

resnet = register.declare_model(model_file="resnet.mindir", model_format="MindIR")

@register.register_method(output_names=["label"])
def classify_top1(image):
    image = register.add_stage(decode_batch, image, outputs_count=1, batch_size=1024)
    score = register.add_stage(resnet, image, outputs_count=1)
    return register.add_stage(top1, score, outputs_count=1)

@register.register_method(output_names=["label", "score"])
def classify_top5(image):
    image = register.add_stage(decode_batch, image, outputs_count=1, batch_size=1024)
    score = register.add_stage(resnet, image, outputs_count=1)
    label, score = register.add_stage(top5, score, outputs_count=2)
    return label, score

@register.register_method(output_names="label")
def classify_call(image):
    return register.add_stage(whole, image, outputs_count=1, batch_size=32)
"""


@pytest.mark.parametrize(
    ("name", "text", "stages"),
    [
        ("tensor_add", TENSOR_ADD, {"add_common": ["model"], "add_cast": ["function", "model"]}),
        ("add_sub", ADD_SUB, {"predict": ["model", "model"]}),
        ("before_add_stage", BEFORE_ADD_STAGE, {"double": ["function", "model", "function"]}),
        ("lenet", LENET, {"predict": ["function", "model", "function"]}),
        (
            "resnet50",
            RESNET,
            {
                "classify_top1": ["function", "model", "function"],
                "classify_top5": ["function", "model", "function"],
                "classify_call": ["function"],
            },
        ),
    ],
)
def test_configurations_in_the_style_of_the_examples_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, stages: dict[str, list[str]]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / name
    folder.mkdir()
    (folder / "servable_config.py").write_text(text)
    (folder / "labels.txt").write_text("cat dog")
    spec = load_servable(tmp_path, name)
    assert {key: [stage.kind for stage in method.stages] for key, method in spec.methods.items()} == stages
    assert all(model.format == "mindir" for model in spec.models.values())
    if name == "resnet50":
        assert spec.functions["resnet50.top1"].function(np.array([0.1, 0.9])) == "dog"
        assert [stage.batch_size for stage in spec.methods["classify_top5"].stages] == [1024, None, None]


OLD_NAMES = [
    *("declare_model", "Model", "Context", "AscendDeviceInfo", "CPUDeviceInfo", "GPUDeviceInfo"),
    *("register_method", "add_stage", "AclOptions", "GpuOptions", "declare_servable"),
    *("call_preprocess", "call_preprocess_pipeline", "call_servable"),
    *("call_postprocess", "call_postprocess_pipeline"),
    *("model", "method", "stage_function", "utils"),
]


def test_the_drop_in_modules_have_the_old_names() -> None:
    from mindspore_serving.server import register
    from mindspore_serving.server.register import method, model, stage_function, utils

    assert register.declare_model is servable.declare_model
    for name in OLD_NAMES:
        assert hasattr(register, name), name
        assert name in register.__all__
    assert model.Model("key").model_key == "key"
    assert method.add_stage is servable.add_stage
    assert "argmax_cpp" in stage_function.BUILTIN_FUNCTIONS
    with servable.tracing("shown", Path("/shown")):
        assert utils.get_servable_dir() == "shown"
