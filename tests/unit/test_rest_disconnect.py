"""Work for a client ends when the client leaves, and nothing else of it stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from inflight.errors import Cancelled
from inflight.wire.http.disconnect import Disconnected, run_until_disconnect

GRACE = 0.01


class Peer:
    """An ASGI `receive` whose client leaves when told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.asked = 0
        self.stray = 0  # messages before the disconnect

    async def __call__(self) -> dict[str, Any]:
        self.asked += 1
        if self.stray:
            self.stray -= 1
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """Runs until `done` is set; says how it ended."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.ended = ""

    async def __call__(self) -> str:
        try:
            await self.done.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # releasing something takes a moment
            self.ended = "cancelled"
            raise
        self.ended = "done"
        return "result"


def run(case: Callable[[Peer, Work], Awaitable[None]]) -> None:
    """Runs a case and checks that no task is left of it."""

    async def main() -> None:
        before = asyncio.all_tasks()
        await case(Peer(), Work())
        assert asyncio.all_tasks() == before

    asyncio.run(main())


def test_quick_work_never_asks_for_the_client() -> None:
    async def case(peer: Peer, work: Work) -> None:
        work.done.set()
        assert await run_until_disconnect(work(), peer, GRACE) == "result"
        await asyncio.sleep(3 * GRACE)
        assert peer.asked == 0

    run(case)


def test_slow_work_is_finished() -> None:
    async def case(peer: Peer, work: Work) -> None:
        asyncio.get_running_loop().call_later(3 * GRACE, work.done.set)
        assert await run_until_disconnect(work(), peer, GRACE) == "result"
        assert peer.asked == 1

    run(case)


@pytest.mark.parametrize("after", [0.0, GRACE / 2, 3 * GRACE])
@pytest.mark.parametrize("stray", [0, 2])
def test_leaving_cancels_the_work(after: float, stray: int) -> None:
    async def case(peer: Peer, work: Work) -> None:
        peer.stray = stray
        asyncio.get_running_loop().call_later(after, peer.gone.set)
        with pytest.raises(Disconnected) as left:
            await run_until_disconnect(work(), peer, GRACE)
        assert isinstance(left.value, Cancelled)
        assert work.ended == "cancelled"
        # The task goes on as if it had never been cancelled.
        await asyncio.sleep(0)

    run(case)


def test_a_task_may_be_awaited() -> None:
    async def case(peer: Peer, work: Work) -> None:
        peer.gone.set()
        task = asyncio.create_task(work())
        with pytest.raises(Disconnected):
            await run_until_disconnect(task, peer, GRACE)
        assert task.cancelled()

    run(case)


@pytest.mark.parametrize("after", [0.0, 3 * GRACE])
def test_cancelling_the_caller_cancels_the_work(after: float) -> None:
    async def case(peer: Peer, work: Work) -> None:
        caller = asyncio.create_task(run_until_disconnect(work(), peer, GRACE))
        await asyncio.sleep(after)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert after == 0.0 or work.ended == "cancelled"

    run(case)


def test_the_callers_own_cancel_wins() -> None:
    """Both at once: the caller must see that it was cancelled."""

    async def case(peer: Peer, work: Work) -> None:
        caller: asyncio.Task[str]

        async def leave_and_cancel() -> dict[str, Any]:
            caller.cancel()
            return {"type": "http.disconnect"}

        caller = asyncio.create_task(run_until_disconnect(work(), leave_and_cancel, GRACE))
        await asyncio.wait([caller])
        if hasattr(caller, "uncancel"):
            assert caller.cancelled()
        assert work.ended == "cancelled"

    run(case)


def test_a_timeout_around_it_works_afterwards() -> None:
    async def case(peer: Peer, work: Work) -> None:
        peer.gone.set()

        async def caller() -> str:
            with pytest.raises(Disconnected):
                await run_until_disconnect(work(), peer, GRACE)
            await asyncio.sleep(GRACE)
            return "went on"

        assert await asyncio.wait_for(caller(), 5) == "went on"

    run(case)


@pytest.mark.parametrize("after", [0.0, 3 * GRACE])
def test_errors_of_the_work_come_through(after: float) -> None:
    async def case(peer: Peer, work: Work) -> None:
        async def fail() -> None:
            await asyncio.sleep(after)
            raise KeyError("x")

        with pytest.raises(KeyError):
            await run_until_disconnect(fail(), peer, GRACE)

    run(case)


def test_work_that_ignores_its_cancel_may_still_answer() -> None:
    async def case(peer: Peer, work: Work) -> None:
        peer.gone.set()

        async def stubborn() -> str:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return "anyway"
            return "late"

        assert await run_until_disconnect(stubborn(), peer, GRACE) == "anyway"
        assert await asyncio.wait_for(asyncio.sleep(0, "on"), 5) == "on"

    run(case)


def test_a_broken_receive_does_not_stop_the_work() -> None:
    async def case(peer: Peer, work: Work) -> None:
        async def broken() -> dict[str, Any]:
            raise OSError("no")

        asyncio.get_running_loop().call_later(3 * GRACE, work.done.set)
        assert await run_until_disconnect(work(), broken, GRACE) == "result"

    run(case)
