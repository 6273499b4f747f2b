"""The classification extension: the largest elements of an output, with their indices and labels, as texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.contract import Array
from inflight.errors import InvalidRequest
from inflight.frontends.oip.tensors import OipTensor


def classified(tensor: OipTensor, count: int, labels: Sequence[str], whole: bool) -> OipTensor:
    """An output [n, ...] as BYTES [n, count] of `value:index` or `value:index:label`, the highest first.

    Args:
        count: of classes for each instance; all where there are fewer.
        labels: by index; may be short.
        whole: the output has no instances: it becomes [count].

    Raises:
        InvalidRequest: it holds no numbers.
    """
    if not isinstance(tensor.data, np.ndarray):
        raise InvalidRequest(f"output '{tensor.name}' holds texts, which have no order of classes")
    shape = tensor.data.shape
    rows = tensor.data.reshape((1, -1) if whole else (shape[0], math.prod(shape[1:])))
    count = min(count, rows.shape[1])
    texts: list[bytes] = []
    for row in rows:
        for index in _highest(row, count):
            label = f":{labels[index]}" if index < len(labels) else ""
            texts.append(f"{_text(row[index])}:{index}{label}".encode())
    return OipTensor(tensor.name, "BYTES", (count,) if whole else (len(rows), count), texts)


def check_classes(output: str, count: int) -> int:
    """The number of classes that a request wants of an output.

    Raises:
        InvalidRequest: it is less than 1.
    """
    if count < 1:
        raise InvalidRequest(f"'classification' of output '{output}' must be the number of classes, at least 1")
    return count


def _highest(row: Array, count: int) -> list[int]:
    """Indices of the largest elements; of equal ones the first comes first, NaN last."""
    if row.dtype.kind == "f":
        values = np.where(np.isnan(row), -np.inf, row)
        return [int(index) for index in np.argsort(-values, kind="stable")[:count]]
    numbers = [int(value) for value in row]
    return sorted(range(len(numbers)), key=lambda index: -numbers[index])[:count]


def _text(value: Any) -> str:
    return f"{value:f}" if isinstance(value, np.floating) else str(int(value))
