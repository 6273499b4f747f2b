"""The base of models on torch: moves a step's arrays to the device, and holds the cache."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from inflight.models.base import CausalLM, ForwardBatch, KeptForms
from inflight.models.torch_kept import TorchKept
from inflight.nn import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, make_attention, to_tensor

CACHE_LINE = 64
"""Alignment of arrays in bytes, as torch aligns its own."""


@dataclass(frozen=True)
class TensorBatch:
    """A `ForwardBatch` on a device; `reach` stays on the host.

    Attributes:
        image_at: the tokens of images.
        image_rows: their embeddings, then what is added behind each of the first layers.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    logits_at: torch.Tensor
    adapters: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    reach: torch.Tensor | None = None
    image_at: torch.Tensor | None = None
    image_rows: list[torch.Tensor] = field(default_factory=list)
    places: torch.Tensor | None = None


def on_device(batch: ForwardBatch, device: torch.device) -> TensorBatch:
    """The step's arrays on a device; on a CPU they share the memory."""

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = to_tensor(array)
        return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

    attention = AttentionBatch(
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        block_tables=move(batch.block_tables),
        slots=move(batch.slots),
        block_size=batch.block_size,
        num_decode=batch.num_decode,
        until=None if batch.until is None else move(batch.until),
    )
    images = batch.images
    return TensorBatch(
        move(batch.token_ids),
        move(batch.positions),
        attention,
        move(batch.logits_at),
        _by_adapter(batch, move),
        None if batch.reach is None else to_tensor(batch.reach),
        None if images is None else move(images.at),
        [] if images is None else [move(rows) for rows in (images.rows, *images.added)],
        None if batch.places is None else move(batch.places),
    )


def _by_adapter(batch: ForwardBatch, move: Callable[[np.ndarray], torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """The tokens of each adapter, in the order of the adapters' numbers."""
    if batch.adapters is None:
        return []
    by_token = np.repeat(batch.adapters, batch.query_lens)
    numbers = [int(number) for number in np.unique(batch.adapters) if number]
    return [(number, move(np.flatnonzero(by_token == number))) for number in numbers]


class TorchLM(CausalLM):
    """A `CausalLM` of torch's operators.

    Attributes:
        layers: the attention of each layer, by which its cache is made.
        device: on which it computes.
        torch_dtype: of the weights.
    """

    on_torch = True
    layers: list[AttentionSpec]
    device: torch.device
    torch_dtype: torch.dtype

    def block_bytes(self, block_size: int) -> int:
        size = self.torch_dtype.itemsize
        return sum(block_size * spec.num_kv_heads * (spec.head_dim + spec.value_dim) * size for spec in self.layers)

    def make_cache(self, blocks: int, block_size: int) -> int:
        caches = [
            LayerCache(
                _zeros((blocks, block_size, spec.num_kv_heads, spec.head_dim), self.torch_dtype, self.device),
                _zeros((blocks, block_size, spec.num_kv_heads, spec.value_dim), self.torch_dtype, self.device),
            )
            for spec in self.layers
        ]
        self._caches = caches
        self.bind(make_attention(caches, block_size))
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)

    def kept(self) -> KeptForms:
        return TorchKept(self._caches, self.device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        with torch.inference_mode():
            return self.compute(on_device(batch, self.device))

    @abstractmethod
    def bind(self, attention: AttentionBackend) -> None:
        """Sets the attention backend, before the first step and again for another cache."""

    @abstractmethod
    def compute(self, batch: TensorBatch) -> torch.Tensor:
        """Logits of one step, in inference mode; see `CausalLM.forward`."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory, because a slot that was never written must not hold a NaN.

    On a CPU the system zeroes a page when it is first touched. `torch.zeros` would write all pages at the start: that
    takes seconds, and memory that requests may never need.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % CACHE_LINE
    return torch.from_numpy(raw[begin : begin + size]).view(dtype).view(shape)
