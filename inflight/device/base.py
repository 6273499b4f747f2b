"""The interface between the ranks of one model: collective operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Ranks(ABC):
    """The processes that share one model. Every rank must call the same methods in the same order."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on all ranks; may change and return `tensor` itself."""

    @abstractmethod
    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """On rank 0 the ranks' tensors joined along the last dimension, in rank order; None on the others."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, written into `tensor` on every rank."""


class Alone(Ranks):
    """A model on one rank: every collective operation returns its input."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
