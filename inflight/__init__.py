"""Inflight: one server for classic models and language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inflight.contract import Sampling
    from inflight.llm import LLM, Generation

__version__ = "0.1.0"
__all__ = ["LLM", "Generation", "Sampling", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` and its companions bring the engine with them, so they are imported when they are first named."""
    if name in ("LLM", "Generation"):
        from inflight import llm

        return getattr(llm, name)
    if name == "Sampling":
        from inflight.contract import Sampling

        return Sampling
    raise AttributeError(f"module 'inflight' has no attribute {name!r}")
