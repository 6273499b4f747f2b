"""`inflight bench`: sends the same request repeatedly over several connections and reports rates and latencies."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inflight.commands.bench_llm import BENCH_OPTIONS, run_llm
from inflight.commands.call import failed_reply
from inflight.commands.options import Command, Option, UsageError
from inflight.commands.target import OPTIONS, Target, build_target
from inflight.config import seconds, switch, whole

EXAMPLES = """\
examples:
  inflight bench http://127.0.0.1:8080 digits predict --input image=@digit.npy --connections 32
  inflight bench 127.0.0.1:8081 add add_common --input x1=[1.0,2.0] --input x2=[3.0,4.0] --json
  inflight bench http://127.0.0.1:8080 --connections 8 --prompt-tokens 64-256 --plot times.png
"""

CONNECT_SECONDS = 10.0
DRAIN_SECONDS = 60.0


@dataclass
class Tally:
    """The counts of one run over all connections. Written on one event loop.

    Attributes:
        latencies: seconds, one for each answer.
        errors: number of answers that hold an error, and of lost connections.
        first_error: text of the first of them.
    """

    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    first_error: str = ""

    def answered(self, started: float, error: str | None) -> None:
        self.latencies.append(time.perf_counter() - started)
        if error is not None:
            self.failed(error)

    def failed(self, error: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or error

    def percentile(self, share: float) -> float:
        """Seconds within which this share of the answers arrived; 0 without answers."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Connection(asyncio.Protocol):
    """One keep-alive HTTP connection: sends the request again as soon as the answer is complete."""

    def __init__(self, request: bytes, deadline: float, tally: Tally) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._request = request
        self._deadline = deadline
        self._tally = tally
        self._received = bytearray()
        self._expected: int | None = None
        self._transport: asyncio.Transport | None = None
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._expected is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _content_length(bytes(self._received[:end]))
            if length is None:
                self._fail("the answer has no Content-Length; this is not a REST door of the server")
                return
            self._expected = end + 4 + length
        if len(self._received) >= self._expected:
            self._answered(bytes(self._received[: self._expected]))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._fail(f"the connection was lost: {error or 'closed by the server'}")

    def _send(self) -> None:
        assert self._transport is not None
        self._received.clear()
        self._expected = None
        self._started = time.perf_counter()
        self._transport.write(self._request)

    def _answered(self, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        failed = not head.split(b" ", 2)[1].startswith(b"2")
        # The bytes are searched first: with every answer parsed, the figures would measure this program.
        if failed or (b'"error_msg"' in body and failed_reply(body.decode(errors="replace"))):
            self._tally.answered(self._started, body.decode(errors="replace"))
        else:
            self._tally.answered(self._started, None)
        if time.perf_counter() < self._deadline:
            self._send()
        else:
            self._finish()

    def _fail(self, text: str) -> None:
        self._tally.failed(text)
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        assert self._transport is not None
        self._transport.close()


def _content_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return None


async def _rest(target: Target, values: Mapping[str, Any], tally: Tally) -> None:
    body = target.body(values["instances"])
    request = (
        f"POST {target.path} HTTP/1.1\r\nHost: {target.address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    host, _, port = target.address.rpartition(":")
    loop = asyncio.get_running_loop()
    deadline = time.perf_counter() + values["seconds"]
    connections: list[_Connection] = []
    context = target.ssl_context()
    for _ in range(values["connections"]):
        try:
            opening = loop.create_connection(
                lambda: _Connection(request, deadline, tally), host.strip("[]"), int(port), ssl=context
            )
            _, connection = await asyncio.wait_for(opening, CONNECT_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            raise UsageError(f"{target.address} cannot be reached: {error}; is the server running?") from None
        connections.append(connection)
    waiting = [connection.done for connection in connections]
    _, late = await asyncio.wait(waiting, timeout=values["seconds"] + DRAIN_SECONDS)
    for _ in late:
        tally.failed(f"no answer within {DRAIN_SECONDS:g} seconds after the end")


async def _grpc(target: Target, values: Mapping[str, Any], tally: Tally) -> None:
    from inflight.client import AsyncClient  # imports gRPC, which REST does without

    deadline = time.perf_counter() + values["seconds"]
    async with AsyncClient(**target.grpc_arguments(), timeout=values["seconds"] + DRAIN_SECONDS) as client:
        send = client.prepare([target.instance] * values["instances"])

        async def one() -> None:
            while time.perf_counter() < deadline:
                started = time.perf_counter()
                result = await send()
                failures = [result] if isinstance(result, dict) else [item for item in result if "error" in item]
                tally.answered(started, str(failures[0]["error"]) if failures else None)
                if failures and str(failures[0]["error"]).startswith("Grpc Error, (14,"):
                    return  # the server does not answer: do not spin

        await asyncio.gather(*(one() for _ in range(values["connections"])))


def report(target: Target, values: Mapping[str, Any], tally: Tally, duration: float) -> str:
    """The result as text, or as JSON with `--json`. Rates are requests in 1/s, times are in milliseconds."""
    rate = len(tally.latencies) / duration if duration > 0 else 0.0
    figures = {
        "requests": len(tally.latencies),
        "errors": tally.errors,
        "seconds": round(duration, 3),
        "requests_per_second": round(rate, 1),
        "instances_per_second": round(rate * values["instances"], 1),
        **{f"p{share}_ms": round(tally.percentile(share / 100) * 1000, 3) for share in (50, 90, 99)},
    }
    if values["json"]:
        return json.dumps(figures)
    door = "REST" if target.rest else "gRPC"
    return (
        f"{target.servable}:{target.method} at {target.address} ({door}), {values['connections']} connections, "
        f"{values['instances']} instances a request, {figures['seconds']} s\n"
        f"requests/s   {figures['requests_per_second']} ({figures['instances_per_second']} instances/s)\n"
        f"latency ms   p50 {figures['p50_ms']}  p90 {figures['p90_ms']}  p99 {figures['p99_ms']}\n"
        f"errors       {tally.errors} of {len(tally.latencies)}"
    )


def run(values: Mapping[str, Any]) -> int:
    """Prints the figures; returns 1 if any answer was an error."""
    if values["servable"] is None:
        return run_llm(values)
    if values["method"] is None:
        raise UsageError("METHOD is missing; give a servable's method, or neither for a language model")
    target = build_target(values)
    tally = Tally()
    started = time.perf_counter()
    asyncio.run((_rest if target.rest else _grpc)(target, values, tally))
    print(report(target, values, tally, time.perf_counter() - started))
    if tally.errors:
        print(f"inflight bench: first error: {tally.first_error[:500]}", file=sys.stderr)
    return int(tally.errors > 0)


COMMAND = Command(
    name="bench",
    summary="measure a running server",
    description="Sends one request again and again over several connections and prints rate and latency. Without a "
    "servable it measures a language model: time to first token, between tokens, throughput.",
    examples=EXAMPLES,
    options=(
        *OPTIONS,
        Option("connections", whole(1, 10_000), "Requests in flight at a time. Default 8.", default=8, metavar="N"),
        Option("seconds", seconds, "How long to send. Default 5.", default=5.0, metavar="SECONDS"),
        Option("instances", whole(1), "Equal instances in one request. Default 1.", default=1, metavar="N"),
        Option("json", switch, "Print the figures as JSON.", default=False),
        *BENCH_OPTIONS,
    ),
    run=run,
)
