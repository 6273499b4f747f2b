"""What is recorded of a stage function, and the built-in ones."""

from inflight.servable import BUILTIN_FUNCTIONS, FunctionSpec

__all__ = ["BUILTIN_FUNCTIONS", "FunctionSpec"]
