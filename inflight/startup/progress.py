"""Shows how far a long task is: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import glob
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("inflight.progress")
"""Has a level of its own where lines are to be log lines (`inflight.log`)."""

INTERVAL = 10.0
"""Seconds between two lines."""
SHARE = 0.25
"""A part of the whole; a line is also written whenever another such part is done."""
QUICK = 1.0
"""Seconds from the start before which no line is written."""


def size_text(count: float) -> str:
    """`1.2 GB`: three figures at most, powers of 1000 as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def weight_bytes(model: Path) -> int:
    """Bytes of a model's weights on disk: of a GGUF file with all its parts, or of a folder; 0 where there are none."""
    if model.is_file():
        first = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", model.name)
        files = model.parent.glob(f"{glob.escape(first[1])}-*-of-*.gguf") if first else [model]
        return sum(file.stat().st_size for file in files)
    for ending in ("safetensors", "gguf", "bin"):
        if size := sum(file.stat().st_size for file in model.glob(f"*.{ending}")):
            return size
    return 0


class ProgressBar:
    """Shows on stderr how many bytes of a task are done. To be used by one thread at a time.

    Args:
        what: `fetching org/name`.
        total: bytes; 0: unknown, then only shares are shown.
        lines: write lines where stderr is not a terminal.
    """

    def __init__(self, what: str, total: int, *, lines: bool = True) -> None:
        self._what = what
        self._total = total
        self._lines = lines
        self._done = 0.0
        self._start = self._last = time.monotonic()
        self._shown = 0
        self._bar: Any = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def share(self, done: float) -> None:
        """Sets the share that is done, 0 to 1."""
        self.bytes(done * (self._total or 1))

    def bytes(self, done: float) -> None:
        """Sets the number of bytes that are done in all."""
        if self._closed.is_set() or done <= self._done:
            return
        self._done = done
        if sys.stderr.isatty() and _bars() is not None:
            self._draw()
        elif self._lines:
            self._write()

    def watch(self, count: Callable[[], int], seconds: float) -> None:
        """Calls `count` for the bytes done every few seconds, on a thread, until `close`."""

        def look() -> None:
            while not self._closed.wait(seconds):
                self.bytes(count())

        self._thread = threading.Thread(target=look, name="progress", daemon=True)
        self._thread.start()

    def close(self, whole: bool = True) -> None:
        """Ends the display. Idempotent.

        Args:
            whole: the task was done to its end; a last line says how long it took.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            if whole:
                self._bar.update((self._total or 1) - self._bar.n)
            self._bar.close()
        elif whole and self._lines and not (sys.stderr.isatty() and _bars()):
            seconds = time.monotonic() - self._start
            amount = f"{size_text(self._total)} in " if self._total else ""
            self._print(f"{amount}{seconds:.1f} s{_rate(self._total, seconds)}")

    def _draw(self) -> None:
        if self._bar is None:
            bars = _bars()
            assert bars is not None
            self._bar = bars(total=self._total or 1, desc=self._what, unit="B", unit_scale=True, mininterval=0.2)
        self._bar.update(self._done - self._bar.n)

    def _write(self) -> None:
        now = time.monotonic()
        quarter = int(self._done / (self._total or 1) / SHARE)
        if now - self._start < QUICK or (quarter <= self._shown and now - self._last < INTERVAL):
            return
        if self._done >= (self._total or 1):
            return  # `close` says so
        self._shown, self._last = quarter, now
        percent = f"{100 * self._done / (self._total or 1):.0f} %"
        amount = f"{size_text(self._done)} of {size_text(self._total)}, " if self._total else ""
        self._print(f"{amount}{percent}{_rate(self._done if self._total else 0, now - self._start)}")

    def _print(self, text: str) -> None:
        tell(f"{self._what}: {text}")


def tell(line: str) -> None:
    """Writes a line to stderr, as JSON where all lines of the log are."""
    if _LOG.level == logging.INFO:
        _LOG.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


def _rate(count: float, seconds: float) -> str:
    return f", {size_text(count / seconds)}/s" if count and seconds > 0.05 else ""


@cache
def _bars() -> Any:
    """tqdm's bar, which comes with huggingface_hub and takes 0.05 s to import: only where there is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
