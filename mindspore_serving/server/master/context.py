"""Limits of the server."""

from inflight.dropin import set_max_enqueued_requests

__all__ = ["set_max_enqueued_requests"]
