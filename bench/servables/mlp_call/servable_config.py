"""The perceptron of `bench.models`, which a Python function calls: `Model.call` in place of a stage."""

from inflight.servable import Context, add_stage, declare_model, register_method

model = declare_model(model_file="mlp.onnx", model_format="onnx", max_batch_size=32, context=Context(thread_num=2))


def ask(x):
    return model.call(x)


@register_method(output_names=["y"])
def predict(x):
    return add_stage(ask, x, outputs_count=1)
