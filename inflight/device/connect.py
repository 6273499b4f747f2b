"""Connects a rank with the others of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from inflight.device.base import Alone, Ranks
from inflight.device.open import Device
from inflight.startup import require

if TYPE_CHECKING:
    from inflight.device.exchange import ArrayExchange


def connect_exchange(
    rank: int, size: int, rendezvous: str, device: Device, groups: Mapping[str, Sequence[int]], timeout: float
) -> ArrayExchange:
    """Joins the other ranks of a model of arrays; arguments as for `ArrayExchange`.

    Raises:
        StartError: a rank did not connect in time, or torch is not installed.
    """
    require("a model whose ranks exchange tensors", "torch")
    from inflight.device.exchange import ArrayExchange  # brings torch.distributed

    return ArrayExchange(rank, size, rendezvous, device, groups, timeout)


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
