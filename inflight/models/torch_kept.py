"""Copies of the cache of models on torch for files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from inflight.contract import Array
from inflight.models.base import KeptForms
from inflight.nn import LayerCache


class TorchKept(KeptForms):
    """Of the caches of all layers, on a CPU or another device. A copy is [layer][keys, values] of the block.

    torch's operators may round a row otherwise in another company, so what is found is what was computed once, as it is
    with the prefix cache in memory.
    """

    def __init__(self, caches: Sequence[LayerCache], device: torch.device) -> None:
        self._tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        self.block_bytes = sum(tensor[0].nbytes for tensor in self._tensors)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.bits = ("torch", torch.__version__, device.type, name)

    def read_block(self, block: int, to: Array) -> None:
        with torch.inference_mode():
            for tensor, part in self._parts(to):
                part[:] = tensor[block].contiguous().view(torch.uint8).reshape(-1).cpu().numpy()

    def write_block(self, block: int, from_: Array) -> None:
        with torch.inference_mode():
            for tensor, part in self._parts(from_):
                content = torch.from_numpy(np.ascontiguousarray(part)).view(tensor.dtype)
                tensor[block].copy_(content.reshape(tensor.shape[1:]))

    def _parts(self, memory: Array) -> Iterator[tuple[torch.Tensor, Array]]:
        at = 0
        for tensor in self._tensors:
            size = tensor[0].nbytes
            yield tensor, memory[at : at + size]
            at += size
