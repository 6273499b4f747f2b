"""The load generator for machines without wrk and h2load; it is slower and takes more of the shared cores.

    python -m bench.aioload rest|grpc URL BODY_FILE CONNECTIONS SECONDS

Prints one line of JSON, as `post.lua` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from bench.load import percentile


class _Client(asyncio.Protocol):
    """One keep-alive connection that sends its next request when the reply is complete."""

    def __init__(self, request: bytes, end: float, latencies: list[float], errors: list[str]) -> None:
        self.request = request
        self.end = end
        self.latencies = latencies
        self.errors = errors
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.head = b""
        self.missing = -1
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = self.head[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            if not self.head.startswith(b"HTTP/1.1 2") or not length.strip():
                self.errors.append(self.head[:200].decode(errors="replace"))
                self.transport.close()
                return
            self.missing = int(length) - (len(self.head) - end - 4)
        else:
            self.missing -= len(data)
        if self.missing == 0:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.errors.append(str(exc))
        if not self.left.done():
            self.left.set_result(None)

    def _answered(self) -> None:
        now = time.perf_counter()
        self.latencies.append(now - self.sent)
        if now < self.end:
            self._send()
        else:
            self.transport.close()

    def _send(self) -> None:
        self.head = b""
        self.missing = -1
        self.sent = time.perf_counter()
        self.transport.write(self.request)


async def rest(url: str, body: bytes, connections: int, seconds: float) -> tuple[list[float], list[str]]:
    """Latencies in seconds and the errors' texts."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [line for line in os.environ.get("BENCH_HEADERS", "").splitlines() if line]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    latencies: list[float] = []
    errors: list[str] = []
    end = time.perf_counter() + seconds
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: _Client(request, end, latencies, errors), parts.hostname or "", parts.port or 80
        )
        clients.append(client)
    await asyncio.wait_for(asyncio.gather(*(client.left for client in clients)), seconds + 30)
    return latencies, errors


async def grpc(url: str, body: bytes, connections: int, seconds: float) -> tuple[list[float], list[str]]:
    """As `rest`, with one channel, and thus one connection, per caller."""
    import grpc as grpc_library

    parts = urlsplit(url)
    latencies: list[float] = []
    errors: list[str] = []
    end = time.perf_counter() + seconds
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]

    async def caller() -> None:
        async with grpc_library.aio.insecure_channel(parts.netloc, options=options) as channel:
            call = channel.unary_unary(parts.path)
            while (start := time.perf_counter()) < end:
                try:
                    await call(body, timeout=30)
                except grpc_library.RpcError as error:
                    errors.append(str(error.code()))
                    return
                latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(caller() for _ in range(connections)))
    return latencies, errors


def main() -> None:
    kind, url, file, connections, seconds = sys.argv[1:6]
    body = Path(file).read_bytes()
    start = time.perf_counter()
    load = {"rest": rest, "grpc": grpc}[kind]
    latencies, errors = asyncio.run(load(url, body, int(connections), float(seconds)))
    ordered = sorted(latencies)
    for text in errors[:3]:
        print(text, file=sys.stderr)
    figures = {
        "requests": len(ordered),
        "seconds": time.perf_counter() - start,
        "p50_ms": percentile(ordered, 50) * 1000,
        "p99_ms": percentile(ordered, 99) * 1000,
        "errors": len(errors),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
