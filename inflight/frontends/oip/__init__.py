"""The Open Inference Protocol, version 2: its models and tensors in `mapping` and `tensors`, its doors in `rest` and
`grpc`."""

from inflight.frontends.oip.rest import OpenInferenceRest
from inflight.frontends.oip.sequences import Sequences

__all__ = ["OpenInferenceRest", "Sequences"]
