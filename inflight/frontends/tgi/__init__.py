"""Text Generation Inference's REST interface."""

from inflight.frontends.tgi.app import TgiRest

__all__ = ["TgiRest"]
