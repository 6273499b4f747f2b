"""Starts servables."""

from inflight.dropin import ServableStartConfig, start_servables

__all__ = ["ServableStartConfig", "start_servables"]
