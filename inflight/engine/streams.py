"""All open streams of an engine. A request has a stream from its admission until its reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items

from inflight.admission import Admission
from inflight.contract import GenerationRequest
from inflight.engine.grammars import Follower
from inflight.engine.stream import Stream
from inflight.errors import InflightError
from inflight.sched import Scheduler, Sequence
from inflight.text import Tokenizer

UNREAD = 1 << 17
"""Tokens of ended requests that may wait for slow readers. Above this the oldest such streams lose their events."""


class Streams:
    """The open streams by sequence id. Opening one adds its sequence to the scheduler, closing it removes the sequence.

    Args:
        wake: called when the scheduler has something new to plan.

    Attributes:
        idle: set while there is no stream.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, admission: Admission, wake: Callable[[], None]
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._admission = admission
        self._wake = wake
        self._streams: dict[int, Stream] = {}
        # Ended streams with events that are not read yet, oldest first, with their numbers of tokens.
        self._unread: dict[int, tuple[Stream, int]] = {}
        self._unread_tokens = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, id: int) -> Stream | None:
        return self._streams.get(id)

    def all(self) -> Items[Stream]:
        return list(self._streams.values())

    def open(self, request: GenerationRequest, sequence: Sequence, follower: tuple[Follower, bytes] | None) -> Stream:
        """Opens the stream of an admitted request and gives its sequence to the scheduler.

        Args:
            follower: follows the request's grammar and thought; with the mask of the first token.
        """
        stream = Stream(request, sequence, self._tokenizer, self._ended)
        if follower is not None:
            stream.follower, sequence.mask = follower
            sequence.lockstep, sequence.lockstep_at = True, sequence.num_prompt + stream.follower.ahead
        self._streams[sequence.id] = stream
        self.idle.clear()
        self._scheduler.add(sequence)
        self._wake()
        return stream

    def close(self, stream: Stream) -> None:
        """Closes a stream whose reader has left. The next plan frees its row. Closing twice does nothing."""
        id = stream.sequence.id
        if self._streams.pop(id, None) is None:
            return
        stream.end()
        if id in self._unread:
            self._unread_tokens -= self._unread.pop(id)[1]
        self._scheduler.finish(id)
        self._wake()
        if not self._streams:
            self.idle.set()

    def fail(self, sequence: Sequence, error: InflightError) -> None:
        """Ends the stream of a sequence with an error; does nothing if the stream is closed."""
        stream = self._streams.get(sequence.id)
        if stream is not None:
            stream.fail(error)

    def _ended(self, stream: Stream) -> None:
        """Frees the place of a stream that gets no more tokens, and keeps it in `_unread` until it is closed."""
        self._admission.leave()
        size = stream.sequence.generated
        self._unread[stream.sequence.id] = stream, size
        self._unread_tokens += size
        while self._unread_tokens > UNREAD and len(self._unread) > 1:
            slowest, size = self._unread.pop(next(iter(self._unread)))
            self._unread_tokens -= size
            slowest.drop()
