"""Delivers events of grpc's C core on an event loop.

The core puts events into a completion queue. A thread waits there for the first one, wakes the loop and pauses; the
loop then takes the queued events, a bounded number per turn, and lets the thread wait again after a turn without any.
So a busy server switches threads once for many events, and all Python runs on the loop. `grpc.aio` makes some five
tasks and futures per call instead, and reaches a third of the calls per second.

`cygrpc` is the layer under grpcio's own synchronous server. It is not documented, but has been stable for years (grpcio
1.60 to 1.85).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from grpc._cython import cygrpc

EVENTS_A_TURN = 256
"""Events that are handled before the loop does something else."""
REST = 0.002
"""Seconds between two polls of the loop while calls are held. Otherwise each event of a crowd of refused callers would
wake the thread, which costs more than the rest of a refusal."""
_NOTHING = cygrpc.CompletionType.queue_timeout
_THE_END = cygrpc.CompletionType.queue_shutdown
_logger = logging.getLogger("inflight.grpc")

Tag: TypeAlias = "Callable[[Any], object]"
"""Callback of an operation, called with its event, which has `success` and the fields of its kind."""


class Completions:
    """A completion queue. Each event's tag is called with the event on the event loop.

    Attributes:
        queue: grpc's queue, on which operations are begun.
    """

    def __init__(self, failed: Callable[[], object], rests: Callable[[], bool] = lambda: False) -> None:
        """Args: failed: called for an event that the core's Python layer could not build; its tag is lost.
        rests: returns whether events may wait for a moment (`REST`).
        """
        self.queue = cygrpc.CompletionQueue()
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        self._rests = rests
        self._ended = self._loop.create_future()
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._watch, name="grpc", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Delivers the remaining events and returns after the last one. No operation may be begun any more."""
        self.queue.shutdown()
        await self._ended
        self._thread.join()

    def _watch(self) -> None:
        """Runs in the thread: waits for an event while the loop does not poll."""
        while True:
            event = self._next(None)
            over = event is not None and event.completion_type == _THE_END
            try:
                self._loop.call_soon_threadsafe(self._tell, event)
            except RuntimeError:  # the loop was closed without us
                return
            del event  # else it would keep its call alive here
            if over:
                return
            self._turn.acquire()

    def _look(self) -> None:
        self._tell(self._next(0))

    def _tell(self, event: Any) -> None:
        """Calls the tags of an event and of those that follow it."""
        left = EVENTS_A_TURN
        while event is None or event.completion_type != _NOTHING:
            if event is None:
                self._failed()
            elif event.completion_type == _THE_END:
                self._turn.release()
                if not self._ended.done():
                    self._ended.set_result(None)
                return
            else:
                try:
                    event.tag(event)
                except Exception:  # other events are waiting
                    _logger.exception("unhandled error")
            left -= 1
            if not left:
                break
            event = self._next(0)
        if left < EVENTS_A_TURN:
            self._loop.call_soon(self._look)
        elif self._rests():
            self._loop.call_later(REST, self._look)
        else:
            self._turn.release()

    def _next(self, deadline: float | None) -> Any:
        """The next event; `_NOTHING` if the deadline comes first; None for an event that cannot be built."""
        try:
            return self.queue.poll(deadline)
        except Exception:  # it decodes bytes from clients
            _logger.exception("an event of grpc's core is lost")
            return None
