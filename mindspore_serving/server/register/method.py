"""Methods and their stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inflight.servable import (
    add_stage,
    call_postprocess,
    call_postprocess_pipeline,
    call_preprocess,
    call_preprocess_pipeline,
    call_servable,
)
from inflight.servable import register_method as _register_method

__all__ = [
    "add_stage",
    "call_postprocess",
    "call_postprocess_pipeline",
    "call_preprocess",
    "call_preprocess_pipeline",
    "call_servable",
    "register_method",
]


def register_method(
    output_names: str | tuple[str, ...] | list[str], **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`inflight.servable.register_method` with MindSpore Serving's behaviour: later stages see the
    edits that a function makes to its inputs, and a returned list of one element counts as that element."""
    return _register_method(output_names, mindspore_values=True, **options)
