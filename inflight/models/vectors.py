"""Pools the states of a text's tokens, and applies the layers behind the pooling, on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from inflight.checkpoint import Dense, Layer, LayerNorm, Normalize
from inflight.errors import StartError

Vector = np.ndarray[Any, np.dtype[np.float32]]

_NORM_EPS = 1e-5
"""Epsilon of a LayerNorm module: torch's default, because the folder does not store it."""
_SHORTEST = 1e-12
"""The least length by which a vector is divided."""

_erf: Callable[[Vector], Vector] = np.vectorize(math.erf, otypes=[np.float32])
ACTIVATE: dict[str, Callable[[Vector], Vector]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "Sigmoid": lambda x: np.float32(1) / (np.float32(1) + np.exp(-x)),
    "GELU": lambda x: x * np.float32(0.5) * (np.float32(1) + _erf(x * np.float32(math.sqrt(0.5)))),
    "SiLU": lambda x: x / (np.float32(1) + np.exp(-x)),
}


def pool(states: Vector, poolings: Sequence[str], first: int = 0) -> Vector:
    """Pools a text's states to one vector, [len(poolings) * H].

    Args:
        states: [T, H] of the text's tokens.
        poolings: of `POOLINGS` in `inflight.checkpoint.sentences`; their vectors are concatenated.
        first: tokens before this one are left out. `weightedmean` still weighs tokens by their position in the text.
    """
    first = min(first, len(states) - 1)
    pooled = [_pool(states[first:], pooling, first) for pooling in poolings]
    return pooled[0] if len(pooled) == 1 else np.concatenate(pooled)


def _pool(states: Vector, pooling: str, first: int) -> Vector:
    count = len(states)
    if pooling in ("cls", "lasttoken"):
        return np.asarray(states[0 if pooling == "cls" else -1], np.float32)
    if pooling == "max":
        return np.asarray(states.max(axis=0), np.float32)
    weights = np.ones(count)
    if pooling == "weightedmean":
        weights = np.arange(first + 1, first + count + 1, dtype=np.float64)
    # Without BLAS, whose threads would spin beside the engine's.
    total = np.add.reduce(states if pooling != "weightedmean" else states * weights[:, None], axis=0, dtype=np.float64)
    divisor = math.sqrt(count) if pooling == "mean_sqrt_len_tokens" else float(weights.sum())
    return np.asarray(total / divisor, np.float32)


class VectorHead:
    """The layers behind the pooling. Safe to use from several threads.

    Attributes:
        size: values of the result.
    """

    def __init__(self, layers: Sequence[Layer], size: int, allow_pickle: bool = False) -> None:
        """Reads the layers' weights.

        Args:
            size: values of a pooled vector.

        Raises:
            StartError: weights are missing, or do not fit.
        """
        self._steps: list[Callable[[Vector], Vector]] = []
        for layer in layers:
            if isinstance(layer, Normalize):
                self._steps.append(unit)
                continue
            inputs = layer.inputs if isinstance(layer, Dense) else layer.size
            if inputs != size:
                raise StartError(f"'{layer.folder}' takes vectors of {inputs} values, and gets them with {size}")
            tensors = _read(layer.folder, allow_pickle)
            step = _Dense(layer, tensors) if isinstance(layer, Dense) else _LayerNorm(layer, tensors)
            self._steps.append(step)
            size = layer.outputs if isinstance(layer, Dense) else size
        self.size = size

    def __call__(self, vector: Vector) -> Vector:
        """Applies the layers to a pooled vector, float32 of the size that `__init__` was given."""
        for step in self._steps:
            vector = step(vector)
        return vector


def unit(vector: Vector) -> Vector:
    """A vector of length 1."""
    length = math.sqrt(float(np.dot(vector, vector)))
    return np.asarray(vector / np.float32(max(length, _SHORTEST)), np.float32)


class _Dense:
    def __init__(self, layer: Dense, tensors: dict[str, Vector]) -> None:
        shape = (layer.outputs, layer.inputs)
        self._weight = _take(layer.folder, tensors, "linear.weight", shape)
        self._bias = _take(layer.folder, tensors, "linear.bias", shape[:1]) if layer.bias else None
        self._activation = ACTIVATE[layer.activation]
        self._residual = layer.residual
        projected = layer.residual and layer.inputs != layer.outputs
        self._residual_weight = _take(layer.folder, tensors, "residual.weight", shape) if projected else None

    def __call__(self, vector: Vector) -> Vector:
        found = self._weight @ vector
        if self._bias is not None:
            found = found + self._bias
        found = self._activation(found)
        if self._residual:
            found = found + (vector if self._residual_weight is None else self._residual_weight @ vector)
        return np.asarray(found, np.float32)


class _LayerNorm:
    def __init__(self, layer: LayerNorm, tensors: dict[str, Vector]) -> None:
        self._weight = _take(layer.folder, tensors, "norm.weight", (layer.size,))
        self._bias = _take(layer.folder, tensors, "norm.bias", (layer.size,))

    def __call__(self, vector: Vector) -> Vector:
        centred = vector - vector.mean(dtype=np.float64)
        scale = 1 / math.sqrt(float(np.dot(centred, centred)) / len(vector) + _NORM_EPS)
        return np.asarray(centred * scale * self._weight + self._bias, np.float32)


def _take(folder: Path, tensors: dict[str, Vector], name: str, shape: tuple[int, ...]) -> Vector:
    if name not in tensors:
        raise StartError(f"'{folder}' has no tensor '{name}'; download it again")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise StartError(f"'{folder}': '{name}' has the shape {tensor.shape}, its config.json says {shape}")
    return tensor


def _read(folder: Path, allow_pickle: bool) -> dict[str, Vector]:
    """A module's tensors, as float32."""
    file = folder / "model.safetensors"
    pickled = folder / "pytorch_model.bin"
    try:
        if file.is_file():
            with safetensors.safe_open(file, "numpy") as source:
                return {name: source.get_tensor(name).astype(np.float32) for name in source.keys()}  # noqa: SIM118
        if pickled.is_file() and allow_pickle:
            import torch  # only such a file needs it

            loaded = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor.float().numpy() for name, tensor in loaded.items()}
    except Exception as error:  # the libraries raise anything
        raise StartError(f"the weights in '{folder}' cannot be read: {error}; download them again") from error
    if pickled.is_file():
        raise StartError(
            f"'{pickled}' is a pickle, which can run code; convert it, or start with --allow-pickle: "
            'python -c "import torch, safetensors.torch; safetensors.torch.save_file('
            f"torch.load('{pickled}', weights_only=True), '{file}')\""
        )
    raise StartError(f"'{folder}' has no model.safetensors; download it again")
