"""Connects a rank with the others of its model."""

from __future__ import annotations

from inflight.device.base import Alone, Ranks
from inflight.device.open import Device
from inflight.startup import require


def connect_ranks(rank: int, size: int, rendezvous: str, device: Device, timeout: float) -> Ranks:
    """Joins the other ranks.

    Args:
        rendezvous: `host:port` where rank 0 listens.
        timeout: seconds to wait for the others.

    Raises:
        StartError: a rank did not connect in time, or torch is not installed.
    """
    if size == 1:
        return Alone()
    require("a model on several ranks", "torch")
    from inflight.device.ranks import join  # brings torch.distributed

    return join(rank, size, rendezvous, device, timeout)
