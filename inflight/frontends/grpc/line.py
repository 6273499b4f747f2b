"""Admission of gRPC calls to language models (`inflight.admission`).

A connection of HTTP/2 carries many calls, so the server cannot stop reading it, as it does with one of HTTP/1.1. A call
that finds no place is held instead, until its turn comes or until it is refused after a pause. So a client that retries
does so as seldom as over HTTP/1.1, and a short burst is served without a refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

from inflight.admission import COST_OF_CALL, FORGOTTEN, Admission, Arrival, Caller, arrival
from inflight.contract import Generator, MethodInfo, Outcome, Result, Row, SayTo, ServableStatus, TextPart
from inflight.errors import OVERLOADED, InflightError, Overloaded
from inflight.frontends.base import Backend, generator_of, predict, stream
from inflight.frontends.directory import Directory
from inflight.wire import Go, peer

_PEERS = 4096
"""Number of connections whose refusals are remembered."""


class HoldingBackend:
    """A `Backend` whose language models hold calls.

    Args:
        directory: names that mean more than the models that are served; None: there are none.
    """

    def __init__(self, backend: Backend, directory: Directory | None = None) -> None:
        self._backend = backend
        self._directory = directory
        self._refused: dict[object, tuple[float, float]] = {}  # by connection: first and last refusal in a row

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        return self._backend.method(servable, version, method)

    def servables(self) -> Sequence[ServableStatus]:
        return self._backend.servables()

    @property
    def generators(self) -> Mapping[str, Generator]:
        return self._backend.generators

    @property
    def unloaded(self) -> Collection[str]:
        return self._backend.unloaded

    @property
    def live(self) -> bool:
        return self._backend.live

    @property
    def ready(self) -> bool:
        return self._backend.ready

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Result], None],
        *,
        timeout: float | None = None,
        say: SayTo | None = None,
    ) -> Callable[[], None]:
        """As `Backend.submit`, for a method whose calls are never held (see `waits`)."""
        return self._backend.submit(method, rows, done, timeout=timeout, say=say)

    def target(self, name: str, version: int, key: str | None = None) -> tuple[str, int]:
        """The model and version that a call names, with the one behind an alias where it names no version.

        Args:
            key: calls with the same one go to the same target of an alias.
        """
        chosen = self._directory.chosen(name, key) if self._directory is not None and not version else None
        return (name, version) if chosen is None else chosen

    def missing(self, name: str) -> bool:
        """Whether a call may have to wait until the model of this name is loaded."""
        return self._directory is not None and self._directory.missing(name)

    async def present(self, name: str, timeout: float | None) -> float | None:
        """Waits until a model is loaded, where it is known and is not.

        Returns:
            The rest of the time-out in seconds.

        Raises:
            InflightError: it is not loaded, or not in time.
        """
        if self._directory is None or not self._directory.missing(name):
            return timeout
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._directory.present(name, timeout)
        return None if timeout is None else max(timeout - (loop.time() - began), 0.0)

    def waits(self, method: MethodInfo) -> bool:
        """Whether calls of a method may be held; such a method needs `predict` or `stream`."""
        return bool(method.optional)

    async def predict(
        self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
    ) -> Sequence[Outcome]:
        """As `inflight.frontends.base.predict`, after the call has got a place."""
        admission = self._admission(method)
        if admission is None:
            return await predict(self._backend, method, rows, timeout=timeout)
        kept, timeout = await self._enter(admission, timeout)
        token = arrival.set(kept)
        try:
            return await predict(self._backend, method, rows, timeout=timeout)
        finally:
            arrival.reset(token)
            kept.settle()

    async def stream(
        self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
    ) -> AsyncGenerator[TextPart | Sequence[Outcome], None]:
        """As `inflight.frontends.base.stream`, after the call has got a place."""
        admission = self._admission(method)
        kept = None
        if admission is not None:
            kept, timeout = await self._enter(admission, timeout)
            arrival.set(kept)  # not reset: a generator may end in another context than it began in
        parts = stream(self._backend, method, rows, timeout=timeout)
        try:
            async for part in parts:
                yield part
        finally:
            if kept is not None:
                kept.settle()
            await parts.aclose()

    def hold(self, find: Callable[[], MethodInfo], name_of: Callable[[], object], go: Go) -> Caller | None:
        """See `inflight.wire.Hold`.

        Args:
            find: returns the method that the request names; it may raise.
        """
        if not any(generator.admission.full for generator in self._backend.generators.values()):
            return None
        try:
            admission = self._admission(find())
        except InflightError:  # the handler reports it
            return None
        if admission is None or not admission.full:
            return None
        return self._line(admission, name_of(), go)

    def _admission(self, method: MethodInfo) -> Admission | None:
        """The admission of the language model that a method belongs to; None for other methods."""
        if not method.optional:
            return None
        generator = generator_of(self._backend.generators, method)
        return generator.admission if generator is not None else None

    async def _enter(self, admission: Admission, timeout: float | None) -> tuple[Arrival, float | None]:
        """Takes a place, or waits for one if all are taken.

        Returns:
            The place, and the rest of the time-out in seconds.

        Raises:
            Overloaded: no place became free.
        """
        kept = arrival.get()
        if kept is not None and kept.kept_by(admission):  # it was held before its handler ran
            return kept, timeout
        return await self._hold(admission, timeout) if admission.full else (Arrival(admission), timeout)

    async def _hold(self, admission: Admission, timeout: float | None) -> tuple[Arrival, float | None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        name_of = peer.get()
        turn: asyncio.Future[Arrival | None] = loop.create_future()

        def go(place: Arrival | None) -> None:
            if not turn.done():
                turn.set_result(place)
            elif place is not None:
                place.settle()

        caller = self._line(admission, name_of() if name_of is not None else None, go)
        try:
            kept = await turn
        except asyncio.CancelledError:
            caller.leave()
            if turn.done() and not turn.cancelled() and (place := turn.result()) is not None:
                place.settle()  # the place came together with the cancellation
            raise
        if kept is None:
            raise Overloaded(OVERLOADED)
        return kept, None if timeout is None else max(timeout - (loop.time() - began), 0.0)

    def _line(self, admission: Admission, name: object, go: Go) -> Caller:
        """Puts a call in line. A connection that was refused before keeps its position when it retries."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        first, last = self._refused.get(name, (began, began))
        since = began if began - last > FORGOTTEN else first

        def turn(_offered: bool) -> bool:
            if not admission.full:
                self._refused.pop(name, None)
                go(Arrival(admission))
                return True
            admission.turned_away()
            if len(self._refused) >= _PEERS and name not in self._refused:
                del self._refused[next(iter(self._refused))]
            self._refused[name] = (since, loop.time())
            go(None)
            return False

        caller = Caller(turn, COST_OF_CALL)
        admission.hold(caller, since)
        return caller
