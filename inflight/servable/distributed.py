"""`distributed.declare_servable`: a model whose parts run on the ranks of a group."""

from __future__ import annotations

from inflight.errors import RegistrationError
from inflight.servable.checks import check_bool, check_int
from inflight.servable.declare import check_unbatched
from inflight.servable.model import Model
from inflight.servable.spec import ModelSpec, Ranks
from inflight.servable.trace import current_registry


def declare_distributed(
    rank_size: int,
    stage_size: int,
    with_batch_dim: bool = True,
    without_batch_dim_inputs: int | tuple[int, ...] | list[int] | None = None,
    enable_pipeline_infer: bool = False,
) -> Model:
    """Declares the servable's one model as distributed over processes that agents run.

    Args:
        rank_size: their number.
        stage_size: stages of the pipeline; the ranks are divided between them evenly, in order. The first stage gets
            the inputs, the last rank's outputs are the result.
        with_batch_dim: the first dimension of every input and output is the batch.
        without_batch_dim_inputs: indices of inputs without a batch dimension; the first one alone is `(0,)`.
        enable_pipeline_infer: `stage_size` batches run at once; else one.

    Returns:
        The model, for `add_stage` and `Model.call`. Its key is the servable's name.

    Raises:
        RegistrationError: a parameter of the wrong type or value, or a second model.
    """
    check_bool("with_batch_dim", with_batch_dim)
    check_bool("enable_pipeline_infer", enable_pipeline_infer)
    unbatched = check_unbatched(without_batch_dim_inputs)
    check_int("rank_size", rank_size, 1)
    check_int("stage_size", stage_size, 1)
    registry = current_registry()
    if any(model.ranks is not None for model in registry.models.values()):
        raise RegistrationError(
            f"Declare distributed model failed, servable '{registry.name}' has repeatedly been declared as distributed "
            "servable"
        )
    if registry.models:
        raise RegistrationError(
            "Declare distributed model failed, servable has already been declared as local servable"
        )
    registry.models[registry.name] = ModelSpec(
        registry.name,
        files=(),
        format="distributed",
        with_batch_dim=with_batch_dim,
        without_batch_dim_inputs=unbatched,
        ranks=Ranks(rank_size, stage_size, enable_pipeline_infer),
    )
    return Model(registry.name)
