"""The interface between the doors and the server behind them: few members, so that a test's fake is short."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import Protocol

from inflight.contract import Generator, MethodInfo, Outcome, Result, Row, SayTo, ServableStatus, TextPart
from inflight.errors import InflightError


class Backend(Protocol):
    """The router as the doors see it. All methods run on the server's event loop."""

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        """The method of a servable; version 0 is the newest.

        Raises:
            NotFound: with MindSpore Serving's text (`... servable is not available`, `... method is not available`).
        """

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Result], None],
        *,
        timeout: float | None = None,
        say: SayTo | None = None,
    ) -> Callable[[], None]:
        """Runs every row and calls `done` once, on the loop: with one outcome per row, in order, or with an error if
        the request as a whole was not run.

        Args:
            rows: inputs by position, as `MethodInfo.row` orders them. Without any nothing runs.
            timeout: seconds, or None for the method's own.
            say: called with the index of a row and the next piece of the text that a language model in the method
                generates for it. If the worker of an instance dies, its text continues where it stopped.

        Returns:
            A function that cancels the request: rows that no worker runs yet are dropped. `done` may still be called
            afterwards. After the end it does nothing.

        Raises:
            InvalidRequest, Overloaded, Unavailable, NotFound: the request is refused; then `done` is not called.
        """

    def servables(self) -> Sequence[ServableStatus]:
        """Every registered version, in the order of their start."""

    @property
    def generators(self) -> Mapping[str, Generator]:
        """Language models by name, in the order of their start; empty if none is served."""

    @property
    def unloaded(self) -> Collection[str]:
        """Names of what has served here and was unloaded: models, their versions, ids and adapters. Some may serve
        again."""

    @property
    def live(self) -> bool:
        """Whether the server works or is starting: false only while it stops."""

    @property
    def ready(self) -> bool:
        """Whether every servable has at least one warm replica."""


def generator_of(generators: Mapping[str, Generator], method: MethodInfo) -> Generator | None:
    """The language model that a method belongs to, in its version where several are served; None: it was unloaded."""
    return generators.get(f"{method.servable}:{method.version}") or generators.get(method.servable)


async def predict(
    backend: Backend, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
) -> Sequence[Outcome]:
    """`Backend.submit` as a coroutine. Cancelling it cancels the request.

    Raises:
        InflightError: the request as a whole was not run.
    """
    result: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()

    def done(outcomes: Result) -> None:
        if result.done():
            return
        if isinstance(outcomes, InflightError):
            result.set_exception(outcomes)
        else:
            result.set_result(outcomes)

    cancel = backend.submit(method, rows, done, timeout=timeout)
    try:
        return await result
    finally:
        cancel()


async def stream(
    backend: Backend, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
) -> AsyncGenerator[TextPart | Sequence[Outcome], None]:
    """As `predict`, but yields the text that language models in the method generate as it arrives; last the outcomes.

    Closing the iterator cancels the request.

    Raises (from the iterator):
        InflightError: as `predict`.
    """
    parts: deque[TextPart | Result] = deque()
    arrived = asyncio.Event()

    def put(part: TextPart | Result) -> None:
        parts.append(part)
        arrived.set()

    def say(index: int, text: str) -> None:
        put(TextPart(index, text))

    cancel = backend.submit(method, rows, put, timeout=timeout, say=say)
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            while parts:
                part = parts.popleft()
                if isinstance(part, InflightError):
                    raise part
                yield part
                if not isinstance(part, TextPart):
                    return
    finally:
        cancel()
