"""Where the CPU engine's weights come from: the stream of a checkpoint, or a file of packed ones.

Such a file is kept in the folder of `--packed-cache` and mapped at the next start, so that nothing is read twice and
replicas share its pages. Its name holds a hash of everything that its bytes depend on. Layout: eight bytes of magic,
the length of a JSON header in eight more, the header, and at multiples of 64 bytes what it lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from inflight.checkpoint import ModelFolder, Weights, floats_into
from inflight.kernels import BLOCK_TYPES, Bytes, NativeProgram, Packed, PackedBytes, Precision
from inflight.models.decoder_tensors import Layout, Piece
from inflight.tensors import Blocks, Floats, Quantised, Weight, stack, widened

log = logging.getLogger("inflight")

LAYOUT = 2
"""Of packed weights and of this file; another number is another file."""
MAGIC = b"inflpack"
ALIGN = 64
_EMPTY: Bytes = np.empty(0, np.uint8)


class Parts(ABC):
    """Weights by name (see `inflight.models.decoder_tensors`), each taken once."""

    @abstractmethod
    def product(
        self, program: NativeProgram, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        """Adds a weight and its bias to the program; returns its number.

        Where the tensors that it is made of have several formats it becomes several products, whose outputs lie side by
        side. None of them is `gated` then: the halves of a gated weight are two.
        """

    @abstractmethod
    def norm(self, program: NativeProgram, name: str) -> int:
        """Adds a norm's weight; returns its number."""

    @abstractmethod
    def finish(self, program: NativeProgram) -> None:
        """All were taken."""


@dataclass(frozen=True)
class _Entry:
    """One weight in a file: pieces are (offset, bytes), the offset counted from the end of the header."""

    packed: Packed | None
    data: tuple[int, int]
    scales: tuple[int, int]
    bias: tuple[int, int]


class CheckpointParts(Parts):
    """The weights of a checkpoint, read one after the other; each is let go when it is packed.

    Args:
        dtype: of weights that are floats, and of those whose form the engine does not have.
        keep: where the packed weights are written when all were taken; None: nowhere.
    """

    def __init__(self, layout: Layout, weights: Weights, dtype: np.dtype[Any], keep: Path | None = None) -> None:
        self._layout = layout
        self._weights = weights
        self._dtype = dtype
        self._keep = keep
        self._products: dict[str, list[tuple[int, Floats | None]]] = {}
        self._norms: dict[str, Floats] = {}

    def product(
        self, program: NativeProgram, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        product = self._layout.product(name)
        for piece in product.weights:
            self._weights.check(piece.name, piece.shape)  # before memory is reserved for a config that lies
        found = self._by_format(product.weights, apart=name.count(".") < 2)
        bias = self._floats(product.biases) if product.biases else None
        kept: list[tuple[int, Floats | None]] = []
        row = 0
        for weight in found:
            rows = sum(each.shape[0] for each in weight) if isinstance(weight, list) else weight.shape[0]
            part = None if bias is None else bias[row : row + rows]
            number = program.product(weight, part, precision, gated=gated and len(found) == 1)
            kept.append((number, part))
            row += rows
        self._products[name] = kept
        self._weights.release()
        return tuple(number for number, _ in kept)

    def norm(self, program: NativeProgram, name: str) -> int:
        self._norms[name] = self._floats((self._layout.norm(name),))
        self._weights.release()
        return program.weight(self._norms[name])

    def _by_format(self, pieces: Sequence[Piece], apart: bool) -> list[Floats | Quantised | list[Blocks]]:
        """The tensors, those of one format that follow each other as one weight.

        Args:
            apart: several formats may stay several; else all become floats.
        """
        found = [self._weights.read(piece.name, piece.shape, piece.part) for piece in pieces]
        runs = [list(run) for _, run in groupby(range(len(found)), key=lambda index: _format(found[index]))]
        if len(runs) > 1 and not apart:
            return [self._above(pieces, found)]
        return [self._joined([pieces[index] for index in run], [found[index] for index in run]) for run in runs]

    def _joined(self, pieces: Sequence[Piece], found: Sequence[Weight]) -> Floats | Quantised | list[Blocks]:
        """Tensors of one format, one above the other."""
        blocks = [each for each in found if isinstance(each, Blocks) and each.type in BLOCK_TYPES]
        codes = [each for each in found if isinstance(each, Quantised)]
        if blocks:
            return blocks
        if codes:
            return codes[0] if len(codes) == 1 else stack(codes)
        [first, *others] = found
        if not others and isinstance(first, np.ndarray) and first.dtype == self._dtype:
            return first
        return self._above(pieces, found)

    def _floats(self, pieces: Sequence[Piece]) -> Floats:
        for piece in pieces:
            self._weights.check(piece.name, piece.shape)
        return self._above(pieces, [self._weights.read(piece.name, piece.shape, piece.part) for piece in pieces])

    def _above(self, pieces: Sequence[Piece], found: Sequence[Weight]) -> Floats:
        sizes = [piece.size for piece in pieces]
        whole = np.empty((sum(size[0] for size in sizes), *sizes[0][1:]), self._dtype)
        begin = 0
        for each, size in zip(found, sizes):
            floats_into(each, whole[begin : begin + size[0]])
            begin += size[0]
        return whole

    def finish(self, program: NativeProgram) -> None:
        if self._keep is None:
            return
        try:
            _write(self._keep, program, self._products, self._norms)
        except OSError as error:
            log.warning("packed weights cannot be kept in '%s': %s", self._keep.parent, error)


class FileParts(Parts):
    """Packed weights of a file, where they lie.

    Raises:
        ValueError: it is no such file, or was cut off.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 16:
                raise ValueError("it is too short")
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        length = int.from_bytes(self._map[8:16], "little")
        if self._map[:8] != MAGIC or length > size - 16:
            raise ValueError("it is no file of packed weights")
        try:
            header = json.loads(self._map[16 : 16 + length])
            self._entries = {name: _entry(each) for name, each in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"its header makes no sense: {error!r}") from error
        self._begin = _aligned(16 + length)

    def product(
        self, program: NativeProgram, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        count = 1
        while _place(name, count) in self._entries:
            count += 1
        gated = gated and count == 1
        return tuple(self._one(program, _place(name, place), gated) for place in range(count))

    def _one(self, program: NativeProgram, name: str, gated: bool) -> int:
        entry = self._find(name)
        if entry.packed is None or entry.packed.gated != gated:
            raise ValueError(f"'{name}' is no packed weight")
        bias = self._floats(name, entry.bias)
        return program.product_of(
            PackedBytes(entry.packed, self._piece(name, entry.data), self._piece(name, entry.scales)),
            bias if bias.size else None,
        )

    def norm(self, program: NativeProgram, name: str) -> int:
        return program.weight(self._floats(name, self._find(name).data))

    def finish(self, program: NativeProgram) -> None:
        """They stay where they are: the program holds what it uses."""

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"it has no '{name}'")
        return self._entries[name]

    def _piece(self, name: str, where: tuple[int, int]) -> Bytes:
        first, size = self._begin + where[0], where[1]
        if where[0] < 0 or size < 0 or where[0] % ALIGN or first + size > len(self._bytes):
            raise ValueError(f"'{name}' lies outside of it")
        return self._bytes[first : first + size]

    def _floats(self, name: str, where: tuple[int, int]) -> Floats:
        return self._piece(name, where).view(np.float32)


def cache_path(folder: Path, model: ModelFolder, settings: Sequence[str]) -> Path:
    """Where the packed weights of a model are kept: the name says of which files, and for what they were packed."""
    digest = hashlib.sha256(json.dumps([LAYOUT, *settings]).encode())
    for file in model.weight_files():
        stat = file.stat()
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
    digest.update(str(model.path.resolve()).encode())
    return folder / f"{model.name}-{digest.hexdigest()[:32]}.packed"


def _write(
    path: Path,
    program: NativeProgram,
    products: dict[str, list[tuple[int, Floats | None]]],
    norms: dict[str, Floats],
) -> None:
    """In a file beside, which takes the name when it is whole."""
    pieces: list[Bytes] = []
    position = 0

    def put(data: Bytes) -> tuple[int, int]:
        nonlocal position
        first = position
        pieces.append(data)
        position = _aligned(position + len(data))
        return first, len(data)

    def floats(values: Floats | None) -> Bytes:
        return _EMPTY if values is None else widened(values).view(np.uint8).reshape(-1)

    entries: dict[str, Any] = {}
    for name, several in products.items():
        for place, (number, bias) in enumerate(several):
            packed = program.packed(number)
            made = _Entry(packed.shape, put(packed.data), put(packed.scales), put(floats(bias)))
            entries[_place(name, place)] = asdict(made)
    for name, weight in norms.items():
        entries[name] = asdict(_Entry(None, put(floats(weight)), (0, 0), (0, 0)))
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            for piece in pieces:
                file.write(piece.data)
                file.write(bytes(_aligned(len(piece)) - len(piece)))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _place(name: str, place: int) -> str:
    """Of the second and further products of a name."""
    return name if place == 0 else f"{name}/{place}"


def _aligned(position: int) -> int:
    return -(-position // ALIGN) * ALIGN


def _entry(found: dict[str, Any]) -> _Entry:
    def pair(value: Any) -> tuple[int, int]:
        first, size = value
        return int(first), int(size)

    packed = found["packed"]
    return _Entry(
        None if packed is None else Packed(**packed), pair(found["data"]), pair(found["scales"]), pair(found["bias"])
    )


def _format(weight: Weight) -> tuple[Any, ...]:
    """Weights of one format can be one product."""
    if isinstance(weight, Quantised):
        return weight.bits, weight.group, weight.offsets is None
    return (weight.type,) if isinstance(weight, Blocks) and weight.type in BLOCK_TYPES else ()
