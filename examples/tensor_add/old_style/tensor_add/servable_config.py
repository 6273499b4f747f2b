"""A servable as it was written for MindSpore Serving: a MindIR file for one pair of [2, 2] tensors."""

import numpy as np

from mindspore_serving.server import register


def to_float32(x1, x2):
    return x1.astype(np.float32), x2.astype(np.float32)


# Every instance is one whole call of the model: its first dimension is no batch.
model = register.declare_model(model_file="tensor_add.mindir", model_format="MindIR", with_batch_dim=False)


@register.register_method(output_names=["y"])
def add_common(x1, x2):
    return register.add_stage(model, x1, x2, outputs_count=1)


@register.register_method(output_names=["y"])
def add_cast(x1, x2):
    x1, x2 = register.add_stage(to_float32, x1, x2, outputs_count=2)
    return register.add_stage(model, x1, x2, outputs_count=1)
