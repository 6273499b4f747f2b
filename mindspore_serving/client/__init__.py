"""The Python client."""

from inflight.client import MindsporeInferenceClient
from mindspore_serving.client.python.client import Client, SSLConfig

__all__ = ["Client", "MindsporeInferenceClient", "SSLConfig"]
