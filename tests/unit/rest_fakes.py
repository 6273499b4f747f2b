"""What the tests of the REST interface share: a server behind it that echoes, and a client that speaks ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from inflight.config import RestConfig
from inflight.contract import MethodInfo, Outcome, Row, ServableStatus, TensorSpec
from inflight.errors import NotFound
from inflight.frontends.mindspore import MindSporeRest
from tests.unit.http_fakes import Done

LIMIT = 1 << 20
PATH = b"/model/echo:echo"


def method(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> MethodInfo:
    return MethodInfo("echo", 1, name, tuple(map(TensorSpec, inputs)), tuple(map(TensorSpec, outputs)))


class Echo:
    """A backend with `echo` (one input `x`, one output `y`) and `swap` (`a`, `b` to `b`, `a`).

    `outcome` may be replaced to answer otherwise; every row that arrives is kept in `rows`.
    """

    live = True
    ready = True

    def __init__(self) -> None:
        self.methods = {
            "echo": method("echo", ["x"], ["y"]),
            "swap": method("swap", ["a", "b"], ["b_out", "a_out"]),
        }
        self.outcome: Callable[[Row], Outcome] = lambda row: list(row)[::-1]
        self.rows: list[Row] = []
        self.asked: list[tuple[str, int, str]] = []

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        self.asked.append((servable, version, method))
        if servable != "echo" or version not in (0, 1):
            raise NotFound(f"servable '{servable}', version {version}: servable is not available")
        if method not in self.methods:
            raise NotFound(f"method '{method}': method is not available")
        return self.methods[method]

    def submit(
        self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: Any = None
    ) -> Callable[[], None]:
        self.rows.extend(rows)
        done([self.outcome(row) for row in rows])
        return lambda: None

    def servables(self) -> Sequence[ServableStatus]:
        return []


@dataclass
class Response:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str:
        error: str = self.json["error_msg"]
        return error


@dataclass
class Client:
    """One request after the other to one application. `pulled` counts the bytes that it asked for."""

    backend: Echo = field(default_factory=Echo)
    limit: int = LIMIT
    status_codes: bool = False
    pulled: int = 0

    def __post_init__(self) -> None:
        config = RestConfig(status_codes=self.status_codes)
        self.app = MindSporeRest(self.backend, max_body_bytes=self.limit, config=config)

    def post(self, body: bytes, path: bytes = PATH, **how: Any) -> Response:
        return asyncio.run(self.request(body, path, **how))

    def send(self, instances: Any, path: bytes = PATH) -> Response:
        return self.post(orjson.dumps({"instances": instances}), path)

    def echo(self, value: Any) -> Any:
        """What `x` comes back as."""
        reply = self.send([{"x": value}]).json
        assert list(reply) == ["instances"], reply
        return reply["instances"][0]["y"]

    def error(self, instances: Any, path: bytes = PATH) -> str:
        return self.send(instances, path).error

    async def request(
        self,
        body: bytes,
        path: bytes = PATH,
        *,
        verb: str = "POST",
        query: bytes = b"",
        headers: Iterable[tuple[bytes, bytes]] = (),
        chunk: int | None = None,
        leaves: bool = False,
    ) -> Response:
        """A whole exchange, checked for being exactly one response of the announced length.

        Args:
            chunk: bytes in one piece of the body; None: all of it, with its length announced.
            leaves: the client disconnects after the body's first piece.
        """
        pieces = [body[i : i + chunk] for i in range(0, len(body), chunk)] if chunk and body else [body]
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "method": verb,
            "path": path.decode("latin-1"),
            "raw_path": path,
            "query_string": query,
            "headers": [*headers, *([] if chunk else [(b"content-length", b"%d" % len(body))])],
        }

        async def receive() -> dict[str, Any]:
            if not pieces or (leaves and len(sent_pieces) == 1):
                await asyncio.sleep(0)
                return {"type": "http.disconnect"}
            sent_pieces.append(pieces.pop(0))
            self.pulled += len(sent_pieces[-1])
            return {"type": "http.request", "body": sent_pieces[-1], "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            sent.append(message)

        sent_pieces: list[bytes] = []
        await self.app(scope, receive, send)
        if leaves:
            assert not sent
            return Response(0, {}, b"")
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        start, content = sent
        found = dict(start["headers"])
        assert len(found) == len(start["headers"])
        assert int(found[b"content-length"]) == len(content["body"])
        assert found[b"content-type"] == b"application/json"
        assert not content.get("more_body", False)
        return Response(start["status"], found, content["body"])
