"""A file of packed weights, which the next start maps instead of packing the checkpoint again.

It lies in the folder of `--packed-cache`. Replicas that map it share its pages. Its name holds a hash of everything
that its bytes depend on. The file has eight bytes of magic, the length of a JSON header in eight more, the header, and
the packed bytes that the header lists, each at a multiple of 64.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inflight.checkpoint import ModelFolder
from inflight.kernels import Bytes, Format, NativeProgram, Packed, PackedBytes, Precision, Table
from inflight.tensors import Floats, widened

log = logging.getLogger("inflight")

VERSION = 3
"""Version of the layout of packed weights and of this file. Another version has another file name."""
MAGIC = b"inflpack"
ALIGN = 64
WRITTEN_AT_ONCE = 1 << 28
"""Bytes of packed weights up to which a start waits until they are written; more are written behind it."""
PART = 1 << 24
"""Bytes that are written at a time."""
NICE = 10
"""Added to the niceness of the thread that writes, on Linux: the first requests come first."""
_EMPTY: Bytes = np.empty(0, np.uint8)


class PackedProduct(NamedTuple):
    """A product of a program: its number and its bias."""

    number: int
    bias: Floats | None


@dataclass(frozen=True)
class _Entry:
    """One weight in the header of a file. Each place is (offset, bytes); offsets count from the end of the header.
    `table`: type and shape of a table."""

    packed: Packed | None
    data: tuple[int, int]
    scales: tuple[int, int]
    bias: tuple[int, int]
    table: tuple[str, int, int] | None = None


class CacheLoader:
    """A `WeightLoader` that maps packed weights from a file.

    Raises:
        ValueError: it is not such a file, or was truncated.
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
        while _key(name, count) in self._entries:
            count += 1
        gated = gated and count == 1
        return tuple(self._add(program, _key(name, index), gated) for index in range(count))

    def _add(self, program: NativeProgram, name: str, gated: bool) -> int:
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

    def array(self, program: NativeProgram, name: str) -> int:
        return self.norm(program, name)

    def table(self, program: NativeProgram, name: str) -> int:
        entry = self._find(name)
        if entry.table is None:
            raise ValueError(f"'{name}' is no table")
        return program.table(Table(*entry.table, self._piece(name, entry.data)))

    def finish(self, program: NativeProgram) -> None:
        """Does nothing: the program keeps the mapped memory."""

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
    """The path of a model's packed weights. Its name holds a hash of the checkpoint's files and of the settings."""
    digest = hashlib.sha256(json.dumps([VERSION, *settings]).encode())
    for file in model.weight_files():
        stat = file.stat()
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
    digest.update(str(model.path.resolve()).encode())
    return folder / f"{model.name}-{digest.hexdigest()[:32]}.packed"


class CacheWriter:
    """Keeps packed weights in a file: while the model starts, or, where they are large, behind its start.

    A file that cannot be written is a warning. One that is not complete when the process ends is given up.

    Args:
        products: by name; several if a name's tensors have several formats.
        norms: their weights, by name.
        tables: by name.

    Attributes:
        stopping: the file is given up.
    """

    def __init__(
        self,
        path: Path,
        program: NativeProgram,
        products: Mapping[str, Sequence[PackedProduct]],
        norms: Mapping[str, Floats],
        tables: Mapping[str, Table],
    ) -> None:
        self._path = path
        self._program = program  # owns the memory
        self._header, self._pieces = _listed(program, products, norms, tables)
        self.stopping = False
        self._thread = threading.Thread(target=self._keep, args=(NICE,), name="packed-cache", daemon=True)
        if program.bytes <= WRITTEN_AT_ONCE:
            self._keep(0)
            return
        # `stop` runs before the interpreter ends, so that the temporary file is removed.
        atexit.register(self.stop)
        self._thread.start()

    def join(self) -> None:
        """Waits until the file is written."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Gives up a file that is not complete."""
        self.stopping = True
        self.join()

    def _keep(self, nice: int) -> None:
        if nice and sys.platform == "linux":  # elsewhere the whole process would be nicer
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        try:
            self._write()
        except OSError as error:
            log.warning("packed weights cannot be kept in '%s': %s", self._path.parent, error)
        finally:
            self._pieces = []
            atexit.unregister(self.stop)

    def _write(self) -> None:
        """Writes a temporary file, and renames it when it is complete.

        Raises:
            OSError: it cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + len(self._header).to_bytes(8, "little") + self._header)
                file.write(bytes(_aligned(file.tell()) - file.tell()))
                for piece in self._pieces:
                    for begin in range(0, len(piece), PART):
                        if self.stopping:
                            return
                        file.write(piece[begin : begin + PART].data)
                    file.write(bytes(_aligned(len(piece)) - len(piece)))
            os.replace(temporary, self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _listed(
    program: NativeProgram,
    products: Mapping[str, Sequence[PackedProduct]],
    norms: Mapping[str, Floats],
    tables: Mapping[str, Table],
) -> tuple[bytes, list[Bytes]]:
    """The header of a file, and the pieces that it lists. Those of products are the program's own memory."""
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
        for index, product in enumerate(several):
            packed = program.packed(product.number)
            entry = _Entry(packed.shape, put(packed.data), put(packed.scales), put(floats(product.bias)))
            entries[_key(name, index)] = asdict(entry)
    for name, weight in norms.items():
        entries[name] = asdict(_Entry(None, put(floats(weight)), (0, 0), (0, 0)))
    for name, table in tables.items():
        shape = (table.type, table.n, table.k)
        entries[name] = asdict(_Entry(None, put(table.data), (0, 0), (0, 0), shape))
    return json.dumps(entries).encode(), pieces


def _key(name: str, index: int) -> str:
    """The name in a file of a weight's product number `index`."""
    return name if index == 0 else f"{name}/{index}"


def _aligned(position: int) -> int:
    return -(-position // ALIGN) * ALIGN


def _entry(stored: dict[str, Any]) -> _Entry:
    def pair(value: Any) -> tuple[int, int]:
        first, size = value
        return int(first), int(size)

    packed = stored["packed"]
    shape = None if packed is None else Packed(**{**packed, "format": Format(packed["format"])})
    table = stored["table"]
    of = None if table is None else (str(table[0]), int(table[1]), int(table[2]))
    return _Entry(shape, pair(stored["data"]), pair(stored["scales"]), pair(stored["bias"]), of)
