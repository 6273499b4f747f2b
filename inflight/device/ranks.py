"""The ranks of one model over torch.distributed: gloo, NCCL or HCCL, chosen by the device."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from inflight.device.base import Ranks
from inflight.device.open import Device
from inflight.errors import StartError


class Connected(Ranks):
    """Ranks of one process group. Sums are made in an order that is the same every time for the same shapes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), parts, dst=0)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=0)
        return tensor


def join(rank: int, size: int, rendezvous: str, device: Device, timeout: float) -> Ranks:
    """See `connect_ranks`."""
    _ = device.torch  # selects this process's device, before torch allocates anything on another one
    try:
        dist.init_process_group(
            device.collectives,
            init_method=f"tcp://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise StartError(f"rank {rank} cannot reach the other ranks at {rendezvous}: {error}") from error
    return Connected(rank, size)
