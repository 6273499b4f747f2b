"""Why workers are reached over a socket pair and not over a gRPC stream: `python -m bench.link`.

Both carry the same frames (16 instances of two float32 [2,2] arrays) to a child process that sends them back: one at
a time (latency) and with 32 in flight (throughput). Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import numpy as np

METHOD = "/bench.Link/Work"


def frame() -> bytes:
    from inflight.link import Packer, Work

    packer = Packer()
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    return packer.frame(Work(0, 0, packer.rows([[[array, array] for _ in range(16)]]), None, []))


def echo_socket(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    while data := sock.recv(1 << 16):
        sock.sendall(data)


async def echo_grpc(address: str) -> None:
    import grpc

    async def work(requests: object, context: object) -> object:
        async for message in requests:  # type: ignore[attr-defined]
            yield message

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(work)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Link", {"Work": handler}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


class SocketLink:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "bench.link", "--child", f"socket:{theirs.fileno()}"]
        self.child = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        theirs.close()
        self.sock = ours
        self.waiting: asyncio.Queue[None] = asyncio.Queue()
        self.size = len(frame())

    async def open(self) -> None:
        link = self

        class Reader(asyncio.Protocol):
            pending = 0

            def data_received(self, data: bytes) -> None:
                self.pending += len(data)
                while self.pending >= link.size:
                    self.pending -= link.size
                    link.waiting.put_nowait(None)

        self.transport, _ = await asyncio.get_running_loop().connect_accepted_socket(Reader, self.sock)

    async def send(self, data: bytes) -> None:
        self.transport.write(data)

    async def receive(self) -> None:
        await self.waiting.get()


class GrpcLink:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"unix:{self.folder.name}/s"
        self.child = subprocess.Popen([sys.executable, "-m", "bench.link", "--child", f"grpc:{self.address}"])

    async def open(self) -> None:
        import grpc

        self.channel = grpc.aio.insecure_channel(self.address)
        await asyncio.wait_for(self.channel.channel_ready(), 20)
        self.call = self.channel.stream_stream(METHOD)()

    async def send(self, data: bytes) -> None:
        await self.call.write(data)

    async def receive(self) -> None:
        await self.call.read()


async def measure(
    send: Callable[[bytes], Awaitable[None]], receive: Callable[[], Awaitable[None]], ahead: int, seconds: float
) -> float:
    """Frames there and back per second, with `ahead` of them in flight."""
    data = frame()
    for _ in range(ahead):
        await send(data)
    done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        await receive()
        await send(data)
        done += 1
    rate = done / (time.perf_counter() - start)
    for _ in range(ahead):
        await receive()
    return rate


async def main(rounds: int, seconds: float) -> None:
    links: dict[str, SocketLink | GrpcLink] = {"socket pair": SocketLink(), "grpc.aio stream": GrpcLink()}
    rates: dict[tuple[str, int], list[float]] = {}
    for link in links.values():
        await link.open()
    for _ in range(rounds):
        for name, link in links.items():
            for ahead in (1, 32):
                rates.setdefault((name, ahead), []).append(await measure(link.send, link.receive, ahead, seconds))
    for (name, ahead), values in rates.items():
        middle = statistics.median(values)
        print(f"{name:16} {ahead:3} in flight: {middle:8.0f} frames/s, {1e6 / middle:6.1f} us each")
    for link in links.values():
        link.child.kill()
        link.child.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind, _, where = (options.child or "").partition(":")
    if kind == "socket":
        echo_socket(int(where))
    elif kind == "grpc":
        asyncio.run(echo_grpc(where))
    else:
        asyncio.run(main(options.rounds, options.seconds))
        os._exit(0)
