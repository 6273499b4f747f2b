"""Text Generation Inference's REST interface."""

from inflight.frontends.tgi.app import TgiRest
from inflight.frontends.tgi.request import check_body
from inflight.frontends.tgi.response import fail, refusal

__all__ = ["TgiRest", "check_body", "fail", "refusal"]
