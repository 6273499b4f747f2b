"""ASGI types, and the responses that are the same for all doors."""

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
    """An ASGI application that can answer some small requests without a task, at half the cost."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one `http` scope."""

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """Begins to answer a request whose whole body was received. Never raises.

        Returns:
            A function to call if the client leaves before the answer; None if nothing was done and `__call__` must
            serve the request.
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
    """Sends one whole response. A memoryview must have the format `B`.

    Args:
        refused: it is an error, even if the status is not one.
    """
    length = (b"content-length", str(len(body)).encode())
    start: Message = {"type": "http.response.start", "status": status, "headers": [content_type, length, *headers]}
    if refused:
        start["refused"] = True
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def respond_json(send: Send, value: Any, *, status: int = 200, headers: Iterable[Header] = ()) -> None:
    """Sends one whole JSON response; `value` is anything that orjson takes."""
    await respond(send, orjson.dumps(value), status=status, headers=headers)


def error_json(text: str, words: str | None = None) -> bytes:
    """The body of an error before the protocol is known, with a key for MindSpore Serving's clients and one for others.

    Args:
        words: the text for MindSpore Serving's clients, if it differs.
    """
    return orjson.dumps({"error": text, "error_msg": text if words is None else words})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lower case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def nothing_to_cancel() -> None:
    """Does nothing. An `InlineApp` returns it for a request that it has answered already."""
