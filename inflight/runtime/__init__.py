"""Stateless model back ends, one file each. A back end's package is imported only when a model needs it."""

from inflight.contract import GraphSpec, TensorSpec
from inflight.runtime.base import Exchanges, LoadedModel, LoadRequest, Runtime
from inflight.runtime.registry import (
    ENTRY_POINT_GROUP,
    OVERRIDES_VARIABLE,
    SUFFIXES,
    available_formats,
    configure,
    devices_for,
    find_runtime,
    parse_overrides,
)
from inflight.startup import switch_off

__all__ = [
    "ENTRY_POINT_GROUP",
    "OVERRIDES_VARIABLE",
    "SUFFIXES",
    "Exchanges",
    "GraphSpec",
    "LoadRequest",
    "LoadedModel",
    "Runtime",
    "TensorSpec",
    "available_formats",
    "configure",
    "devices_for",
    "find_runtime",
    "parse_overrides",
]

switch_off()
