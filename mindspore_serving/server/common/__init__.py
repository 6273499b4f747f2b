"""Argument checks and path rules."""

from inflight.dropin import get_abs_path
from mindspore_serving.server.common import check_type

__all__ = ["check_type", "get_abs_path"]
