"""Inflight: one server for classic models and language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from inflight.version import __version__

if TYPE_CHECKING:
    from inflight.contract import Sampling
    from inflight.llm import LLM, Generation

__all__ = ["LLM", "Generation", "Sampling", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` and its companions bring the engine with them, so they are imported when they are first named."""
    if name in ("LLM", "Generation"):
        return getattr(importlib.import_module("inflight.llm"), name)
    if name == "Sampling":
        return importlib.import_module("inflight.contract").Sampling
    raise AttributeError(f"module 'inflight' has no attribute {name!r}")
