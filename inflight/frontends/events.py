"""Answers a request with a stream of events, for servables in which a language model generates text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from inflight.contract import Outcome, TextPart
from inflight.errors import InflightError
from inflight.wire import EventStream, Opened, Send

Part = TextPart | Sequence[Outcome]


async def send_events(
    parts: AsyncGenerator[Part, None],
    send: Send,
    frames: Callable[[Part], Iterable[bytes]],
    failed: Callable[[InflightError], bytes],
) -> None:
    """Answers with one event for every frame of every part.

    Args:
        parts: from `stream` of `inflight.frontends.base`.
        frames: makes the data of events from a part.
        failed: makes the data of the last event from an error that occurs after the stream has begun.

    Raises:
        InflightError: the request was refused before anything was sent.
    """
    opened = await Opened(parts).open()
    try:
        async with EventStream(send, [(b"x-accel-buffering", b"no")]) as stream:
            try:
                async for part in opened:
                    for frame in frames(part):
                        await stream.event(frame)
            except InflightError as error:
                await stream.event(failed(error))
    finally:
        await opened.close()
