"""y = -(x @ w) on two ranks. Each has half of the rows of w, and they add up their products while they run."""

from mindspore_serving.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1, with_batch_dim=False)


@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
