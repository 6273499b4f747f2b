"""Where models run: processors, their memory, and how ranks talk."""

from inflight.device.base import Alone, Ranks

__all__ = ["Alone", "Ranks"]
