"""The record of a stage function, and the built-in stage functions."""

from inflight.servable import BUILTIN_FUNCTIONS, FunctionSpec

__all__ = ["BUILTIN_FUNCTIONS", "FunctionSpec"]
