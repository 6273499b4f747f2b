"""Inflight: one server for classic models and language models."""

__version__ = "0.1.0"
