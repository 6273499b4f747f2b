"""Devices and the ranks that share a model."""

from inflight.device.base import Alone, Ranks
from inflight.device.open import Device, open_device
from inflight.device.ranks import connect_ranks

__all__ = ["Alone", "Device", "Ranks", "connect_ranks", "open_device"]
