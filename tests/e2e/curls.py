"""The curl commands that the pages of the documentation show, to be run against a test's server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.running import Served

DOCS = Path(__file__).resolve().parents[2] / "docs"
NEEDS = {
    "all-MiniLM-L6-v2": "texts",
    "/rerank": "texts",
    "storyteller": "storyteller",
    "cat.png": "pictures",
    "lora_adapter": "admin",
}
"""What tells that a command needs another server than one of the pocket model."""


def curls(page: str, needs: str = "pocket") -> list[str]:
    """The commands of a page whose server has such a model."""
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    found = [line for line in lines if line.startswith("curl ")]
    return [line for line in found if next((kind for mark, kind in NEEDS.items() if mark in line), "pocket") == needs]


def answered(served: Served, command: str) -> str:
    """What a command prints; its status is 200."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = command.replace("127.0.0.1:8080", served.http).replace("curl ", "curl -sS --fail-with-body ", 1)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
