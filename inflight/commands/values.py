"""Reads inputs from a command line, and prints results as JSON."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from inflight.contract import DTYPE_CODES

# The types that the REST door gives JSON numbers, so that a command line means the same through both doors.
_JSON_DTYPES = {"b": "bool", "i": "int32", "f": "float32"}
PLAIN = frozenset(_JSON_DTYPES.values())
"""Data types that are the default on the command line and in JSON."""


def parse_input(text: str) -> tuple[str, Any]:
    """Reads `name=value` or `name:dtype=value` as a name and an array, text or bytes.

    A value is JSON (numbers become int32 or float32 if no dtype is named), `@file.npy` for an array, or `@file` for the
    bytes of a file.

    Raises:
        ValueError: with a hint.
    """
    left, equals, value = text.partition("=")
    name, colon, dtype = left.partition(":")
    if not equals or not name:
        raise ValueError(f"'{text}' has no name; write name=value, for example x=[1.0,2.0] or image=@cat.png")
    if colon and dtype not in DTYPE_CODES:
        raise ValueError(f"'{dtype}' is no data type; write one of: {', '.join(DTYPE_CODES)}")
    try:
        return name, _value(value, dtype or None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _value(text: str, dtype: str | None) -> Any:
    if text.startswith("@"):
        return _file_value(Path(text[1:]), dtype)
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(
            f"'{text}' is not JSON; write a number, a list like [1.0,2.0], a quoted text like '\"cat\"', or @file"
        ) from None
    if isinstance(value, str) and dtype is None:
        return value
    return _array(value, dtype)


def _file_value(path: Path, dtype: str | None) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from None
    if path.suffix.lower() != ".npy":
        if dtype is not None:
            raise ValueError("only an array has a data type, and a file is bytes unless it is named *.npy")
        return content
    array = np.load(io.BytesIO(content), allow_pickle=False)
    return np.ascontiguousarray(array if dtype is None else array.astype(dtype))


def _array(value: Any, dtype: str | None) -> Any:
    try:
        array = np.array(value)
        wanted = dtype or _JSON_DTYPES[array.dtype.kind]
        if array.dtype.kind == "i" and np.dtype(wanted).kind in "iu":
            limits = np.iinfo(wanted)
            if array.size and not (limits.min <= array.min() and array.max() <= limits.max):
                raise ValueError(f"a number does not fit into {wanted}; name a wider type, like name:int64=…")
        return array.astype(wanted)
    except (KeyError, TypeError):
        raise ValueError("write numbers of one kind, in lists of equal length") from None


def rest_value(value: Any) -> Any:
    """An input as the REST door reads it: plain JSON, or base64 with type and shape."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if value.dtype.name in PLAIN and value.size and np.isfinite(value).all():  # JSON has no infinity
        return value.tolist()
    return {
        "b64": base64.b64encode(value.tobytes()).decode(),
        "type": value.dtype.name,
        "shape": list(value.shape),
    }


def printable(value: Any) -> Any:
    """A result as a JSON value: arrays as lists, bytes as base64."""
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
