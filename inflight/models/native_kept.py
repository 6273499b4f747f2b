"""Copies of the CPU engine's cache for files."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from inflight.contract import Array
from inflight.kernels import NativeProgram, native_file
from inflight.models.base import KeptForms


class NativeKept(KeptForms):
    """Of a program with a cache.

    The instruction set is among `bits`, because another one rounds otherwise in the last digits, and so is the library
    itself: whoever builds another one need not think of a version.
    """

    def __init__(self, program: NativeProgram) -> None:
        self._program = program
        self.block_bytes = program.kept_bytes
        self.state_bytes = program.state_bytes
        self.bits = ("engine", program.isa, _library())

    def read_block(self, block: int, to: Array) -> None:
        self._program.read_block(block, to)

    def write_block(self, block: int, from_: Array) -> None:
        self._program.write_block(block, from_)

    def read_state(self, slot: int, to: Array) -> None:
        self._program.read_state(slot, to)

    def write_state(self, slot: int, from_: Array) -> None:
        self._program.write_state(slot, from_)


@lru_cache
def _library() -> str:
    file = native_file()
    return "" if file is None else blake2b(file.read_bytes(), digest_size=16).hexdigest()
