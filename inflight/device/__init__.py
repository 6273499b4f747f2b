"""Devices and the ranks that share a model."""

from inflight.device.base import Alone, Ranks
from inflight.device.connect import connect_exchange, connect_ranks
from inflight.device.open import Device, open_device

__all__ = ["Alone", "Device", "Ranks", "connect_exchange", "connect_ranks", "open_device"]
