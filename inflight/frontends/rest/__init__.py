"""MindSpore Serving's REST interface."""

from inflight.frontends.rest.app import MindSporeRest

__all__ = ["MindSporeRest"]
