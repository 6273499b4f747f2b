"""Finds the servable, version and method of a request and hands the request to its group of replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from inflight.admission import holder, priority
from inflight.config import LONGEST_NAME, ServerConfig
from inflight.contract import NEWEST, Generator, MethodInfo, Outcome, Result, Row, SayTo, ServableStatus, Table
from inflight.errors import (
    DeadlineExceeded,
    Forbidden,
    InflightError,
    InvalidRequest,
    Loading,
    NotFound,
    Overloaded,
    Unavailable,
)
from inflight.metrics import Metrics
from inflight.router.demand import Demand
from inflight.router.fleet import Fleet
from inflight.router.group import Group, MethodQueue
from inflight.router.models import Models
from inflight.router.request import Request

log = logging.getLogger("inflight")


class Router:
    """Implements `inflight.frontends.base.Backend`. Lives on one event loop.

    Args:
        config: limits and policies.
        metrics: counts requests.
        runtimes: value of INFLIGHT_RUNTIMES, handed to the workers.
        on_all_lost: called when no worker is left that could be started again.
        values: the options that models are configured with which are loaded later, by key.

    Attributes:
        models: loads and unloads models while the server serves.
        demand: loads models when requests name them, and knows the aliases.
        fleet: starts, holds and ends the servables and language models.
        max_enqueued: upper limit of requests to servables in flight.
    """

    def __init__(
        self,
        config: ServerConfig,
        metrics: Metrics,
        runtimes: str | None = None,
        on_all_lost: Callable[[], None] = lambda: None,
        values: Mapping[str, Any] = {},
    ) -> None:
        self._config = config
        self._metrics = metrics
        self.fleet = Fleet(config, metrics, runtimes, on_all_lost)
        self.models = Models(self.fleet, config, values, self.servables)
        self.demand = Demand(config.room, self.models, self._known, self.fleet.language_models.named)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch_in_flight(lambda: self._in_flight)
        self.max_enqueued = config.max_enqueued_requests

    @property
    def live(self) -> bool:
        return not self.fleet.stopping

    @property
    def ready(self) -> bool:
        fleet = self.fleet
        if fleet.stopping:
            return False
        if not fleet.names:
            return bool(self._config.repositories or self._config.admin)
        return all(group.answers for group in fleet.groups) and fleet.language_models.ready

    @property
    def generators(self) -> Mapping[str, Generator]:
        """Language models by name."""
        return self.fleet.language_models.served

    @property
    def unloaded(self) -> Collection[str]:
        """As `Models.unloaded`."""
        return self.models.unloaded

    def servables(self) -> Sequence[ServableStatus]:
        classic = [
            ServableStatus(
                name=group.name,
                version=group.version,
                methods=group.methods,
                ready=group.answers,
                replicas=len(group.replicas),
                ready_replicas=group.ready,
                loaded=group.loaded,
                described=group.described,
            )
            for group in self.fleet.groups
        ]
        names = [status.name for status in classic]
        return [*classic, *(status for status in self.fleet.language_models.statuses() if status.name not in names)]

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        try:
            generated = self.fleet.language_models.method(servable, version, method)
        except Loading:
            if not self._declares(servable, method):
                raise
            generated = None  # the servable's own method has the name of one of its model's
        if generated is not None and not self._declares(servable, method):
            return generated
        group = self._group(servable, version)
        if not group.loaded:
            group.check_loaded()
        queue = group.by_name.get(method)
        if queue is None:
            known = ", ".join(info.name for info in group.methods)
            raise NotFound(
                f"servable '{servable}' version {group.version}: method '{method}', method is not available"
                + (f"; it has: {known}" if known else "")
            )
        return queue.info

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Result], None],
        *,
        timeout: float | None = None,
        say: SayTo | None = None,
    ) -> Callable[[], None]:
        caller = holder.get()
        if caller is not None and not caller.allows(method.servable):
            raise Forbidden(f"this API key may not call '{method.servable}'")
        models = self.fleet.language_models
        # Whichever version: it may have been replaced since the method was looked up.
        if method.optional and models.method(method.servable, NEWEST, method.name) is not None:
            if not rows:
                raise InvalidRequest("the request has no instances; send at least one")
            return models.submit(method, rows, done, timeout, say)
        group, queue = self._queue(method)
        if not rows:
            return asyncio.get_running_loop().call_soon(done, []).cancel
        if self._in_flight >= self.max_enqueued:
            self._metrics.request_done(method.servable, method.name, 0.0, Overloaded.cause)
            raise Overloaded(f"Serving Error: enqueued requests count exceeds the limit {self.max_enqueued}")
        seconds = queue.timeout if timeout is None or queue.timeout is None else min(timeout, queue.timeout)
        seconds = timeout if seconds is None else seconds
        timer: asyncio.TimerHandle | None = None

        def finished(request: Request, result: Result) -> None:
            if timer is not None:
                timer.cancel()
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            if type(result) is Table:
                cause = None
            else:
                cause = result.cause if isinstance(result, InflightError) else _first_cause(result)
            self._metrics.request_done(method.servable, method.name, time.perf_counter() - request.started, cause)
            done(result)

        if seconds is None:
            request = Request(queue.index, rows, None, finished, say)
        else:
            loop = asyncio.get_running_loop()
            request = Request(queue.index, rows, loop.time() + seconds, finished, say)
            timer = loop.call_later(seconds, _expire, request, seconds)
        request.caller = caller
        request.level = priority.get()
        if not self._in_flight:
            self._idle.clear()
        self._in_flight += 1
        try:
            group.enqueue(request)
        except InflightError as error:
            done = _ignore
            request.fail(error)
            raise
        return request.abandon

    def _known(self, name: str) -> bool:
        """Whether a name is that of a model that is served or announced, or of one of its methods."""
        models = self.fleet.language_models.served
        end = len(name) if len(name) <= LONGEST_NAME else 0
        while end > 0:
            if self.fleet.versions(name[:end]) or name[:end] in models:
                return True
            end = name.rfind(".", 0, end)
        return any(name in (each.info.model_id, *each.info.adapters) for each in models.values())

    def _declares(self, servable: str, method: str) -> bool:
        """Whether a servable of this name declares a method of this name."""
        return any(method in group.by_name for group in self.fleet.versions(servable).values())

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def stop(self) -> None:
        """Refuses new requests, lets running ones finish in time, ends every worker."""
        self.models.stop()
        await self.fleet.stop(self._drained())

    async def _drained(self) -> None:
        if self._in_flight:
            try:
                await asyncio.wait_for(self._idle.wait(), self._config.stop_timeout)
            except asyncio.TimeoutError:
                log.warning("%d requests did not finish before the server stopped", self._in_flight)

    def _queue(self, method: MethodInfo) -> tuple[Group, MethodQueue]:
        """The group and queue of a method that was looked up a moment ago; its group may have been replaced since.

        Raises:
            NotFound, Unavailable: nobody can answer.
        """
        group = self.fleet.versions(method.servable).get(method.version)
        queue = group.by_name.get(method.name) if group is not None else None
        if group is not None and queue is not None and (queue.info is method or queue.info == method):
            if self.fleet.stopping:
                self._group(method.servable, method.version)
            return group, queue
        former = self.fleet.former(method)
        if former is not None and not self.fleet.stopping:
            return former
        self._group(method.servable, method.version)
        raise Unavailable(
            f"servable '{method.servable}': method '{method.name}' was replaced by another while the request came in; "
            "send it again"
        )

    def _group(self, servable: str, version: int) -> Group:
        versions = self.fleet.versions(servable)
        wanted = max(versions) if versions and version == NEWEST else version
        group = versions.get(wanted)
        if group is not None and self.fleet.stopping:
            raise Unavailable(f"servable '{servable}': servable is not available, the server stops")
        if group is None:
            if self.fleet.language_models.has(servable, version):
                raise NotFound(
                    f"servable '{servable}', a language model: method is not available; it has: generate, and by HTTP "
                    "generated_stream"
                )
            known = ", ".join(sorted(self.fleet.names)) or "none"
            raise NotFound(
                f"servable '{servable}' version {version}: servable is not available; the server has: {known}"
            )
        return group


def _ignore(result: Result) -> None:
    """Drops the result: the error is raised instead."""


def _expire(request: Request, seconds: float) -> None:
    request.fail(DeadlineExceeded(f"the request took longer than its {seconds:g} seconds"))


def _first_cause(outcomes: Sequence[Outcome]) -> str | None:
    for outcome in outcomes:
        if isinstance(outcome, InflightError):
            return outcome.cause
    return None
