"""What becomes of requests while a worker is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inflight.config import RestartPolicy, ServableConfig, ServerConfig
from inflight.errors import DeadlineExceeded, InflightError, Overloaded, StartError, Unavailable
from inflight.metrics import Metrics
from inflight.router import Router
from tests.e2e.test_router import ECHO, ask, eventually, run, worker_pids

GATED = """
    import os, time
    from inflight.servable import add_stage, register_method

    while not os.path.exists("{gate}"):
        time.sleep(0.01)

    def same(x):
        return x

    @register_method(output_names=["y"], queue_size=3)
    def echo(x):
        return add_stage(same, x, outputs_count=1)
"""
"""A servable that loads when a file is there."""

SOON = ServerConfig(restart=RestartPolicy(first_delay=0.05, max_delay=0.2))


def replaced(pid: int, number: int) -> bool:
    """Whether another worker is there; else the one is signalled: a Python that has hardly begun may miss a SIGINT."""
    found = worker_pids()
    if found == [pid]:
        os.kill(pid, number)
    return found not in ([], [pid])


def test_requests_wait_while_somebody_kills_the_worker_that_loads(
    servable: Callable[..., Path], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    config = ServableConfig(servable("gated", GATED.format(gate=gate)), "gated")

    async def body(router: Router) -> None:
        await router.fleet.start([config])
        (old,) = worker_pids()
        gate.unlink()
        os.kill(old, signal.SIGKILL)
        await eventually(lambda: worker_pids() not in ([], [old]))
        waiting = asyncio.ensure_future(ask(router, "gated", "echo", ["here"]))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            (pid,) = worker_pids()
            await eventually(lambda pid=pid, number=number: replaced(pid, number), 30)  # type: ignore[misc]
        assert not waiting.done()
        assert not router.ready
        with pytest.raises(DeadlineExceeded):
            await ask(router, "gated", "echo", ["impatient"], timeout=0.2)
        more = asyncio.ensure_future(ask(router, "gated", "echo", ["a"], ["b"]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 of 3 instances wait"):
            await ask(router, "gated", "echo", ["one too many"])
        gate.touch()
        assert await waiting == [["here"]]
        assert await more == [["a"], ["b"]]

    run(body, SOON)


@pytest.mark.parametrize("numbers", [[signal.SIGKILL, signal.SIGTERM], [signal.SIGKILL] * 3])
def test_kills_at_the_first_start(servable: Callable[..., Path], tmp_path: Path, numbers: list[int]) -> None:
    """Somebody else's kill does not end it; the third one does, since nothing has ever been ready here."""
    gate = tmp_path / "gate"
    config = ServableConfig(servable("gated", GATED.format(gate=gate)), "gated")

    async def body(router: Router) -> None:
        starting = asyncio.ensure_future(router.fleet.start([config]))
        killed: list[int] = []
        for number in numbers:
            await eventually(lambda: worker_pids() not in ([], killed[-1:]))
            (pid,) = worker_pids()
            killed.append(pid)
            os.kill(pid, number)
        if len(numbers) == 3:
            with pytest.raises(StartError, match="so ended all of 3 starts: somebody kills them"):
                await starting
            return
        gate.touch()
        await starting
        assert await ask(router, "gated", "echo", ["here"]) == [["here"]]

    run(body, SOON)


def test_the_server_stops_while_a_worker_is_killed_at_its_first_start(
    servable: Callable[..., Path], tmp_path: Path
) -> None:
    """As a terminal does it that signals all: the worker is not started again for a server that stops."""
    config = ServableConfig(servable("gated", GATED.format(gate=tmp_path / "gate")), "gated")

    async def main() -> None:
        router = Router(SOON, Metrics())
        starting = asyncio.ensure_future(router.fleet.start([config]))
        await eventually(lambda: worker_pids() != [])
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGTERM)
        await router.stop()
        with pytest.raises(StartError):
            await asyncio.wait_for(starting, 20)
        assert worker_pids() == []

    asyncio.run(main())


def test_a_servable_that_cannot_load_any_more_is_refused_until_it_can(servable: Callable[..., Path]) -> None:
    directory = servable("gated", GATED.format(gate="/"))
    file = directory / "gated" / "servable_config.py"
    good = file.read_text()

    async def body(router: Router) -> None:
        await router.fleet.start([ServableConfig(directory, "gated")])
        file.write_text("raise ValueError('no weights for you')")
        os.kill(worker_pids()[0], signal.SIGKILL)
        await eventually(lambda: not router.ready)
        (outcome,) = await ask(router, "gated", "echo", ["it waits for the third failure"])
        assert isinstance(outcome, Unavailable)
        assert "is not available, import gated.servable_config failed, no weights for you" in str(outcome)
        with pytest.raises(Unavailable, match="no weights for you"):
            await ask(router, "gated", "echo", ["refused at once"], timeout=30)
        file.write_text(good)
        await eventually(lambda: router.ready)
        assert await ask(router, "gated", "echo", ["again"]) == [["again"]]

    run(body, SOON)


def test_a_worker_that_ends_when_it_is_ready_is_not_taken_for_a_ready_one(servable: Callable[..., Path]) -> None:
    """The server learns both in one turn of its loop."""
    directory = servable(
        "brief", textwrap.dedent(ECHO) + "\nimport threading\nthreading.Timer(0.3, os._exit, [5]).start()"
    )

    async def body(router: Router) -> None:
        start = asyncio.ensure_future(router.fleet.start([ServableConfig(directory, "brief")]))
        await eventually(worker_pids)
        time.sleep(2)
        with pytest.raises(StartError, match="ended with status 5"):
            await start

    run(body)


def test_kills_from_outside_are_no_proof_against_an_instance(echo: ServableConfig) -> None:
    async def body(router: Router) -> None:
        await router.fleet.start([echo])
        nap = asyncio.ensure_future(ask(router, "echo", "nap", ["0.4"]))
        for _ in range(3):
            await eventually(lambda: worker_pids() and router.ready)
            await asyncio.sleep(0.2)
            (old,) = worker_pids()
            os.kill(old, signal.SIGKILL)
            await eventually(lambda old=old: worker_pids() not in ([], [old]))  # type: ignore[misc]
        assert not isinstance((await nap)[0], InflightError)

    run(body)


NUMBERED = """
    import numpy as np
    from inflight.servable import add_stage, register_method

    def fill(number):
        return np.full(1 << 20, number, np.uint8)

    @register_method(output_names=["y"])
    def numbered(number):
        return add_stage(fill, number, outputs_count=1)
"""


def test_what_an_earlier_process_lent_is_not_given_back_to_a_later_one(servable: Callable[..., Path]) -> None:
    """Large results lie in memory of the worker's until nobody reads them; a new worker's lie at the same places."""
    directory = servable("numbered", NUMBERED)

    async def body(router: Router) -> None:
        await router.fleet.start([ServableConfig(directory, "numbered")])
        early = await ask(router, "numbered", "numbered", [np.array(1)])
        (old,) = worker_pids()
        os.kill(old, signal.SIGKILL)
        await eventually(lambda: worker_pids() not in ([], [old]))
        kept = await ask(router, "numbered", "numbered", [np.array(2)])
        del early
        for number in range(3, 8):
            await ask(router, "numbered", "numbered", [np.array(number)])
        value = kept[0][0]  # type: ignore[index]
        assert isinstance(value, np.ndarray)
        assert (value == 2).all()

    run(body)


@pytest.fixture
def echo(servable: Callable[..., Path]) -> ServableConfig:
    return ServableConfig(servable("echo", ECHO), "echo")
