"""Workers are killed at random times, while they work, rest and load, and no client sees it.

`INFLIGHT_KILLS=200 pytest tests/e2e/test_chaos.py` kills more often than the suite does; `INFLIGHT_SEED` repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import psutil

from inflight.client import Client
from inflight.config import ServableConfig
from tests.e2e.running import ask, connect, eventually, request, running, workers, write_servable

KILLS = int(os.environ.get("INFLIGHT_KILLS", "8"))
SEED = int(os.environ.get("INFLIGHT_SEED", str(random.SystemRandom().getrandbits(32))))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

STAGES = """
    import time
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    time.sleep(0.1)  # loading takes a while, so that it is hit too

    def add_one(x):
        time.sleep(0.002)
        return x + 1

    model = declare_model(add_one, "callable")

    def twice(x):
        return x * 2

    def by_call(x):
        return model.call(x)

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(twice, add_stage(model, x, outputs_count=1), outputs_count=1)

    @register_method(output_names=["y"])
    def called(x):
        return add_stage(twice, add_stage(by_call, x, outputs_count=1), outputs_count=1)
"""

MODEL = """
    import time
    from inflight.servable import add_stage, declare_model, register_method

    def run(x):
        time.sleep(0.01)
        return (x + 1) * 2

    model = declare_model(run, "callable")

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(model, x, outputs_count=1)
"""


class Load:
    """Clients in closed loops; `problems` is what any of them saw that was no right answer."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.answers = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self.connections = ExitStack()

    def add(self, once: Callable[[float], float]) -> None:
        """A client: `once` asks for a number and returns the answer, which is 2 (number + 1)."""

        def loop() -> None:
            number = 0
            while not self._ended.is_set():
                number += 1
                try:
                    answer = once(number)
                except Exception as error:
                    self.problems.append(f"{type(error).__name__}: {error}")
                    return
                if answer != 2 * (number + 1):
                    self.problems.append(f"{number} gave {answer}")
                self.answers += 1

        self._threads.append(threading.Thread(target=loop, daemon=True))
        self._threads[-1].start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client waits for ever"
        self.connections.close()


def rest(address: str, servable: str, method: str, connections: ExitStack) -> Callable[[float], float]:
    connection = connections.enter_context(closing(connect(address)))

    def once(number: float) -> float:
        body = json.dumps({"instances": [{"x": number}, {"x": number}]})
        connection.request("POST", f"/model/{servable}:{method}", body)
        reply = json.loads(connection.getresponse().read())
        first, second = (one.get("y", one) for one in reply.get("instances", [reply, reply]))
        assert first == second, reply
        return float(first)

    return once


def oip(address: str, servable: str, method: str, connections: ExitStack) -> Callable[[float], float]:
    connection = connections.enter_context(closing(connect(address)))

    def once(number: float) -> float:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}
        connection.request("POST", f"/v2/models/{servable}.{method}/infer", json.dumps({"inputs": [tensor]}))
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text
        return float(json.loads(text)["outputs"][0]["data"][0])

    return once


def grpc(address: str, servable: str, method: str, connections: ExitStack) -> Callable[[float], float]:
    client = connections.enter_context(Client(address, servable, method, timeout=60))

    def once(number: float) -> float:
        reply = client.infer({"x": np.float32(number)})[0]
        assert "y" in reply, reply
        return float(reply["y"])

    return once


def kill_at_random(kills: int, random: random.Random) -> None:
    """Kills workers one after the other, whatever they do; between two kills passes less or more than a load takes."""
    for _ in range(kills):
        eventually(workers, 60)
        os.kill(random.choice(workers()), random.choice(SIGNALS))
        time.sleep(random.uniform(0, 0.8))


def test_nobody_sees_that_workers_are_killed(tmp_path: Path) -> None:
    """A servable of two devices and an extra worker that borrows their models, and two of a single worker."""
    seeded = random.Random(SEED)
    for name, config in (("stages", STAGES), ("model", MODEL), ("idle", MODEL)):
        write_servable(tmp_path, name, config)
    several = ServableConfig(tmp_path, "stages", device_ids=(0, 1), num_parallel_workers=3)
    with running(several, *(ServableConfig(tmp_path, name) for name in ("model", "idle"))) as served:
        descriptors = psutil.Process().num_fds()
        load = Load()
        for door, address in ((rest, served.http), (oip, served.http), (grpc, served.grpc)):
            for servable, method in (("model", "predict"), ("stages", "predict"), ("stages", "called")):
                load.add(door(address, servable, method, load.connections))
        kill_at_random(KILLS, seeded)
        before = load.answers
        eventually(lambda: load.answers > before + 50 or load.problems, 60)
        load.end()
        assert not load.problems, (SEED, load.problems[:5])
        # Nobody asked this one meanwhile, and it comes back all the same.
        eventually(lambda: request(served.http, "GET", "/v2/models/idle/ready")[0] == 200, 60)
        assert ask(served.http, "idle", "predict", 1.5) == {"instances": [{"y": 5.0}]}
        # A process that is gone leaves nothing: its socket, its memory and what waits for its end are three each.
        eventually(lambda: len(workers()) == 5)
        eventually(lambda: psutil.Process().num_fds() < descriptors + KILLS)
