"""A Python stage and two models in a row: y = (x1 + x2) - x3, whatever numbers come in."""

import numpy as np

from inflight.servable import add_stage, declare_model, register_method

add = declare_model("tensor_add.onnx", "onnx")
sub = declare_model("tensor_sub.onnx", "onnx")


def to_float32(instances):
    """A batch stage: one call for all instances that wait, one result for each."""
    for instance in instances:
        yield tuple(np.asarray(value, np.float32) for value in instance)


@register_method(output_names="y")
def predict(x1, x2, x3):
    x1, x2, x3 = add_stage(to_float32, x1, x2, x3, outputs_count=3, batch_size=0)
    total = add_stage(add, x1, x2, outputs_count=1)
    return add_stage(sub, total, x3, outputs_count=1)


@register_method(output_names=("total", "y"))
def predict_both(x1, x2, x3):
    """Answers the value between the two models as well; takes float32 alone."""
    total = add_stage(add, x1, x2, outputs_count=1)
    return total, add_stage(sub, total, x3, outputs_count=1)
