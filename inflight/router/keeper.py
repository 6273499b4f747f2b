"""Keeps one replica alive: starts it again whenever it is lost, until the policy says no."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from inflight.config import ServerConfig
from inflight.errors import StartError
from inflight.link import Offer, WorkerJob
from inflight.router.group import Group
from inflight.router.replica import Replica, State, TrialOverdue
from inflight.startup import KILLED_STARTS, killed_too_often, waited_for

log = logging.getLogger("inflight")

KILLED_DELAY = 2.0
"""The longest pause in seconds before a worker is started again that somebody killed while it loaded."""


class Keeper:
    """Starts one replica.

    Args:
        job: what its worker is told to load.
        config: the start's timeout and the policy of restarts.
        changed: called when the replica's state has changed.
        gave_up: called when the replica will not be started again.
    """

    def __init__(
        self,
        group: Group,
        replica: Replica,
        job: WorkerJob,
        config: ServerConfig,
        changed: Callable[[], None],
        gave_up: Callable[[], None],
    ) -> None:
        self._group = group
        self._replica = replica
        self._job = job
        self._config = config
        self._policy = config.restart
        self._changed = changed
        self._gave_up = gave_up
        self._delay = self._policy.first_delay
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[Offer, WorkerJob]:
        """The first start; from then on the replica is kept. What it offers, and the job that the next one gets.

        Raises:
            StartError: the worker's own text, or that it died without one.
        """
        offer = await self._first_start()
        self._group.learn(offer)
        self._came_up()
        self._task = asyncio.ensure_future(self._keep())
        return offer, self._job

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _first_start(self) -> Offer:
        """As `_try_start`. A worker that somebody ended is started again, but not for ever: nothing has ever been ready
        here, and the system itself may end what takes too much memory.

        Raises:
            StartError: as `_try_start`.
        """
        replica = self._replica
        failed = StartError("the server stops")
        for _ in range(KILLED_STARTS):
            if self._ended:
                raise failed
            try:
                return await self._try_start()
            except StartError as error:
                if self._policy.only_proven or not (replica.killed or replica.left):
                    raise
                failed = error
            log.warning("worker %s of servable '%s' was lost: %s", replica.label, self._group.name, failed)
            await asyncio.sleep(min(self._policy.first_delay, KILLED_DELAY))
        raise killed_too_often(failed)

    @property
    def _ended(self) -> bool:
        """The replica was given up: the server stops."""
        return self._replica.state is State.DEAD

    async def _try_start(self) -> Offer:
        """Starts a process, a second time without trial runs where they do not end. Every later one has to offer the
        same.

        Raises:
            StartError: as `Replica.start`.
        """
        job = self._job
        try:
            offer = await self._started(job)
        except TrialOverdue as overdue:
            log.warning(
                "servable '%s': %s (%g s, --warm-up-timeout); it is started again without warm-up%s",
                self._group.name,
                overdue,
                job.trial_seconds,
                "" if job.model_file is None or job.whole is False else ", with one request a call",
            )
            job = msgspec.structs.replace(job, trial_seconds=None)
            offer = await self._started(job)
        self._job = msgspec.structs.replace(job, whole=any(method.whole for method in offer.methods))
        return offer

    async def _started(self, job: WorkerJob) -> Offer:
        replica = self._replica
        return await waited_for(
            lambda: f"worker {replica.label} of servable '{self._group.name}' {replica.phase}",
            replica.start(job, self._config.start_timeout),
        )

    async def _keep(self) -> None:
        replica, group = self._replica, self._group
        while True:
            await replica.lost.wait()
            replica.lost.clear()
            self._changed()
            log.warning("worker %s of servable '%s' was lost (pid %s)", replica.label, group.name, replica.pid)
            await replica.end(0)
            # MindSpore Serving's rule is about workers that end; one that hung was ended by this server.
            if self._policy.only_proven and (replica.left or not replica.proven) and replica.late is None:
                self._gave_up()
                return
            if replica.proven:
                self._delay = self._policy.first_delay
            elif not (replica.left or replica.killed):
                await self._pause()
            if not await self._start_again():
                self._gave_up()
                return

    async def _start_again(self) -> bool:
        """Tries until a worker is ready; False where the policy allows one try and it failed.

        Requests wait meanwhile, until their own deadlines. That somebody killed a worker while it loaded says nothing
        of the servable; what the worker itself reports does (`Group.cannot_start`).
        """
        replica, group = self._replica, self._group
        killed = self._policy.first_delay
        while True:
            try:
                await self._try_start()
            except StartError as error:
                log.error("worker %s of servable '%s' cannot start: %s", replica.label, group.name, error)
                replica.state = State.LOST
                self._changed()
                if self._policy.only_proven:
                    return False
                if replica.killed or replica.left:
                    replica.failures = 0
                    await asyncio.sleep(killed)
                    killed = min(killed * 2, KILLED_DELAY)
                else:
                    replica.failures += 1
                    group.cannot_start(str(error))
                    await self._pause()
            else:
                self._came_up()
                group.came_up()
                return True

    async def _pause(self) -> None:
        """Back-off: twice as long each time, until the worker has answered something."""
        await asyncio.sleep(self._delay)
        self._delay = min(self._delay * 2, self._policy.max_delay)

    def _came_up(self) -> None:
        replica, group = self._replica, self._group
        replica.failures = 0
        # Scripts written for MindSpore Serving search the log for the first words.
        log.info(
            "Register success: worker address: pid %s, %s of servable '%s' version %d",
            replica.pid,
            replica.label,
            group.name,
            group.version,
        )
        self._changed()
