"""Memory and processor time of a whole server, as the system counts them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from inflight.client import Client
from tests.e2e.running import SLOW_MODEL, Background, ask, connect, eventually, in_flight, serve, write_servable

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DOUBLER = """
    from inflight.servable import add_stage, register_method

    def twice(x):
        return x * 2

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(twice, x, outputs_count=1)
"""

HELD = """
    import os, time
    from inflight.servable import add_stage, register_method

    def same(x):
        return x

    def until(path):
        while not os.path.exists(path):
            time.sleep(0.02)
        return path

    @register_method(output_names=["y"])
    def echo(x):
        return add_stage(same, x, outputs_count=1)

    @register_method(output_names=["y"])
    def wait(x):
        return add_stage(until, x, outputs_count=1)
"""
"""A servable whose worker is held for as long as there is no such file."""


@linux
@pytest.mark.parametrize("client", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_large_arrays_come_back_right_and_leave_no_memory(tmp_path: Path, client: Any) -> None:
    write_servable(tmp_path, "double", DOUBLER)
    with serve(tmp_path, str(tmp_path / "double")) as served:
        server = psutil.Process(served.pid)
        array = np.random.default_rng(0).standard_normal((1, 1 << 21)).astype(np.float32)  # 8 MiB
        with client.InferenceServerClient(served.grpc if client is triton_grpc else served.http) as asked:

            def once() -> None:
                tensor = client.InferInput("x", array.shape, "FP32")
                tensor.set_data_from_numpy(array)
                assert np.array_equal(asked.infer("double", [tensor]).as_numpy("y"), array * 2)

            for _ in range(4):
                once()
            processes = [server, *server.children()]
            before = [process.memory_info().rss for process in processes]
            for _ in range(10):
                once()
            growth = [process.memory_info().rss - size for process, size in zip(processes, before)]
        assert max(growth) < 24 << 20, "less than one in and one out and a half: 10 of each would be 160 MiB"


@linux
def test_requests_that_nobody_waits_for_hold_no_memory(tmp_path: Path) -> None:
    write_servable(tmp_path, "work", HELD)
    go_on = tmp_path / "go on"  # however long the requests take on a busy machine
    with serve(tmp_path, str(tmp_path / "work")) as served:
        server = psutil.Process(served.pid)
        blocker = Background(ask, served.http, "work", "wait", str(go_on))
        eventually(lambda: in_flight(served.http) == 1)
        body = b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[1,%d],"parameters":{"binary_data_size":%d}}]}'
        size = 8 << 20
        head = body % (size, size)
        sent = 0
        before = server.memory_info().rss
        for _ in range(25):
            connection = connect(served.http)
            headers = {"Inference-Header-Content-Length": str(len(head))}
            connection.request("POST", "/v2/models/work.echo/infer", head + bytes(size), headers)
            eventually(lambda: in_flight(served.http) == 2)
            connection.close()
            eventually(lambda: in_flight(served.http) == 1)
            sent += size
        assert not blocker.done, "the worker was free meanwhile; the test says nothing"
        assert server.memory_info().rss - before < sent // 3
        go_on.touch()
        blocker.result()
        assert ask(served.http, "work", "echo", 1) == {"instances": [{"y": 1}]}


@linux
@pytest.mark.alone
def test_a_server_at_rest_uses_no_processor(tmp_path: Path) -> None:
    write_servable(tmp_path / "all", "work")
    write_servable(tmp_path / "all", "model", SLOW_MODEL)
    with serve(tmp_path, str(tmp_path / "all")) as served, Client(served.grpc, "work", "echo", timeout=60) as client:
        assert ask(served.http, "work", "echo", 1) == {"instances": [{"y": 1}]}
        assert ask(served.http, "model", "nap", 0) == {"instances": [{"y": 0}]}
        assert client.infer({"x": 1})[0]["y"] == 1
        resting = connect(served.http)
        resting.request("GET", "/health/ready")
        resting.getresponse().read()
        server = psutil.Process(served.pid)
        processes = [server, *server.children()]
        time.sleep(0.5)

        def used() -> list[float]:
            return [sum(process.cpu_times()[:2]) for process in processes]

        before = used()
        time.sleep(3)
        tick = 1 / os.sysconf("SC_CLK_TCK")
        assert all(after - start <= 1.5 * tick for after, start in zip(used(), before))
        resting.close()
