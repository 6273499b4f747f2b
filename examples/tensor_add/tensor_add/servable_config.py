"""Two ways to add two [2, 2] tensors: as they come, or after a Python stage that turns them into float32."""

import numpy as np

from inflight.servable import add_stage, declare_model, register_method

# The file's batch dimension is open, so requests that wait together are run together, up to 32 instances.
add = declare_model("tensor_add.onnx", "onnx", max_batch_size=32)


def to_float32(x1, x2):
    return x1.astype(np.float32), x2.astype(np.float32)


@register_method(output_names="y")
def add_common(x1, x2):
    return add_stage(add, x1, x2, outputs_count=1)


@register_method(output_names="y")
def add_cast(x1, x2):
    x1, x2 = add_stage(to_float32, x1, x2, outputs_count=2)
    return add_stage(add, x1, x2, outputs_count=1)
