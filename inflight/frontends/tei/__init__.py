"""text-embeddings-inference's REST interface."""

from inflight.frontends.tei.app import TeiRest

__all__ = ["TeiRest"]
