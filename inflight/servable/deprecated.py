"""The registration functions from the time before `add_stage`. Each logs a warning and calls its successor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from inflight.errors import RegistrationError
from inflight.servable.declare import declare_model
from inflight.servable.device import AclOptions, GpuOptions
from inflight.servable.helpers import outputs_count
from inflight.servable.method import add_stage
from inflight.servable.model import Model
from inflight.servable.trace import MethodTrace, Registry, current_method

logger = logging.getLogger("inflight")

_PREPROCESS = ("call_preprocess", "call_preprocess_pipeline")
_POSTPROCESS = ("call_postprocess", "call_postprocess_pipeline")


def declare_servable(
    servable_file: str | tuple[str, ...] | list[str],
    model_format: str,
    with_batch_dim: bool = True,
    options: AclOptions | GpuOptions | None = None,
    without_batch_dim_inputs: int | tuple[int, ...] | list[int] | None = None,
) -> Model:
    """Deprecated: `declare_model`."""
    _warn("declare_servable", "declare_model")
    return declare_model(servable_file, model_format, with_batch_dim, options, without_batch_dim_inputs)


def call_preprocess(preprocess_fun: Callable[..., Any], *args: Any) -> Any:
    """Deprecated: `add_stage` with a function, before `call_servable`. Takes one instance's inputs."""
    return _call_function("call_preprocess", preprocess_fun, args)


def call_preprocess_pipeline(preprocess_fun: Callable[..., Any], *args: Any) -> Any:
    """Deprecated: `add_stage` with a batch function (`batch_size=0`), before `call_servable`."""
    return _call_function("call_preprocess_pipeline", preprocess_fun, args)


def call_servable(*args: Any) -> Any:
    """Deprecated: `add_stage` with the only declared model."""
    registry, trace = _begin("call_servable", args)
    if not registry.models:
        raise RegistrationError("There is no model declared, you can use declare_model to declare models.")
    count = outputs_count(trace, "call_servable")
    if len(registry.models) > 1:
        raise RegistrationError(
            "There are more than one servable declared when the interface 'call_servable' is used, use "
            "'add_stage' to replace 'call_servable'"
        )
    return add_stage(Model(next(iter(registry.models))), *args, outputs_count=count)


def call_postprocess(postprocess_fun: Callable[..., Any], *args: Any) -> Any:
    """Deprecated: `add_stage` with a function, after `call_servable`. Takes one instance's inputs."""
    return _call_function("call_postprocess", postprocess_fun, args)


def call_postprocess_pipeline(postprocess_fun: Callable[..., Any], *args: Any) -> Any:
    """Deprecated: `add_stage` with a batch function (`batch_size=0`), after `call_servable`."""
    return _call_function("call_postprocess_pipeline", postprocess_fun, args)


def _call_function(helper: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    _, trace = _begin(helper, args)
    count = outputs_count(trace, helper)
    batch_size = 0 if helper.endswith("_pipeline") else None
    tag = "Preprocess" if helper in _PREPROCESS else "Postprocess"
    return add_stage(function, *args, outputs_count=count, batch_size=batch_size, tag=tag)


def _begin(helper: str, args: tuple[Any, ...]) -> tuple[Registry, MethodTrace]:
    """Checks that `helper` may be called now, and records the call."""
    registry, trace = current_method(helper)
    _warn(helper, "add_stage")
    failed = _order_fault(helper, trace.helpers)
    if failed:
        raise RegistrationError(f"Check failed in method '{trace.name}', {failed}")
    if not args:
        raise RegistrationError(f"Invalid '{helper}' invoke args in method '{trace.name}', give at least one input")
    trace.helpers.append(helper)
    return registry, trace


def _order_fault(helper: str, called: list[str]) -> str | None:
    """The error of a call of `helper` after `called`: allowed is each kind once, preprocess, servable, postprocess."""
    kinds: tuple[tuple[str, ...], ...] = (_PREPROCESS, ("call_servable",), _POSTPROCESS)
    rank = next(index for index, kind in enumerate(kinds) if helper in kind)
    if any(name in kinds[rank] for name in called):
        return f"{' or '.join(kinds[rank])} should not be invoked more than once"
    for kind in kinds[rank + 1 :]:
        if any(name in kind for name in called):
            return f"{' or '.join(kind)} should be invoked after {helper}"
    return None


def _warn(old: str, new: str) -> None:
    logger.warning("'%s' is deprecated since 1.5.0, use 'register.%s' instead", old, new)
