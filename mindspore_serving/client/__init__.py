"""The Python client."""

from mindspore_serving.client.python.client import Client, SSLConfig

__all__ = ["Client", "SSLConfig"]
