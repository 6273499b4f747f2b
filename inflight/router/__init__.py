"""From a request to the worker that runs it."""

from inflight.router.router import Router

__all__ = ["Router"]
