"""`y = x1 + x2`, rows of float32 [2, 2], batched: measures the server's own cost."""

from inflight.servable import add_stage, declare_model, register_method

model = declare_model(model_file="add.onnx", model_format="onnx", max_batch_size=32)


@register_method(output_names=["y"])
def predict(x1, x2):
    return add_stage(model, x1, x2, outputs_count=1)
