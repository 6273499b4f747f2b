"""The files of LoRA adapters: folders in PEFT's layout, and llama.cpp's GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from inflight.checkpoint.folder import ADAPTER, LoraFolder
from inflight.checkpoint.gguf import GgufParts, GgufWeights, is_gguf
from inflight.errors import StartError
from inflight.tensors import Floats

_KIND = re.compile(rb"general\.type\x08\0\0\0\x07\0\0\0\0\0\0\0adapter")
_HEAD = 1 << 16
"""Bytes at the beginning of a file in which an adapter's few metadata lie."""
_PIECE = 1 << 20


class AdapterFiles(Protocol):
    """What the files of an adapter hold.

    Attributes:
        turned: rows of queries and keys stand in the order of llama.cpp's rotation, which pairs neighbours.
    """

    turned: bool

    @property
    def config(self) -> Mapping[str, Any]:
        """In the form of PEFT's adapter_config.json.

        Raises:
            StartError: it cannot be read.
        """

    def tensors(self) -> dict[str, Floats]:
        """The factors by PEFT's names.

        Raises:
            StartError: they cannot be read.
        """

    def weight_files(self) -> list[Path]:
        """All files that decide what it computes."""


class PeftFolder(LoraFolder):
    """An adapter in PEFT's layout."""

    turned = False

    def tensors(self) -> dict[str, Floats]:
        with self.weights() as weights:
            return {name: np.array(weights.floats(name)) for name in weights.names}


class GgufLora:
    """An adapter in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it."""

    def __init__(self, path: Path) -> None:
        self._file = GgufParts(path)
        metadata = self._file.metadata
        kind = metadata.get("adapter.type")
        if kind != "lora":
            raise StartError(f"'{path}' is an adapter of type {kind!r}; LoRA is served")
        self._weights = GgufWeights(self._file, lambda _: None)
        if self._weights.reordered:
            raise StartError(
                f"'{path}': GGUF adapters of '{metadata.get('general.architecture')}' are not read; use the adapter "
                "in PEFT's layout"
            )
        self.turned = self._weights.turned

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """As in llama.cpp an alpha of 0, or none, stands for a scale of 1."""
        return {"peft_type": "LORA", "lora_alpha": self._file.metadata.get("adapter.lora.alpha") or None}

    def tensors(self) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for name, placed in self._file.tensors.items():
            own, _, factor = name.rpartition(".lora_")
            if factor not in ("a", "b") or len(placed.info.shape) != 2:
                raise StartError(f"it holds '{name}', which is no LoRA factor of a linear layer")
            module = self._weights.named(own).removesuffix(".weight")
            read = self._weights.read(name, placed.info.shape)
            found[f"{module}.lora_{factor.upper()}.weight"] = np.array(
                read if isinstance(read, np.ndarray) else read.dequantise()
            )
        return found

    def weight_files(self) -> list[Path]:
        return self._file.paths


def is_adapter(path: Path) -> bool:
    """Whether a path is a LoRA adapter: a folder in PEFT's layout, or a GGUF file of one."""
    if path.is_file():
        if not is_gguf(path):
            return False
        with path.open("rb") as file:
            return _KIND.search(file.read(_HEAD)) is not None
    return (path / ADAPTER).is_file() and not (path / "config.json").is_file()


def open_adapter(path: Path) -> AdapterFiles:
    """Opens an adapter.

    Raises:
        StartError: there is none at the path, or its file is broken.
    """
    if path.is_file():
        if not is_adapter(path):
            raise StartError(f"'{path}' is no GGUF file of an adapter (general.type adapter)")
        return GgufLora(path)
    return PeftFolder(path)


def adapter_digest(path: Path) -> int:
    """62 bits made of everything that an adapter's files hold.

    Raises:
        StartError, OSError: there is no adapter, or it cannot be read.
    """
    digest = blake2b(digest_size=8)
    for file in open_adapter(path).weight_files():
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
    return int.from_bytes(digest.digest(), "big") >> 2
