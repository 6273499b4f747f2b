"""All open streams of an engine. A request has a stream from its admission until its reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Sequence as Items

from inflight.admission import Admission
from inflight.contract import GenerationRequest
from inflight.engine.grammars import Follower
from inflight.engine.stream import Home, Stream
from inflight.errors import InflightError
from inflight.sched import Sequence
from inflight.text import Tokenizer

UNREAD = 1 << 17
"""Tokens of ended requests that may wait for slow readers. Above this the oldest such streams lose their events."""


class Streams:
    """The open streams by sequence id. Opening one gives its sequence to a replica, closing it takes the sequence away.

    Attributes:
        idle: set while there is no stream.
    """

    def __init__(self, tokenizer: Tokenizer, admission: Admission) -> None:
        self._tokenizer = tokenizer
        self._admission = admission
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

    def of(self, ids: Iterable[int]) -> Items[Stream]:
        """Those of these sequences that are open."""
        return [self._streams[id] for id in ids if id in self._streams]

    def open(
        self, request: GenerationRequest, sequence: Sequence, follower: tuple[Follower, bytes] | None, home: Home
    ) -> Stream:
        """Opens the stream of an admitted request and gives its sequence to a replica.

        Args:
            follower: follows the request's grammar and thought; with the mask of the first token.
        """
        stream = Stream(request, sequence, self._tokenizer, home, self._ended)
        if follower is not None:
            stream.follower, sequence.mask = follower
            sequence.lockstep, sequence.lockstep_at = True, sequence.num_prompt + stream.follower.ahead
        self._streams[sequence.id] = stream
        self.idle.clear()
        home.add(sequence)
        return stream

    def close(self, stream: Stream) -> None:
        """Closes a stream whose reader has left. The next plan frees its row. Closing twice does nothing."""
        id = stream.sequence.id
        if self._streams.pop(id, None) is None:
            return
        stream.end()
        if id in self._unread:
            self._unread_tokens -= self._unread.pop(id)[1]
        stream.home.finish(id)
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
