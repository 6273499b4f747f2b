"""The stream of one request: turns its tokens into events and hands them to its reader."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol

from inflight.contract import (
    EncodedImage,
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    Span,
    Start,
    Token,
    TokenInfo,
)
from inflight.engine.grammars import Follower
from inflight.errors import Cancelled, InflightError
from inflight.sched import Sequence
from inflight.text import TextTail, Tokenizer


class Home(Protocol):
    """The replica that computes a request."""

    def add(self, sequence: Sequence) -> None:
        """Queues a request."""

    def finish(self, id: int) -> None:
        """Ends a request; an unknown id was ended before."""

    def restore(self, sequence: Sequence, images: Items[EncodedImage]) -> None:
        """As `Scheduler.restore`."""

    def wake(self) -> None:
        """Says that there may be something to plan."""


class Stream:
    """Turns tokens into events until the request ends. One reader takes the events.

    At most `max_new_tokens` events wait here.

    Args:
        home: the replica that the request was given to.
        on_end: called once, when no more tokens are computed for the request. Events may still wait for the reader.

    Attributes:
        home: the replica that computes the request now.
        finished: the last event was added; nothing more may be pushed.
        follower: the state of the request's grammar and thought; None where neither says anything about a token.
        embedding: float32 values of the prompt's vector, once they are computed.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sequence: Sequence,
        tokenizer: Tokenizer,
        home: Home,
        on_end: Callable[[Stream], None] = lambda stream: None,
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.home = home
        self.finished = False
        self.follower: Follower | None = None
        self.embedding: bytes | None = None
        self._on_end = on_end
        self._tokenizer = tokenizer
        self._tail = TextTail(tokenizer, sequence.tokens, request.stop, request.include_stop)
        self._events: deque[Event] = deque()
        self._error: InflightError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._arrived = time.perf_counter()
        self._began: float | None = None
        self._told_start = False
        self._prompt_logprobs: dict[int, float] = {}
        self._prompt_top: dict[int, Items[tuple[int, float]]] = {}

    # The engine's side

    def begin(self) -> None:
        """Notes that a plan computes the request's first tokens."""
        if self._began is None:
            self._began = time.perf_counter()

    @property
    def waited(self) -> float:
        """Seconds for which the request has waited for its first step until now; 0 for one that has begun."""
        return time.perf_counter() - self._arrived if self._began is None else 0.0

    def prompt_logprobs(self, first: int, values: Items[float], tops: Items[Items[tuple[int, float]]]) -> None:
        """Log-probabilities of the prompt's tokens from position `first` on, and of the most likely ones there, if they
        were asked for."""
        self._prompt_logprobs.update(enumerate(values, first))
        self._prompt_top.update(enumerate(tops, first))

    def push(self, id: int, logprob: float | None, top: Items[tuple[int, float]]) -> bool:
        """Takes the next token; True where it is the last one."""
        if not self._told_start:
            self._told_start = True
            self._events.append(self._start())
        tokenizer, sequence, follower = self._tokenizer, self.sequence, self.follower
        ends, stops = not self.request.ignore_eos, True
        if follower is not None:
            sequence.mask, stops = follower.take(id), follower.stops
            sequence.lockstep_at = sequence.num_prompt + follower.ahead
            ends = follower.bound if self.request.grammar is not None else ends
        last = len(sequence.tokens) >= sequence.stop_at
        text, shown, special, reason = self._tail.add(id, ends, last, stops)
        named = self._named(top)
        own = tokenizer.token_bytes(id) if self.request.sampling.logprobs else None
        self._events.append(Token(TokenInfo(id, text, logprob, special, own), shown, named, reason is not None))
        if reason is not None:
            self._finish(reason)
        self._wake()
        return self.finished

    def fail(self, error: InflightError) -> None:
        """Ends the stream with an error, after the events it has."""
        if not self.finished:
            self._error = error
            self.end()
            self._wake()

    def end(self) -> None:
        """Ends the stream: nothing more is computed for the request."""
        if not self.finished:
            self.finished = True
            self._on_end(self)

    def drop(self) -> None:
        """Discards the events that the reader has not taken, because it is too slow; it gets an error instead."""
        self._events.clear()
        self._error = Cancelled("the answer was taken too slowly, the rest of it is dropped")
        self._wake()

    # The reader's side

    async def next(self) -> Event:
        """The next event, in order; the last one is `Finish`.

        Raises:
            InflightError: the request failed.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._events.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _start(self) -> Start:
        sequence, tokenizer = self.sequence, self._tokenizer
        prompt: tuple[TokenInfo, ...] = ()
        tops: tuple[tuple[TokenInfo, ...], ...] = ()
        if self.request.prompt_tokens:
            prompt = tuple(
                TokenInfo(id, tokenizer.token_text(id), self._prompt_logprobs.get(index), tokenizer.is_special(id))
                for index, id in enumerate(sequence.tokens[: sequence.num_prompt])
            )
            prompt = without_images(prompt, sequence.spans)
            if self._prompt_top:
                tops = tuple(
                    self._named(self._prompt_top.get(index, ()) if info.logprob is not None else ())
                    for index, info in enumerate(prompt)
                )
        began = self._began or self._arrived
        warnings = self.follower.warnings if self.follower is not None else ()
        computing = time.perf_counter() - began
        return Start(
            sequence.num_prompt, sequence.cached or 0, prompt, began - self._arrived, warnings, computing, tops
        )

    def _named(self, top: Items[tuple[int, float]]) -> tuple[TokenInfo, ...]:
        tokenizer = self._tokenizer
        return tuple(
            TokenInfo(
                token,
                tokenizer.token_text(token),
                value,
                tokenizer.is_special(token),
                tokenizer.token_bytes(token),
            )
            for token, value in top
        )

    def _finish(self, reason: FinishReason) -> None:
        tail = self._tail
        held = tail.finish()
        self.end()
        sequence = self.sequence
        seconds = time.perf_counter() - (self._began or self._arrived)
        self._events.append(
            Finish(reason, tail.text, held, sequence.generated, sequence.num_prompt, tail.hit, seconds, self.embedding)
        )


def without_images(prompt: tuple[TokenInfo, ...], spans: Items[Span]) -> tuple[TokenInfo, ...]:
    """A prompt's tokens in which those of images have neither a text nor a log-probability."""
    if not spans:
        return prompt
    shown = list(prompt)
    for span in spans:
        for index in range(span.start, span.stop):
            shown[index] = TokenInfo(prompt[index].id, "", None, True)
    return tuple(shown)
