"""What scripts written for MindSpore Serving look for in a worker's log file."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from inflight.config import ServableConfig, ServerConfig
from inflight.metrics import Metrics
from inflight.router import Router
from tests.conftest import binary_model
from tests.e2e.test_router import ADD, ask, pair


@pytest.mark.parametrize(("level", "timed"), [("1", True), ("2", False)])
def test_each_request_is_timed_at_level_info(
    servable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, level: str, timed: bool
) -> None:
    monkeypatch.setenv("GLOG_v", level)
    directory = servable("add", ADD, {"1/add.onnx": binary_model()})
    logs = directory / "serving_logs"

    async def main() -> None:
        router = Router(ServerConfig(log_dir=logs), Metrics())
        try:
            await router.fleet.start([ServableConfig(directory, "add")])
            await ask(router, "add", "add_ten", pair(1))
        finally:
            await router.stop()

    asyncio.run(main())
    text = (logs / "log_add_device0_version1.log").read_text()
    started = (
        f"Serving: Start servable success, servable directory: '{directory}', servable name: 'add', version number: 1"
    )
    assert started in text
    lines = re.findall(
        r"^\[INFO\] SERVING\(\d+:\d+,.*\):\d{4}(?:-\d\d){2}-\d\d:\d\d:\d\d\.\d{3}\.\d{3} "
        r"\[.*:\d+\] WorkerRequestHandle Time Cost # [0-9.]+ ms$",
        text,
        re.M,
    )
    assert len(lines) == timed, text
