"""Exchanges of arrays between ranks over torch.distributed: gloo, NCCL or HCCL, chosen by the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from inflight.contract import Array
from inflight.device.open import Device
from inflight.device.ranks import join

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}


class ArrayExchange:
    """The other ranks of a process group, for arrays (`inflight.runtime.Exchanges`).

    Args:
        groups: ranks of each named group that this rank is in. Names that end in `_world_group` are all ranks.
        timeout: seconds that an exchange may take.

    Raises:
        StartError: the ranks do not meet.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        rendezvous: str,
        device: Device,
        groups: Mapping[str, Sequence[int]],
        timeout: float,
    ) -> None:
        self._ranks = join(rank, size, rendezvous, device, timeout)
        self._device = device
        self._world = list(range(size))
        self._members = {name: list(ranks) for name, ranks in groups.items()}
        self._groups: dict[str, Any] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []
        # In one order on all ranks: a group is made by its members alone, which wait for each other.
        made: dict[tuple[int, ...], Any] = {}
        for name, ranks in sorted(self._members.items(), key=lambda item: tuple(item[1])):
            if tuple(ranks) not in made:
                made[tuple(ranks)] = dist.new_group(
                    list(ranks), timeout=timedelta(seconds=timeout), use_local_synchronization=True
                )
            self._groups[name] = made[tuple(ranks)]

    def all_reduce(self, array: Array, reduction: str, group: str) -> Array:
        tensor = self._tensor(array.copy())
        dist.all_reduce(tensor, _REDUCTIONS[reduction], group=self._group(group))
        return _array(tensor)

    def all_gather(self, array: Array, group: str) -> Array:
        tensor = self._tensor(array)
        parts = [torch.empty_like(tensor) for _ in self._members_of(group)]
        dist.all_gather(parts, tensor, group=self._group(group))
        return _array(torch.cat(parts))

    def reduce_scatter(self, array: Array, reduction: str, group: str) -> Array:
        # gloo has no reduce_scatter.
        members = self._members_of(group)
        whole = self.all_reduce(array, reduction, group)
        if whole.ndim == 0 or whole.shape[0] % len(members):
            raise RuntimeError(f"an array of shape {list(whole.shape)} cannot be divided between {len(members)} ranks")
        part: Array = np.split(whole, len(members))[members.index(self._ranks.rank)].copy()
        return part

    def broadcast(self, array: Array, root: int, group: str) -> Array:
        tensor = self._tensor(array.copy())
        dist.broadcast(tensor, self._members_of(group)[root], group=self._group(group))
        return _array(tensor)

    def send(self, array: Array, peer: int, tag: int, group: str) -> None:
        tensor = self._tensor(array.copy())
        work = dist.isend(tensor, self._members_of(group)[peer], group=self._group(group), tag=tag)
        self._sent.append((work, tensor))

    def receive(self, dtype: str, shape: tuple[int, ...], peer: int, tag: int, group: str) -> Array:
        tensor = self._tensor(np.empty(shape, dtype))
        dist.recv(tensor, self._members_of(group)[peer], group=self._group(group), tag=tag)
        return _array(tensor)

    def finish(self) -> None:
        while self._sent:
            self._sent.pop()[0].wait()

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device.torch)

    def _members_of(self, group: str) -> list[int]:
        if group in self._members:
            return self._members[group]
        if group.endswith("_world_group") or not group:
            return self._world
        raise RuntimeError(
            f"the group of ranks '{group}' is not known, this rank's group_config_files names "
            f"{', '.join(self._members) or 'none'}"
        )

    def _group(self, group: str) -> Any:
        self._members_of(group)
        return self._groups.get(group)


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.cpu().numpy()
    return array
