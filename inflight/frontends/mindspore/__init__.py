"""MindSpore Serving's interfaces: REST, gRPC, and the routes of its language models."""

from inflight.frontends.mindspore.generator import GeneratorRest
from inflight.frontends.mindspore.llm import MindSporeLlm
from inflight.frontends.mindspore.rest import MindSporeRest

__all__ = ["GeneratorRest", "MindSporeLlm", "MindSporeRest"]
