"""What every front end may ask of the server behind it: seven members, so that a test's fake is short."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol, cast

from inflight.contract import Generator, MethodInfo, Outcome, Row, ServableStatus, TextPart
from inflight.errors import InflightError


class Backend(Protocol):
    """The router as the doors see it. All methods run on the server's event loop."""

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        """The method of a servable; version 0 is the newest.

        Raises:
            NotFound: with MindSpore Serving's text (`... servable is not available`, `... method is not available`).
        """

    async def predict(
        self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
    ) -> Sequence[Outcome]:
        """Runs every row and returns one outcome per row, in order. Cancelling the call drops queued rows.

        Args:
            rows: inputs by position, as `MethodInfo.row` orders them; at least one.
            timeout: seconds, or None for the method's own.

        Raises:
            InvalidRequest, Overloaded, Unavailable, DeadlineExceeded: the request as a whole was not run.
        """

    def stream(
        self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None
    ) -> AsyncIterator[TextPart | Sequence[Outcome]]:
        """`predict`, with the text that language models in it write as it comes; last the outcomes.

        Closing the iterator cancels what is left. The text of an instance whose worker died goes on where it was.

        Raises (from the iterator):
            InflightError: as `predict`.
        """

    def servables(self) -> Sequence[ServableStatus]:
        """Every version registered, in the order of their start."""

    @property
    def generators(self) -> Mapping[str, Generator]:
        """Language models by name, in the order of their start; empty where none is served."""

    @property
    def live(self) -> bool:
        """The server works or is starting: false only while it stops."""

    @property
    def ready(self) -> bool:
        """Every servable has at least one warm replica."""


class CallbackBackend(Backend, Protocol):
    """A backend that can also answer by a callback, as the HTTP port needs it."""

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Sequence[Outcome] | InflightError], None],
        *,
        timeout: float | None = None,
    ) -> Callable[[], None]:
        """`predict` without a task: calls `done` once, on the loop, with the outcomes or the error.

        Returns:
            How to cancel; `done` may still be called then, and calling it after the end does nothing.

        Raises:
            InflightError: as `predict`; then `done` is not called.
        """


def callbacks(backend: Backend) -> CallbackBackend | None:
    """The backend, where it can answer by a callback."""
    return cast(CallbackBackend, backend) if hasattr(backend, "submit") else None
