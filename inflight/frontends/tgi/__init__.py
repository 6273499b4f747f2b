"""Text Generation Inference's REST interface."""

from inflight.frontends.tgi.answers import Predictions, TgiError
from inflight.frontends.tgi.app import TgiRest
from inflight.frontends.tgi.door import TgiDoor
from inflight.frontends.tgi.request import GenerateBody, check_body
from inflight.frontends.tgi.response import refusal

__all__ = ["GenerateBody", "Predictions", "TgiDoor", "TgiError", "TgiRest", "check_body", "refusal"]
