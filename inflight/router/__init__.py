"""Routes requests to workers and keeps workers and language models running."""

from inflight.router.router import Router

__all__ = ["Router"]
