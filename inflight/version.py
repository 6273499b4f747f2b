"""The package's version, which the build reads here."""

from __future__ import annotations

__version__ = "0.1.0"
