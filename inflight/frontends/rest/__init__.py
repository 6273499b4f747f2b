"""MindSpore Serving's REST interface."""

from inflight.frontends.rest.app import MindSporeRest
from inflight.frontends.rest.generator import GeneratorRest

__all__ = ["GeneratorRest", "MindSporeRest"]
