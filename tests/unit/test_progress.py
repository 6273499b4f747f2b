"""How far something is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from inflight.startup import ProgressBar, size_text, weight_bytes

CODE = """
from inflight.startup import ProgressBar
bar = ProgressBar("pocket, weights", 3_000_000)
for done in (0.1, 0.5, 1.0):
    bar.share(done)
bar.close()
"""


def test_sizes() -> None:
    sizes = (0, 999, 1000, 99_400, 99_600, 999_600, 1_234_567_890, 5e15)
    assert [size_text(size) for size in sizes] == [
        *("0 B", "999 B", "1.0 kB", "99.4 kB", "100 kB", "1.0 MB", "1.2 GB", "5000.0 TB")
    ]


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = ProgressBar("fetching org/name", 4_000_000_000)
    for seconds, share in ((0.5, 0.2), (2, 0.26), (3, 0.3), (14, 0.4), (15, 0.6), (18, 0.99), (20, 1.0)):
        now[0] = 100 + seconds
        bar.share(share)
    bar.close()
    bar.close()
    bar.share(1.0)
    assert capsys.readouterr().err.splitlines() == [
        "fetching org/name: 1.0 GB of 4.0 GB, 26 %, 520 MB/s",
        "fetching org/name: 1.6 GB of 4.0 GB, 40 %, 114 MB/s",
        "fetching org/name: 2.4 GB of 4.0 GB, 60 %, 160 MB/s",
        "fetching org/name: 4.0 GB of 4.0 GB, 99 %, 220 MB/s",
        "fetching org/name: 4.0 GB in 20.0 s, 200 MB/s",
    ]
    ProgressBar("quiet", 9, lines=False).close()
    ProgressBar("given up", 9).close(whole=False)
    assert not capsys.readouterr().err


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", CODE], stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # that is how a terminal ends
        pass
    os.close(ours)
    assert done.returncode == 0
    assert b"pocket, weights: 100%" in shown
    assert b"3.00M/3.00M" in shown


def test_bytes_of_weights(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 3), ("b.safetensors", 4), ("old.bin", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 7
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(b"xx")
    (tmp_path / "other.gguf").write_bytes(b"xxxxx")
    assert weight_bytes(tmp_path / "m-00001-of-00002.gguf") == 4
    assert weight_bytes(tmp_path / "other.gguf") == 5
    assert weight_bytes(tmp_path / "nothing") == 0
