"""`TensorSpec` for runtimes of other packages that import it from here; `inflight.runtime` has it too."""

from inflight.contract import TensorSpec

__all__ = ["TensorSpec"]
