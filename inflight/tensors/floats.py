"""Arrays of floats, bfloat16 among them."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""float32, float16 or bfloat16 (`BFLOAT16`)."""

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
"""numpy's dtype of bfloat16, which ml_dtypes registers."""

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
"""The dtypes by the values of `--dtype`."""


def widened(values: Floats) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same values in float32, contiguous; `values` itself where it is that already."""
    return np.ascontiguousarray(values, np.float32)
