"""The router with real worker processes: replicas, loss and replay, limits, life-cycle."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from inflight.config import RestartPolicy, ServableConfig, ServerConfig
from inflight.contract import Outcome, Row
from inflight.errors import (
    ConfigError,
    DeadlineExceeded,
    InflightError,
    NotFound,
    Overloaded,
    StartError,
    Unavailable,
    WorkerLost,
)
from inflight.frontends.base import predict
from inflight.metrics import Metrics
from inflight.router import Router
from tests.conftest import binary_model

ECHO = """
    import os, time
    from inflight.servable import add_stage, register_method

    def same(x):
        if isinstance(x, str) and x == "die":
            os._exit(3)
        return x

    def sleep(seconds):
        time.sleep(float(seconds))
        return os.getpid()

    def who(x):
        return int(os.environ.get("SERVING_DEVICE_ID", -1))

    @register_method(output_names=["y"])
    def echo(x):
        return add_stage(same, x, outputs_count=1)

    @register_method(output_names=["pid"])
    def nap(x):
        return add_stage(sleep, x, outputs_count=1)

    @register_method(output_names=["pid"], queue_size=2)
    def short_queue(x):
        return add_stage(sleep, x, outputs_count=1)

    @register_method(output_names=["pid"], timeout=0.2)
    def hasty(x):
        return add_stage(sleep, x, outputs_count=1)

    @register_method(output_names=["device"])
    def device(x):
        return add_stage(who, x, outputs_count=1)
"""

ADD = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("add.onnx", "onnx")

    def times_ten(y):
        return y * 10

    def by_call(x1, x2):
        return model.call(x1, x2)

    def by_call_many(instances):
        for (y,) in model.call([list(instance) for instance in instances]):
            yield y

    def wrong_call(x1, x2):
        return model.call(x1)

    @register_method(output_names=["y"])
    def add(x1, x2):
        return add_stage(model, x1, x2, outputs_count=1)

    @register_method(output_names=["y"])
    def add_ten(x1, x2):
        return add_stage(times_ten, add_stage(model, x1, x2, outputs_count=1), outputs_count=1)

    @register_method(output_names=["y"])
    def called(x1, x2):
        return add_stage(by_call, x1, x2, outputs_count=1)

    @register_method(output_names=["y"])
    def called_many(x1, x2):
        return add_stage(by_call_many, x1, x2, outputs_count=1, batch_size=8)

    @register_method(output_names=["y"])
    def called_wrong(x1, x2):
        return add_stage(wrong_call, x1, x2, outputs_count=1)
"""


def run(body: Callable[[Router], Coroutine[Any, Any, None]], config: ServerConfig = ServerConfig()) -> None:
    """Runs a test on a router and checks that nothing is left of it."""

    async def main() -> None:
        router = Router(config, Metrics())
        try:
            await asyncio.wait_for(body(router), 60)
        finally:
            await router.stop()
        assert router.in_flight == 0

    before = children()
    asyncio.run(main())
    assert children() == before


def children() -> list[int]:
    return sorted(child.pid for child in psutil.Process().children(recursive=True))


async def ask(router: Router, name: str, method: str, *rows: Row, **more: Any) -> list[Outcome]:
    return list(await predict(router, router.method(name, 0, method), list(rows), **more))


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


def pair(a: float, b: float = 0.0) -> list[np.ndarray]:
    return [np.full((2, 2), a, np.float32), np.full((2, 2), b, np.float32)]


def worker_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


@pytest.fixture
def echo(servable: Callable[..., Path]) -> ServableConfig:
    return ServableConfig(servable("echo", ECHO), "echo")


@pytest.fixture
def add(servable: Callable[..., Path]) -> ServableConfig:
    return ServableConfig(servable("add", ADD, {"1/add.onnx": binary_model()}), "add")


def test_values_of_every_kind_come_back(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        big = np.arange(300_000, dtype=np.float64)
        rows: list[Row] = [["text"], [np.array(2.5, np.float16)], [np.zeros((0, 3), np.int8)], [big], ["x" * 100_000]]
        outcomes = await ask(router, "echo", "echo", *rows)
        for row, outcome in zip(rows, outcomes):
            assert not isinstance(outcome, InflightError)
            assert np.array_equal(np.asarray(outcome[0]), np.asarray(row[0]))
        (large,) = await ask(router, "echo", "echo", [b"\xff" * 200_000])
        assert not isinstance(large, InflightError)
        assert np.asarray(large[0]).tobytes() == b"\xff" * 200_000
        del outcomes, outcome, large
        await ask(router, "echo", "echo", ["again"])
        assert router.fleet.inbox.in_use == 0

    run(body)


@pytest.mark.parametrize("method", ["add", "called", "called_many"])
def test_every_way_to_reach_a_model_agrees(add: ServableConfig, method: str) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([add])
        outcomes = await ask(router, "add", method, *(pair(i, 1) for i in range(100)))
        assert [float(outcome[0][0, 0]) for outcome in outcomes] == [i + 1 for i in range(100)]  # type: ignore

    run(body)


def test_extra_workers_use_the_models_of_device_workers(add: ServableConfig) -> None:
    from msgspec.structs import replace

    config = replace(add, num_parallel_workers=3)

    async def body(router: Router) -> None:
        await router.fleet.start([config])
        assert len(worker_pids()) == 3
        assert router.servables()[0].ready_replicas == 3
        for method, factor in (("add_ten", 10), ("called", 1), ("called_many", 1)):
            outcomes = await asyncio.gather(*(ask(router, "add", method, pair(i, 1)) for i in range(60)))
            assert [float(outcome[0][0][0, 0]) for outcome in outcomes] == [(i + 1) * factor for i in range(60)]  # type: ignore
        wrong = await ask(router, "add", "called_wrong", *(pair(1) for _ in range(9)))
        assert all("The inputs count 1 of instance 0 is not equal" in str(outcome) for outcome in wrong), wrong

    run(body)


def test_replicas_share_the_work(echo: ServableConfig) -> None:
    from msgspec.structs import replace

    async def body(router: Router) -> None:
        await router.fleet.start([replace(echo, device_ids=(0, 1, 2))])
        outcomes = await asyncio.gather(*(ask(router, "echo", "nap", ["0.05"]) for _ in range(12)))
        pids = {int(outcome[0][0]) for outcome in outcomes}  # type: ignore
        assert pids == set(worker_pids())
        devices = await asyncio.gather(*(ask(router, "echo", "device", ["x"]) for _ in range(30)))
        assert {int(outcome[0][0]) for outcome in devices} == {0, 1, 2}  # type: ignore

    run(body)


def test_a_killed_worker_is_back_soon_and_its_work_is_done(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        await ask(router, "echo", "echo", ["warm"])
        running = [asyncio.ensure_future(ask(router, "echo", "nap", [str(0.2 + i / 100)])) for i in range(3)]
        await asyncio.sleep(0.1)
        (old,) = worker_pids()
        killed = time.monotonic()
        os.kill(old, signal.SIGKILL)
        (answer,) = await ask(router, "echo", "echo", ["hello"])
        assert answer == ["hello"]
        assert time.monotonic() - killed < 4, "back within 2 s on an idle machine, with room for a busy one"
        for outcome in await asyncio.gather(*running):
            assert not isinstance(outcome[0], InflightError)
            assert int(outcome[0][0]) != old  # type: ignore
        (new,) = worker_pids()
        assert new != old

    run(body)


def test_a_request_that_kills_its_worker_fails_alone(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        tasks = [ask(router, "echo", "echo", ["die" if i == 4 else f"fine {i}"]) for i in range(12)]
        outcomes = [outcome[0] for outcome in await asyncio.gather(*tasks)]
        assert isinstance(outcomes[4], WorkerLost)
        assert "died 2 times" in str(outcomes[4])
        assert [outcome for i, outcome in enumerate(outcomes) if i != 4] == [[f"fine {i}"] for i in range(12) if i != 4]
        assert await ask(router, "echo", "echo", ["after"]) == [["after"]]

    run(body)


def test_a_worker_that_leaves_on_a_signal_blames_nobody(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        for _ in range(3):
            nap = asyncio.ensure_future(ask(router, "echo", "nap", ["0.3"]))
            await asyncio.sleep(0.1)
            (old,) = worker_pids()
            os.kill(old, signal.SIGTERM)
            assert not isinstance((await nap)[0], InflightError)
            await eventually(lambda old=old: router.ready and old not in worker_pids())  # type: ignore[misc]

    run(body)


def test_the_old_rules_of_restart(echo: ServableConfig) -> None:
    lost: list[bool] = []
    config = ServerConfig(restart=RestartPolicy(only_proven=True))

    async def main() -> None:
        router = Router(config, Metrics(), on_all_lost=lambda: lost.append(True))
        await router.fleet.start([echo])
        await ask(router, "echo", "echo", ["proven"])
        (old,) = worker_pids()
        os.kill(old, signal.SIGKILL)
        await eventually(lambda: router.ready and old not in worker_pids())
        assert not lost
        os.kill(worker_pids()[0], signal.SIGKILL)  # it has answered nothing since
        await eventually(lambda: lost)
        with pytest.raises(Unavailable, match="servable is not available"):
            await ask(router, "echo", "echo", ["nobody"])
        await router.stop()

    asyncio.run(main())
    assert not children()


def test_limits_refuse_at_once(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        router.max_enqueued = 4
        naps = [asyncio.ensure_future(ask(router, "echo", "nap", ["0.2"])) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="enqueued requests count exceeds the limit 4"):
            await ask(router, "echo", "echo", ["x"])
        assert not all(nap.done() for nap in naps), "it does not wait"
        await asyncio.gather(*naps)
        router.max_enqueued = 100
        burst = await asyncio.gather(
            *(ask(router, "echo", "short_queue", ["0.05"]) for _ in range(20)), return_exceptions=True
        )
        refused = [one for one in burst if isinstance(one, Overloaded)]
        assert 0 < len(refused) < 20
        assert "2 of 2 instances wait" in str(refused[0])
        assert all(isinstance(one, (Overloaded, Sequence)) for one in burst)

    run(body)


def test_deadlines_and_cancelled_callers_drop_queued_work(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        first = asyncio.ensure_future(ask(router, "echo", "nap", ["1.0"]))
        await asyncio.sleep(0.1)
        with pytest.raises(DeadlineExceeded, match=r"longer than its 0.1 seconds"):
            await ask(router, "echo", "nap", ["30"], timeout=0.1)
        with pytest.raises(DeadlineExceeded, match=r"longer than its 0.2 seconds"):
            await ask(router, "echo", "hasty", ["30"])
        left = asyncio.ensure_future(ask(router, "echo", "nap", ["30"]))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await first
        start = time.monotonic()
        assert await ask(router, "echo", "echo", ["next"]) == [["next"]]
        assert time.monotonic() - start < 5, "the abandoned naps must not run"

    run(body)


def test_unknown_names_and_hidden_methods_are_not_found(add: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([add])
        with pytest.raises(NotFound, match=r"servable is not available; the server has: add"):
            router.method("sub", 0, "add")
        with pytest.raises(NotFound, match="servable is not available"):
            router.method("add", 7, "add")
        with pytest.raises(NotFound, match="method is not available; it has: add, add_ten"):
            router.method("add", 0, "sub")
        with pytest.raises(NotFound, match="method is not available"):
            router.method("add", 0, "@call_add.onnx_0")
        assert not await ask(router, "add", "add")  # nothing was asked

    run(body)


def test_versions(servable: Callable[..., Path]) -> None:
    files = {"1/add.onnx": binary_model("Add"), "3/add.onnx": binary_model("Sub")}
    directory = servable("add", ADD, files)

    async def body(router: Router) -> None:
        await router.fleet.start([ServableConfig(directory, "add", version=1), ServableConfig(directory, "add")])
        for version, wanted in ((0, 3.0), (1, 7.0), (3, 3.0)):
            (outcome,) = await predict(router, router.method("add", version, "add"), [pair(5, 2)])
            assert outcome[0][0, 0] == wanted  # type: ignore
        with pytest.raises(ConfigError, match="version 3 of servable 'add' is already started"):
            await router.fleet.start([ServableConfig(directory, "add")])

    run(body)


@pytest.mark.parametrize(
    ("config", "files", "text"),
    [
        ("import nothing_of_that_name", {}, "import broken.servable_config failed, No module named"),
        ("x = 1", {}, "There is no method registered for servable"),
        (ADD, {}, "There is no valid version directory of models"),
        (ADD, {"1/other.onnx": b""}, "Load model failed, servable directory: "),
        (ADD, {"1/add.onnx": b"not a model"}, "Load model failed, servable directory: "),
        ("import os; os._exit(7)", {}, "ended with status 7"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    servable: Callable[..., Path], config: str, files: dict[str, bytes], text: str
) -> None:
    directory = servable("broken", config, files)

    async def body(router: Router) -> None:
        with pytest.raises(StartError) as caught:
            await router.fleet.start([ServableConfig(directory, "broken", device_ids=(0, 1))])
        assert str(caught.value).startswith("Fail to start workers: ")
        assert text in str(caught.value)
        assert not worker_pids()
        assert router.servables() == []

    run(body)


def test_a_worker_that_takes_too_long_is_given_up(servable: Callable[..., Path]) -> None:
    directory = servable("late", "import time; time.sleep(60)")

    async def body(router: Router) -> None:
        with pytest.raises(StartError, match=r"was not ready within 0.5 seconds"):
            await router.fleet.start([ServableConfig(directory, "late")])

    run(body, ServerConfig(start_timeout=0.5))


def test_what_runs_is_finished_before_the_server_stops(echo: ServableConfig) -> None:
    async def main() -> None:
        router = Router(ServerConfig(), Metrics())
        await router.fleet.start([echo])
        nap = asyncio.ensure_future(ask(router, "echo", "nap", ["0.5"]))
        await asyncio.sleep(0.1)
        stopping: Awaitable[None] = asyncio.ensure_future(router.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="servable is not available, the server stops"):
            await ask(router, "echo", "echo", ["late"])
        assert not isinstance((await nap)[0], InflightError)
        await stopping

    asyncio.run(main())
    assert not children()


def test_work_that_does_not_end_is_cut_when_the_server_stops(echo: ServableConfig) -> None:
    async def main() -> None:
        router = Router(ServerConfig(stop_timeout=0.3), Metrics())
        await router.fleet.start([echo])
        nap = asyncio.ensure_future(ask(router, "echo", "nap", ["60"]))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await router.stop()
        assert time.monotonic() - start < 4
        outcome = (await nap)[0]
        assert isinstance(outcome, Unavailable)

    asyncio.run(main())
    assert not children()


def test_a_bare_model_file_is_a_servable(tmp_path: Path) -> None:
    file = tmp_path / "sum.onnx"
    file.write_bytes(binary_model())

    async def body(router: Router) -> None:
        await router.fleet.start([ServableConfig(tmp_path, "sum", model_file=file)])
        method = router.method("sum", 0, "predict")
        assert [(spec.name, spec.dtype, spec.shape) for spec in method.inputs] == [
            ("x1", "float32", (2, 2)),
            ("x2", "float32", (2, 2)),
        ]
        (outcome,) = await predict(router, method, [pair(1, 2)])
        assert np.array_equal(outcome[0], np.full((2, 2), 3, np.float32))  # type: ignore

    run(body)
