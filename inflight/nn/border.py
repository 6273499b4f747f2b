"""Converts between numpy's arrays and torch's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inflight.tensors import BFLOAT16


def to_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's own memory; over a copy if it is read-only or not contiguous."""
    held = array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")
    if held.dtype == BFLOAT16:
        return torch.from_numpy(held.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(held)


def to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array over the tensor's own memory; over a copy if it is on a device or not contiguous."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        halves: np.ndarray[Any, Any] = held.view(torch.int16).numpy().view(BFLOAT16)
        return halves
    plain: np.ndarray[Any, Any] = held.numpy()
    return plain
