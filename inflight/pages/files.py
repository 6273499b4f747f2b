"""The folder of the prompt cache: a folder for each fingerprint, and in it a file for each page and each state.

A file has a header of 64 bytes (magic, kind, key, fingerprint, size and checksum of the rest) and the bytes. It takes
its name when it is whole, so several processes may write and read one folder. Whatever is not exactly what was looked
for is no hit: it is deleted and computed anew.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEADER = 64
"""Bytes of a file before its content."""

_FORM = struct.Struct("<8sII16s16sQQ")  # magic, kind, 0, key, fingerprint, bytes of the content, checksum
_MAGIC = b"inflpg01"
_PAGES, _STATE = 0, 1
_FOLDER = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[0-9a-f]{32}\.(kv|state)|\.[0-9]+-[0-9]+\.part")
_AT_ONCE = 4 << 20
"""Bytes of one write."""
_ROOM = 1 << 30
"""Bytes that stay free on the disk, or a twentieth of a small one."""
_SCANS = 16
"""The folder is looked through when a process has written this part of its limit."""
_LOW = 0.9
"""Share of the limit down to which files are deleted."""
_STALE = 3600.0
"""Seconds after which the unfinished file of a process that was killed is deleted."""
_STEP = 0.002
"""Seconds by which a page counts as older than the page before it, so that prefixes go from their ends."""

_numbers = itertools.count()
"""Of unfinished files of this process."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class PageFiles:
    """The files of one fingerprint.

    Args:
        base: the folder of `--prompt-cache`.
        fingerprint: 32 hexadecimal digits for all that the content depends on.
        limit: bytes of all fingerprints' files in `base`.
        checksum: of bytes; 64 bits.
    """

    def __init__(
        self, base: Path, fingerprint: str, limit: int = 0, checksum: Callable[[Bytes], int] = lambda content: 0
    ) -> None:
        self.fingerprint = fingerprint
        self._base, self._folder = base, base / fingerprint
        self._mark = bytes.fromhex(fingerprint)
        self._limit, self._checksum = limit, checksum
        self._unseen = limit  # bytes written since the folder was last looked through

    def open(self) -> None:
        """Makes the folder, for this user alone.

        Raises:
            OSError: it cannot be made, or is somebody else's.
        """
        for folder in (self._base, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(self._folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"'{self._folder}' must be a folder that only this user may read and write")

    def exists(self, key: bytes, *, state: bool) -> bool:
        """Whether there is a file of this name."""
        return os.path.exists(self._path(key, state))

    def read(self, key: bytes, memory: Bytes, *, state: bool, place: int = 0) -> bool:
        """Reads a file of exactly this size; one that is damaged or foreign is deleted.

        Args:
            memory: header and content.
            place: number of the page within its chain.

        Returns:
            Whether `memory` has what was written under this key.
        """
        path = self._path(key, state)
        try:
            with open(path, "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == len(memory) and _filled(file, memory)
        except FileNotFoundError:
            return False
        if not whole or memory[:HEADER].tobytes() != self._header(key, state, memory):
            with contextlib.suppress(OSError):
                os.unlink(path)
            return False
        self._touch(path, place)
        return True

    def write(self, key: bytes, memory: Bytes, *, state: bool, place: int = 0) -> int:
        """Writes a file, unless it is there. Makes room if the folder is over its limit.

        Args:
            memory: room for the header, and the content. The header is written into it.

        Returns:
            The bytes written; 0: it was there.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        path, size = self._path(key, state), len(memory)
        with contextlib.suppress(OSError):
            if os.stat(path).st_size == size:  # a crash of the system may leave a shorter one
                self._touch(path, place)
                return 0
        if not os.path.isdir(self._folder):  # somebody has deleted it, which is allowed
            self.open()
        self._make_room(size)
        memory[:HEADER] = np.frombuffer(self._header(key, state, memory), np.uint8)
        temporary = self._folder / f".{os.getpid()}-{next(_numbers)}.part"
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                left = memory.data
                while left:
                    left = left[os.write(handle, left[:_AT_ONCE]) :]
            finally:
                os.close(handle)
            self._touch(temporary, place)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._unseen += size
        return size

    def _path(self, key: bytes, state: bool) -> str:
        return f"{self._folder}/{key.hex()}.{'state' if state else 'kv'}"

    def _header(self, key: bytes, state: bool, memory: Bytes) -> bytes:
        content = memory[HEADER:]
        kind = _STATE if state else _PAGES
        return _FORM.pack(_MAGIC, kind, 0, key, self._mark, len(content), self._checksum(content))

    @staticmethod
    def _touch(path: str | Path, place: int) -> None:
        """Makes a file the one that was used last, after the pages before it."""
        at = time.time() - place * _STEP
        with contextlib.suppress(OSError):
            os.utime(path, (at, at))

    def _make_room(self, size: int) -> None:
        """Deletes what was not used for longest, where a file of `size` bytes would be too much.

        Raises:
            OSError: there is no room on the disk.
        """
        if size > self._limit // 4:
            raise OSError(f"a file of {size >> 20} MiB is too large for a folder of {self._limit >> 20} MiB")
        if self._unseen + size > self._limit // _SCANS:
            self._trim(self._limit - size - self._limit // _SCANS)
        disk = shutil.disk_usage(self._base)
        short = size + min(_ROOM, disk.total // 20) - disk.free
        if short <= 0:
            return
        held = self._held()
        if held < short or self._trim(held - short) < short:  # what others have filled is not made good by our files
            raise OSError(f"the disk has {disk.free >> 20} MiB left")

    def _files(self) -> list[tuple[float, int, str]]:
        """Time of the last use, size and path of every file of ours."""
        found = []
        with os.scandir(self._base) as folders:
            ours = [folder.path for folder in folders if _FOLDER.fullmatch(folder.name) and folder.is_dir()]
        for folder in ours:
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    if not _NAME.fullmatch(file.name):
                        continue
                    with contextlib.suppress(OSError):
                        facts = file.stat(follow_symlinks=False)
                        found.append((facts.st_mtime, facts.st_size, file.path))
        return found

    def _held(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _trim(self, most: int) -> int:
        """Deletes files until at most `most` bytes are left; returns the bytes that are gone."""
        files, now, gone = self._files(), time.time(), 0
        total, self._unseen = sum(size for _, size, _ in files), 0
        enough = most if total <= most else int(most * _LOW)
        for used, size, path in sorted(files):
            unfinished = path.endswith(".part")
            if (unfinished and now - used < _STALE) or (not unfinished and total - gone <= enough):
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)
                gone += size
        return gone


def _filled(file: Any, memory: Bytes) -> bool:
    """Reads until the memory is full; False: the file ends before."""
    left = memory.data
    while left:
        count = file.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True
