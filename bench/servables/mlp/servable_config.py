"""The perceptron of `bench.models` in batches of up to 32, two threads for its one replica."""

from inflight.servable import Context, add_stage, declare_model, register_method

model = declare_model(model_file="mlp.onnx", model_format="onnx", max_batch_size=32, context=Context(thread_num=2))


@register_method(output_names=["y"])
def predict(x):
    return add_stage(model, x, outputs_count=1)
