"""MindSpore Serving's interfaces: REST, gRPC, and the routes of its language models."""

from inflight.frontends.mindspore.llm_methods import LlmMethods
from inflight.frontends.mindspore.llm_routes import LlmRoutes
from inflight.frontends.mindspore.rest import MindSporeRest

__all__ = ["LlmMethods", "LlmRoutes", "MindSporeRest"]
