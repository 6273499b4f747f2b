"""Nothing phones home: models are loaded and run in a network namespace without routes, and nobody tries to connect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRACED = "connect,sendto,sendmsg,sendmmsg"
OUTSIDE = re.compile(r"^\d+ +(connect|send\w+)\(.*\bAF_INET", re.MULTILINE)

CAN = shutil.which("strace") is not None and shutil.which("unshare") is not None
if CAN:
    CAN = (
        subprocess.run(
            ["unshare", "-rn", "strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "-o", "/dev/null", "true"],
            capture_output=True,
        ).returncode
        == 0
    )

needs_tools = pytest.mark.skipif(not CAN, reason="needs strace, and unshare with the right to make a network namespace")


def attempts(directory: Path, *command: str) -> list[str]:
    """What a Python process and its children tried to reach over the network."""
    trace = directory / "trace"
    home, temporary = directory / "home", directory / "temporary"
    for folder in (home, temporary):
        folder.mkdir(exist_ok=True)
    switches = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    subprocess.run(
        [
            "unshare",
            "-rn",
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-e",
            f"trace={TRACED}",
            "-o",
            str(trace),
            sys.executable,
            *command,
        ],
        check=True,
        timeout=300,
        capture_output=True,
        env={**environment, "HOME": str(home), "TMPDIR": str(temporary)},
    )
    return [match[0] for match in OUTSIDE.finditer(trace.read_text())]


@needs_tools
def test_an_attempt_is_seen(tmp_path: Path) -> None:
    assert attempts(tmp_path, "-c", "import socket; socket.socket().connect_ex(('192.0.2.1', 80))")


@needs_tools
def test_no_runtime_phones_home(tmp_path: Path) -> None:
    """Neither onnxruntime, torch, the MindIR converter, tokenizers nor transformers; no file is left for it either."""
    assert attempts(tmp_path, "-m", "tests.e2e.network_probe", str(tmp_path)) == []
    assert list((tmp_path / "home").rglob("*")) == []
    assert list((tmp_path / "temporary").glob(".*")) == []
