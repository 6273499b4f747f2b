"""MindSpore Serving's import names over Inflight: existing scripts, servables and clients run unchanged."""

from mindspore_serving.version import __version__

__all__ = ["__version__"]
