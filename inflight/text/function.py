"""A function that a model may call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Function:
    """A function that may be called: its name, its arguments' JSON schema, and whether that must be held exactly."""

    name: str
    parameters: dict[str, Any]
    strict: bool = False
