"""The ASGI words: what a server hands an application, and the answers every door gives the same way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol, TypeAlias

import orjson

Scope: TypeAlias = "MutableMapping[str, Any]"
Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[Scope, Receive, Send], Awaitable[None]]"
Header: TypeAlias = "tuple[bytes, bytes]"

Answer: TypeAlias = "Callable[[int, list[Header], bytes], None]"
"""Sends one whole response: status, headers without content-length, body. Called once, on the loop."""


class InlineApp(Protocol):
    """An ASGI application that can answer some small requests without a task, which costs it half as much."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """Begins to answer a request whose whole body is here.

        Returns:
            What to call when the client leaves before the answer; None where the request is for `__call__`, and then
            nothing has been done. It never raises.
        """


JSON = (b"content-type", b"application/json")


async def respond(
    send: Send,
    body: bytes | memoryview,
    *,
    status: int = 200,
    content_type: Header = JSON,
    headers: Iterable[Header] = (),
    refused: bool = False,
) -> None:
    """One whole response. A body as memoryview must be of bytes (format `B`).

    Args:
        refused: it is an error, though the status may not say so.
    """
    length = (b"content-length", str(len(body)).encode())
    start: Message = {"type": "http.response.start", "status": status, "headers": [content_type, length, *headers]}
    if refused:
        start["refused"] = True
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def respond_json(send: Send, value: Any, *, status: int = 200, headers: Iterable[Header] = ()) -> None:
    """One whole JSON response; `value` is anything orjson takes."""
    await respond(send, orjson.dumps(value), status=status, headers=headers)


def error_json(text: str, words: str | None = None) -> bytes:
    """An error before any protocol is known: the key of MindSpore Serving's clients and that of all others.

    Args:
        words: what the former are told, where it is something else.
    """
    return orjson.dumps({"error": text, "error_msg": text if words is None else words})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lower case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def nothing_to_cancel() -> None:
    """What an `InlineApp` returns for a request that it has answered already."""
