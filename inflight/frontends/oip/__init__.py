"""The Open Inference Protocol, version 2: its words in `mapping` and `tensors`, its REST door here.

The gRPC door lives with the other gRPC services.
"""

from inflight.frontends.oip.rest import OpenInferenceRest

__all__ = ["OpenInferenceRest"]
