"""The same pipeline as a servable of MindSpore Serving is written."""

import numpy as np

from mindspore_serving.server import register

add_model = register.declare_model(model_file="tensor_add.onnx", model_format="onnx")
sub_model = register.declare_model(model_file="tensor_sub.onnx", model_format="onnx")


def to_float32(instances):
    for x1, x2, x3 in instances:
        yield x1.astype(np.float32), x2.astype(np.float32), x3.astype(np.float32)


@register.register_method(output_names=["y"])
def predict(x1, x2, x3):
    x1, x2, x3 = register.add_stage(to_float32, x1, x2, x3, outputs_count=3, batch_size=0)
    y = register.add_stage(add_model, x1, x2, outputs_count=1)
    return register.add_stage(sub_model, y, x3, outputs_count=1)
