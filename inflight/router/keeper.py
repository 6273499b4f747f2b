"""Keeps one replica running: starts it again after each loss, as long as the policy allows."""

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
"""The longest pause in seconds before the restart of a worker that was killed from outside while it loaded."""


class Keeper:
    """Starts and restarts one replica.

    Args:
        job: what its worker loads.
        config: has the start timeout and the restart policy.
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
        """Starts the replica for the first time, and restarts it after losses from then on.

        Returns:
            What the worker offers, and the job with what it found out, for the next replica.

        Raises:
            StartError: the worker's own text, or that it died without one.
        """
        offer = await self._first_start()
        self._group.learn(offer)
        self._came_up()
        self._task = asyncio.ensure_future(self._keep())
        return offer, self._job

    def come(self) -> None:
        """Starts the replica when there is room for it, beside others that serve, and restarts it after losses."""

        async def come() -> None:
            self._changed()
            if await self._start_again():
                await self._keep()
            else:
                self._gave_up()

        self._task = asyncio.ensure_future(come())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _first_start(self) -> Offer:
        """As `_try_start`, repeated a few times if the worker was ended from outside. Not without end, because the
        system may kill a worker that needs too much memory.

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
        """Whether the replica was given up because the server stops."""
        return self._replica.state is State.DEAD

    async def _try_start(self) -> Offer:
        """Starts a process; if a trial run of a model does not end, starts another one without trial runs. Later
        workers get the job with what this one found out, so that they offer the same.

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
        await replica.place()
        return await waited_for(
            lambda: f"worker {replica.label} of servable '{self._group.name}' {replica.phase}",
            # Agents are started by people, who may take their time; `RanksConfig.wait_seconds` is the limit.
            replica.start(job, None if job.ranks is not None else self._config.start_timeout),
        )

    async def _keep(self) -> None:
        replica, group = self._replica, self._group
        while True:
            await replica.lost.wait()
            replica.lost.clear()
            self._changed()
            log.warning("worker %s of servable '%s' was lost (pid %s)", replica.name, group.name, replica.pid)
            await replica.end(0)
            # MindSpore Serving's rule is about workers that end; one that hung was ended by this server.
            left = replica.left or not replica.proven or self._job.ranks is not None  # whose agents have ended
            if self._policy.only_proven and left and replica.late is None:
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
        """Starts workers until one is ready. Returns False if the policy allows one try and it failed.

        Requests wait meanwhile, until their own deadlines. A worker that was killed from outside while it loaded says
        nothing about the servable; an error that a worker reports does (`Group.cannot_start`).
        """
        replica, group = self._replica, self._group
        killed = self._policy.first_delay
        while True:
            try:
                await self._try_start()
            except StartError as error:
                log.error("worker %s of servable '%s' cannot start: %s", replica.name, group.name, error)
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
        """Sleeps for the back-off, which doubles each time until a worker has answered something."""
        await asyncio.sleep(self._delay)
        self._delay = self._policy.after(self._delay)

    def _came_up(self) -> None:
        replica, group = self._replica, self._group
        replica.failures = 0
        # Scripts written for MindSpore Serving search the log for the first words.
        log.info(
            "Register success: worker address: pid %s, %s of servable '%s' version %d",
            replica.pid,
            replica.name,
            group.name,
            group.version,
        )
        self._changed()
