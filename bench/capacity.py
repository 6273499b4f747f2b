"""What the one server process carries: its processor time for a token, a request, a row; memory for a connection.

    python -m bench.capacity [--rounds 3] [--seconds 4] [--connections 4000]

Only the server's own process counts: workers and ranks are others, on cores or machines of their own. Its loop runs on
one core, so a million microseconds divided by a figure is what it carries at most in a second. The kernel tells the
processor time, so it hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import bodies, cases
from bench.models import SERVABLES, write_models
from bench.procs import Server, cpu_seconds, free_port, memory
from bench.servers import RESULTS, answers

ROOT = Path(__file__).parent.parent
ADD = "/model/add:predict"
TOKENS = 400
"""Tokens of one stream; then its connection asks for the next."""


@dataclass(frozen=True)
class Load:
    """Attributes:
    unit: what is counted.
    connections: that ask in a closed loop.
    request: the whole HTTP request.
    count: units in a response, of its bytes.
    """

    name: str
    unit: str
    connections: int
    request: bytes
    count: Callable[[bytes], int]


def post(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _events(response: bytes) -> int:
    return response.count(b"data:")


def _one(_response: bytes) -> int:
    return 1


def loads() -> list[Load]:
    sampling = {"max_new_tokens": TOKENS, "do_sample": False}
    stream = post("/generate_stream", json.dumps({"inputs": "Once", "parameters": sampling}).encode())
    chat: dict[str, Any] = {"model": "pocket", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    chat["messages"] = [{"role": "user", "content": "Tell me a story."}]
    chatted = post("/v1/chat/completions", json.dumps(chat).encode())
    short = post("/generate", json.dumps({"inputs": "Once", "parameters": {"max_new_tokens": 1}}).encode())
    row, many = (post(ADD, bodies.mindspore_json(*cases.add_arrays(rows)).data) for rows in (1, 1000))
    return [
        *(
            Load(f"a token of TGI's stream, {count} at a time", "token", count, stream, _events)
            for count in (1, 16, 64)
        ),
        *(Load(f"a token of a chat, {count} at a time", "token", count, chatted, _events) for count in (1, 16, 64)),
        Load("a generation of one token, 64 connections", "request", 64, short, _one),
        Load("a classic request of one row over REST, 64 connections", "request", 64, row, _one),
        Load(
            "a row of 1,000 in a classic request over REST",
            "row",
            4,
            many,
            lambda _: 1000,
        ),
    ]


@contextmanager
def served() -> Iterator[Server]:
    write_models()
    port = free_port()
    argv = [
        str(Path(sys.executable).with_name("inflight")),
        "serve",
        str(ROOT / "models" / "pocket"),
        str(SERVABLES / "add"),
    ]
    argv += ["--http", f"127.0.0.1:{port}", "--grpc", "off", "--status-codes"]
    ready = answers(port, "/health/ready")
    with Server("Inflight", argv, RESULTS / "capacity.log", ready, ports={"http": port}) as server:
        yield server


async def _response(reader: asyncio.StreamReader) -> bytes:
    """One response with its body, of a length or in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"refused: {head[:80]!r} {(await reader.read(300))!r}")
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0].strip()
    if length:
        return await reader.readexactly(int(length))
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)


async def measure(server: Server, load: Load, seconds: float) -> float:
    """Microseconds of the server's process for one unit."""
    port = server.ports["http"]
    end = time.monotonic() + seconds

    async def client() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        found = 0
        while time.monotonic() < end:
            writer.write(load.request)
            found += load.count(await _response(reader))
        writer.close()
        return found

    before = cpu_seconds(server.pid)
    counts = await asyncio.gather(*(client() for _ in range(load.connections)))
    return (cpu_seconds(server.pid) - before) / sum(counts) * 1e6


async def idle(server: Server, count: int) -> float:
    """Bytes of the server's process for a connection that has asked once and waits."""
    ask = b"GET /health/live HTTP/1.1\r\nHost: bench\r\n\r\n"
    before = memory(server.pid)
    opened = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["http"])
        writer.write(ask)
        await _response(reader)
        opened.append(writer)
    used = memory(server.pid) - before
    for writer in opened:
        writer.close()
    return used / count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement (default 4)")
    parser.add_argument("--connections", type=int, default=4000, help="that are idle (default 4000)")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with served() as server:
        for load in loads():
            asyncio.run(measure(server, load, 1))  # warm
        for _ in range(options.rounds):
            for load in loads():
                found.setdefault(load.name, []).append(asyncio.run(measure(server, load, options.seconds)))
        kept = asyncio.run(idle(server, options.connections))
    print("| | µs of the server's process, median | smallest to largest | a core carries at most, a second |")
    print("|---|---|---|---|")
    for name, figures in found.items():
        middle = statistics.median(figures)
        print(f"| {name} | {middle:.1f} | {min(figures):.1f} to {max(figures):.1f} | {1e6 / middle:,.0f} |")
    print(f"\nMemory of an idle connection: {kept / 1e3:.1f} kB ({options.connections:,} of them).")


if __name__ == "__main__":
    main()
